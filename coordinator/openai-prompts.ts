/** The prompts of a completion: a text, several, token ids, or several lists of them. */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { encodePrompt } from './prompt.js';
import { MAX_SEQUENCES, type ModelCard, type Prompt } from './request.js';

const tokenIds = z.array(z.number().int().nonnegative()).min(1);

export const promptField = z.union(
  [
    z.string(),
    z.array(z.string()).min(1).max(MAX_SEQUENCES),
    tokenIds,
    z.array(tokenIds).min(1).max(MAX_SEQUENCES),
  ],
  {
    error: `must be a string, an array of token ids, or an array of 1 to ${MAX_SEQUENCES} of either`,
  },
);

/**
 * Token ids are taken as they are; a text gets BOS before it, where the model knows one.
 *
 * @throws CaravanError `invalid_request`, `context_length_exceeded`.
 */
export function promptsOf(
  field: z.infer<typeof promptField>,
  { card, tokenizer }: { readonly card: ModelCard; readonly tokenizer: Tokenizer },
): [Prompt, ...Prompt[]] {
  const each = typeof field === 'string' || typeof field[0] === 'number' ? [field] : field;
  const prompts = (each as (string | number[])[]).map((prompt): Prompt => {
    if (typeof prompt === 'string') {
      const { ids, isTextStart } = encodePrompt(prompt, tokenizer);
      return { promptTokenIds: ids, isTextStart };
    }
    const alien = prompt.find((id) => id >= card.vocabSize);
    if (alien !== undefined) {
      throw new CaravanError(
        'invalid_request',
        `prompt: token id ${alien} is not below the vocabulary's ${card.vocabSize}`,
        { param: 'prompt' },
      );
    }
    return { promptTokenIds: prompt, isTextStart: false };
  });
  return prompts as [Prompt, ...Prompt[]];
}
