/** /tokenize and /detokenize: a model's own tokens, in vLLM's shape. */
import type { FastifyInstance } from 'fastify';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import type { Models } from './models.js';
import { modelNameOf } from './openai.js';

const tokenizeBody = z.union(
  [
    z.object({ prompt: z.string(), add_special_tokens: z.boolean().nullish() }),
    z.object({
      messages: z.array(z.object({ role: z.string(), content: z.string() })).min(1),
    }),
  ],
  { error: 'must have a prompt, which is a text, or messages of role and content' },
);

const detokenizeBody = z.object({ tokens: z.array(z.number().int().nonnegative()) });

export function addTokenizeRoutes(app: FastifyInstance, { models }: { models: Models }): void {
  app.post('/tokenize', async ({ body }) => {
    const { card, tokenizer, chat } = await models.find(modelNameOf(body));
    const parsed = parse(tokenizeBody, body, 'prompt');
    let tokens: readonly number[];
    if ('messages' in parsed) tokens = chat.render(parsed.messages);
    else {
      const prefix = parsed.add_special_tokens === false ? [] : tokenizer.prefixTokenIds;
      tokens = [...prefix, ...tokenizer.encode(parsed.prompt)];
    }
    const pieces = tokens.map((id) => tokenizer.pieceOf(id));
    return { tokens, count: tokens.length, max_model_len: card.maxSeqLen, token_strs: pieces };
  });
  app.post('/detokenize', async ({ body }) => {
    const { card, tokenizer } = await models.find(modelNameOf(body));
    const { tokens } = parse(detokenizeBody, body, 'tokens');
    const alien = tokens.find((id) => id >= card.vocabSize);
    if (alien !== undefined) {
      throw new CaravanError(
        'invalid_request',
        `tokens: token id ${alien} is not below the vocabulary's ${card.vocabSize}`,
        { param: 'tokens' },
      );
    }
    return { prompt: tokenizer.decode(tokens) };
  });
}

function parse<T extends z.ZodType>(schema: T, body: unknown, field: string): z.infer<T> {
  const parsed = schema.safeParse(body);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  const path = issue?.path.join('.') ?? '';
  const param = path === '' ? field : path;
  throw new CaravanError('invalid_request', `${param}: ${issue?.message ?? 'is wrong'}`, { param });
}
