/** /tokenize and /detokenize: a model's own tokens, in vLLM's shape. */
import type { FastifyInstance } from 'fastify';
import type { Models } from './models.js';
import { modelNameOf } from './openai.js';
import { spokenMessages } from './openai-messages.js';
import { parseBody, refuse } from './openai-refusal.js';
import { detokenizeBody, tokenizeBody } from './openai-tokens.js';

export function addTokenizeRoutes(app: FastifyInstance, { models }: { models: Models }): void {
  app.post('/tokenize', async ({ body }) => {
    const { card, tokenizer, chat } = await models.find(modelNameOf(body));
    const parsed = parseBody(tokenizeBody, body, 'prompt');
    let tokens: readonly number[];
    if ('messages' in parsed) tokens = chat.render(spokenMessages(parsed.messages));
    else {
      const prefix = parsed.add_special_tokens === false ? [] : tokenizer.prefixTokenIds;
      tokens = [...prefix, ...tokenizer.encode(parsed.prompt)];
    }
    const pieces = tokens.map((id) => tokenizer.pieceOf(id));
    return { tokens, count: tokens.length, max_model_len: card.maxSeqLen, token_strs: pieces };
  });
  app.post('/detokenize', async ({ body }) => {
    const { card, tokenizer } = await models.find(modelNameOf(body));
    const { tokens } = parseBody(detokenizeBody, body, 'tokens');
    const alien = tokens.find((id) => id >= card.vocabSize);
    if (alien !== undefined) {
      refuse('tokens', `token id ${alien} is not below the vocabulary's ${card.vocabSize}`);
    }
    return { prompt: tokenizer.decode(tokens) };
  });
}
