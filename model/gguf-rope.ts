/**
 * How a GGUF file says that positions are stretched: keys of `llama.rope.scaling`, and for Llama 3.1 a tensor of divisors
 * of the frequencies, which llama.cpp's converter computes from config.json's parameters.
 */
import fs from 'node:fs';
import type { LlamaConfig } from './config.js';
import { formatOf } from './formats.js';
import type { GgufMetadata } from './gguf-metadata.js';
import type { RopeScaling } from './rope-scaling.js';
import { openForReading } from './safetensors.js';
import type { StoredTensor } from './stored-tensor.js';

/** Name of the tensor of divisors, (headSize / 2). */
export const ROPE_FACTORS = 'rope_freqs.weight';

/** Llama 3.1's own parameters, which its files do not repeat. */
const LLAMA3 = { lowFrequencyFactor: 1, highFrequencyFactor: 4, originalPositions: 8192 } as const;
const TOLERANCE = 1e-4;

/** @throws CaravanError `unsupported_model` for YaRN and others. */
export function readRopeScaling(metadata: GgufMetadata): RopeScaling | undefined {
  const kind = metadata.text('llama.rope.scaling.type');
  const old = metadata.number('llama.rope.scale_linear');
  const factor = metadata.number('llama.rope.scaling.factor') ?? old;
  if (kind !== undefined && kind !== 'none' && kind !== 'linear') {
    metadata.unsupported('llama.rope.scaling.type', kind, '"none" and "linear"');
  }
  if (kind === 'none' || factor === undefined || factor === 0 || factor === 1) return undefined;
  if (factor < 1) metadata.damaged('llama.rope.scaling.factor', `is ${factor}; the least is 1`);
  return { kind: 'linear', factor };
}

/**
 * The scaling whose divisors these are.
 *
 * @throws CaravanError `invalid_checkpoint` for a tensor of another shape, `unsupported_model` for other divisors.
 */
export function checkFrequencyFactors(
  metadata: GgufMetadata,
  config: LlamaConfig,
  tensor: StoredTensor,
): RopeScaling | undefined {
  const half = config.headSize / 2;
  if (tensor.format !== 'F32' || tensor.shape.join() !== String(half)) {
    const found = `${tensor.format} [${tensor.shape.join(', ')}]`;
    metadata.damaged(ROPE_FACTORS, `is ${found}; the head size needs F32 [${half}]`);
  }
  const divisors = readAll(tensor);
  if (divisors.every((divisor) => divisor === 1)) return config.ropeScaling;
  const factor = Math.max(...divisors);
  const expected = (i: number): number => {
    const frequency = config.ropeTheta ** (-i / half);
    const turns = (LLAMA3.originalPositions * frequency) / (2 * Math.PI);
    const span = LLAMA3.highFrequencyFactor - LLAMA3.lowFrequencyFactor;
    const share = Math.min(1, Math.max(0, (turns - LLAMA3.lowFrequencyFactor) / span));
    return 1 / ((1 - share) / factor + share);
  };
  const other = divisors.findIndex((d, i) => !(Math.abs(d / expected(i) - 1) < TOLERANCE));
  if (other !== -1 || config.ropeScaling !== undefined) {
    metadata.unsupported(ROPE_FACTORS, [...divisors], "Llama 3.1's, of 8192 positions, alone");
  }
  return { kind: 'llama3', factor, ...LLAMA3 };
}

function readAll(tensor: StoredTensor): Float32Array {
  const bytes = Buffer.alloc(tensor.byteCount);
  const descriptor = openForReading(tensor.file);
  try {
    // The file was found to hold it.
    fs.readSync(descriptor, bytes, 0, bytes.length, tensor.offset);
  } finally {
    fs.closeSync(descriptor);
  }
  const numbers = new Float32Array(tensor.shape[0]!);
  formatOf('F32')!.widen(bytes, 0, numbers.length, numbers, 0);
  return numbers;
}
