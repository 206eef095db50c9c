/**
 * How a checkpoint stretches its rotary embedding beyond the context that it was first trained for. The kinds and their
 * formulas are those of Hugging Face's transformers (modeling_rope_utils.py); worker/rotary.ts computes them.
 */
import { z } from 'zod';

/** Positions of a scaling are those of the context before it was stretched. */
export type RopeScaling =
  /** Every position is divided by the factor. */
  | { readonly kind: 'linear'; readonly factor: number }
  /**
   * The base grows with the length, beyond the original context. Position p is turned by the base of a sequence of
   * p + 1 tokens, always: what a token's key is depends on its position alone, and not on how the prompt was
   * cut into chunks, on its neighbours in the batch, or on where a sequence was resumed. It is what transformers
   * computes when a sequence is decoded token by token with a cache.
   */
  | { readonly kind: 'dynamic'; readonly factor: number; readonly originalPositions: number }
  /** Llama 3.1: slow channels are divided by the factor, quick ones are not, with a slope between them. */
  | {
      readonly kind: 'llama3';
      readonly factor: number;
      readonly lowFrequencyFactor: number;
      readonly highFrequencyFactor: number;
      readonly originalPositions: number;
    };

const positive = z.number().positive();
const positions = z.number().int().positive();

const scalingFile = z.looseObject({
  // The old spelling is `type`, the new one `rope_type`.
  rope_type: z.string().nullish(),
  type: z.string().nullish(),
  rope_theta: positive.nullish(),
  factor: z.number().min(1).nullish(),
  low_freq_factor: positive.nullish(),
  high_freq_factor: positive.nullish(),
  original_max_position_embeddings: positions.nullish(),
  partial_rotary_factor: z.number().nullish(),
});

/** What the caller does with a field that is wrong, or that Caravan does not run. */
export interface Refusals {
  readonly damaged: (field: string, message: string) => never;
  readonly unsupported: (field: string, value: unknown, supported: string) => never;
}

export interface Rope {
  readonly theta: number | undefined;
  readonly scaling: RopeScaling | undefined;
}

/**
 * Reads config.json's `rope_scaling`, or the `rope_parameters` of transformers 5, which hold rope_theta too.
 *
 * @param field its name, for messages.
 * @param maxPositions config.json's max_position_embeddings.
 */
export function parseRope(
  value: unknown,
  field: string,
  maxPositions: number,
  { damaged, unsupported }: Refusals,
): Rope {
  if (value === undefined || value === null) return { theta: undefined, scaling: undefined };
  const parsed = scalingFile.safeParse(value);
  if (!parsed.success) {
    const issue = parsed.error.issues[0];
    return damaged([field, ...(issue?.path ?? [])].join('.'), issue?.message ?? '');
  }
  const s = parsed.data;
  const kind = s.rope_type ?? s.type ?? 'default';
  const need = <T>(key: string, found: T | null | undefined): T =>
    found ?? damaged(`${field}.${key}`, `is needed by rope_type "${kind}"`);
  if ((s.partial_rotary_factor ?? 1) !== 1) {
    unsupported(`${field}.partial_rotary_factor`, s.partial_rotary_factor, '1');
  }
  const theta = s.rope_theta ?? undefined;
  switch (kind) {
    case 'default':
      return { theta, scaling: undefined };
    case 'linear':
      return { theta, scaling: { kind, factor: need('factor', s.factor) } };
    case 'dynamic': {
      const originalPositions = s.original_max_position_embeddings ?? maxPositions;
      return { theta, scaling: { kind, factor: need('factor', s.factor), originalPositions } };
    }
    case 'llama3': {
      const lowFrequencyFactor = need('low_freq_factor', s.low_freq_factor);
      const highFrequencyFactor = need('high_freq_factor', s.high_freq_factor);
      if (highFrequencyFactor <= lowFrequencyFactor) {
        damaged(
          `${field}.high_freq_factor`,
          `${highFrequencyFactor} is not above low_freq_factor ${lowFrequencyFactor}`,
        );
      }
      return {
        theta,
        scaling: {
          kind,
          factor: need('factor', s.factor),
          lowFrequencyFactor,
          highFrequencyFactor,
          originalPositions: need(
            'original_max_position_embeddings',
            s.original_max_position_embeddings,
          ),
        },
      };
    }
    default:
      return unsupported(`${field}.rope_type`, kind, '"default", "linear", "dynamic" and "llama3"');
  }
}
