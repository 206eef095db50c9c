/** params.json of Meta's download: the sizes of the network, and how that of its feed-forward layers is found. */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { spelled } from './quoted.js';
import { checkConfig, type LlamaConfig } from './config.js';

const positive = z
  .number()
  .int()
  .positive()
  .max(2 ** 31);

// Defaults are those of the reference implementation's ModelArgs.
const paramsFile = z.object({
  dim: positive,
  n_layers: positive.max(10_000),
  n_heads: positive,
  n_kv_heads: positive.nullish(),
  multiple_of: positive.default(256),
  ffn_dim_multiplier: z.number().positive().nullish(),
  norm_eps: z.number().positive().default(1e-5),
  vocab_size: z.union([z.literal(-1), positive]).default(-1),
  rope_theta: z.number().positive().default(10_000),
  max_seq_len: positive.nullish(),
});

/** Of Llama 3.1 and later: other rotary angles, other layers. */
const UNSUPPORTED = [
  'use_scaled_rope',
  'moe_args',
  'moe',
  'quantization_args',
  'lora_args',
  'vision_chunk_size',
];

/** Context of Llama 2, and of Code Llama, whose rope_theta tells it: params.json does not say. */
const LLAMA2_POSITIONS = 4096;
const CODE_LLAMA_POSITIONS = 16_384;
const CODE_LLAMA_THETA = 1_000_000;

/**
 * @param countPieces asked for the size of the vocabulary where vocab_size is -1.
 * @throws CaravanError `invalid_checkpoint` naming the field, or `unsupported_model`.
 */
export function parseMetaParams(
  text: string,
  fileName: string,
  countPieces: () => number,
): LlamaConfig {
  const damaged = (message: string, cause?: unknown): CaravanError =>
    new CaravanError('invalid_checkpoint', `${fileName}: ${message}`, { cause });
  let json: unknown;
  try {
    json = JSON.parse(text);
  } catch (cause) {
    throw damaged('is not valid JSON', cause);
  }
  const parsed = paramsFile.safeParse(json);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    throw damaged(`${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`);
  }
  for (const field of UNSUPPORTED) {
    const value = (json as Record<string, unknown>)[field];
    if (value === undefined || value === null || value === false || value === -1) continue;
    throw new CaravanError(
      'unsupported_model',
      `${fileName}: ${field} is ${spelled(value)}; in Meta's layout Caravan runs Llama 2 and Code Llama, ` +
        'and later models in Hugging Face layout',
    );
  }
  const p = parsed.data;
  const config: LlamaConfig = {
    hiddenSize: p.dim,
    ffnSize: ffnSizeOf(p.dim, p.multiple_of, p.ffn_dim_multiplier ?? null),
    layerCount: p.n_layers,
    headCount: p.n_heads,
    kvHeadCount: p.n_kv_heads ?? p.n_heads,
    headSize: p.dim / p.n_heads,
    vocabSize: p.vocab_size === -1 ? countPieces() : p.vocab_size,
    maxPositions:
      p.max_seq_len ??
      (p.rope_theta === CODE_LLAMA_THETA ? CODE_LLAMA_POSITIONS : LLAMA2_POSITIONS),
    normEps: p.norm_eps,
    ropeTheta: p.rope_theta,
    isHeadTied: false,
  };
  checkConfig(config, fileName);
  return config;
}

/** As the reference implementation's FeedForward computes it, rounding down after each step. */
export function ffnSizeOf(dim: number, multipleOf: number, multiplier: number | null): number {
  const twoThirds = Math.floor((2 * (4 * dim)) / 3);
  const scaled = multiplier === null ? twoThirds : Math.floor(multiplier * twoThirds);
  return multipleOf * Math.ceil(scaled / multipleOf);
}
