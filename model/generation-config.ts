/**
 * A checkpoint's own wishes for sampling, of generation_config.json: they stand where a request leaves a field out.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { readJson } from './tokenizer.js';

export interface GenerationDefaults {
  /** 0 to 2; 0 is greedy, and stands for `"do_sample": false`. */
  readonly temperature?: number;
  /** Above 0, at most 1. */
  readonly topP?: number;
  /** 0 keeps all. */
  readonly topK?: number;
  /** Most tokens of an answer. */
  readonly maxNewTokens?: number;
  /** Most tokens of prompt and answer together. It is passed over for prompts that are as long as this. */
  readonly maxLength?: number;
}

const count = z.number().int().positive();

// Fields that ask for what Caravan does not do are ignored here as elsewhere unknown ones are.
const generationFile = z.object({
  do_sample: z.boolean().nullish(),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().gt(0).max(1).nullish(),
  // -1 and 0 both mean: all.
  top_k: z.number().int().min(-1).nullish(),
  max_new_tokens: count.nullish(),
  max_length: count.nullish(),
});

/**
 * @param files as `openTokenizer` takes them. Without generation_config.json there are no wishes.
 * @throws CaravanError `invalid_checkpoint` naming the field.
 */
export function readGenerationDefaults(files: ReadonlyMap<string, Uint8Array>): GenerationDefaults {
  const bytes = files.get('generation_config.json');
  if (bytes === undefined) return {};
  const parsed = generationFile.safeParse(readJson(bytes, 'generation_config.json'));
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    throw new CaravanError(
      'invalid_checkpoint',
      `generation_config.json: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`,
    );
  }
  const { do_sample: samples, temperature, top_p, top_k, max_new_tokens, max_length } = parsed.data;
  const wished = samples === false ? 0 : temperature;
  return {
    ...(wished == null ? {} : { temperature: wished }),
    ...(top_p == null ? {} : { topP: top_p }),
    ...(top_k == null ? {} : { topK: Math.max(0, top_k) }),
    ...(max_new_tokens == null ? {} : { maxNewTokens: max_new_tokens }),
    ...(max_length == null ? {} : { maxLength: max_length }),
  };
}
