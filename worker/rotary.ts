/**
 * The tables of rotary embedding: by position, how far each pair of channels is turned.
 *
 * J. Su et al., "RoFormer", 2021; scalings as in Hugging Face's modeling_rope_utils.py.
 */
import type { LlamaConfig } from '../model/config.js';
import { allocate } from './memory.js';

/** cos and sin of position × frequency, each (rows, headSize / 2). */
export interface RotaryTables {
  readonly cos: Float32Array<ArrayBuffer>;
  readonly sin: Float32Array<ArrayBuffer>;
}

export function rotaryTables(config: LlamaConfig, rows: number): RotaryTables {
  const half = config.headSize / 2;
  const cos = allocate(rows * half);
  const sin = allocate(rows * half);
  // (headSize / 2) of all positions up to `steadyRows`; each one beyond has frequencies of its own.
  let frequencies = frequenciesAt(config, 0);
  const steadyRows =
    config.ropeScaling?.kind === 'dynamic' ? config.ropeScaling.originalPositions : rows;
  for (let position = 0; position < rows; position += 1) {
    if (position >= steadyRows) frequencies = frequenciesAt(config, position);
    for (let i = 0; i < half; i += 1) {
      const angle = position * frequencies[i]!;
      cos[position * half + i] = Math.cos(angle);
      sin[position * half + i] = Math.sin(angle);
    }
  }
  return { cos, sin };
}

/** (headSize / 2) radians a position, of the token at this position. */
function frequenciesAt(config: LlamaConfig, position: number): Float64Array {
  const { headSize, ropeTheta, ropeScaling: scaling } = config;
  const plain = (base: number): Float64Array =>
    Float64Array.from({ length: headSize / 2 }, (_, i) => base ** ((-2 * i) / headSize));
  switch (scaling?.kind) {
    case undefined:
      return plain(ropeTheta);
    case 'linear':
      return plain(ropeTheta).map((frequency) => frequency / scaling.factor);
    case 'dynamic': {
      const { factor, originalPositions } = scaling;
      const length = Math.max(position + 1, originalPositions);
      // A head of one pair has one frequency, 1, whatever the base.
      if (headSize === 2) return plain(ropeTheta);
      const growth = (factor * length) / originalPositions - (factor - 1);
      return plain(ropeTheta * growth ** (headSize / (headSize - 2)));
    }
    case 'llama3': {
      const { factor, lowFrequencyFactor, highFrequencyFactor, originalPositions } = scaling;
      return plain(ropeTheta).map((frequency) => {
        // Turns that the channel makes within the original context.
        const turns = (originalPositions * frequency) / (2 * Math.PI);
        if (turns < lowFrequencyFactor) return frequency / factor;
        if (turns > highFrequencyFactor) return frequency;
        const share = (turns - lowFrequencyFactor) / (highFrequencyFactor - lowFrequencyFactor);
        return ((1 - share) * frequency) / factor + share * frequency;
      });
    }
  }
}
