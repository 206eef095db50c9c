/** Bodies of /tokenize and /detokenize, in vLLM's shape. */
import { z } from 'zod';

const model = z.string().nullish();

export const tokenizeBody = z.union(
  [
    z.object({ model, prompt: z.string(), add_special_tokens: z.boolean().nullish() }),
    z.object({
      model,
      messages: z.array(z.object({ role: z.string(), content: z.string() })).min(1),
    }),
  ],
  { error: 'must have a prompt, which is a text, or messages of role and content' },
);

export const detokenizeBody = z.object({
  model,
  tokens: z.array(z.number().int().nonnegative()),
});
