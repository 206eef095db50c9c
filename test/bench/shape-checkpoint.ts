/** Checkpoints of a size without the weights: their files have headers and holes, and take no room. */
import fs from 'node:fs';
import path from 'node:path';
import type { LlamaConfig } from '../../model/config.js';
import { listSlices, planRanks, slicesOf } from '../../model/plan.js';
import { toHuggingFace } from '../random-checkpoint.js';

const llama2 = {
  vocabSize: 32_000,
  headSize: 128,
  maxPositions: 4096,
  normEps: 1e-5,
  ropeTheta: 10_000,
  isHeadTied: false,
} as const;

/** The published shapes of Llama 2. */
export const llama2Shapes = {
  '7b': {
    ...llama2,
    ...{ hiddenSize: 4096, ffnSize: 11_008, layerCount: 32, headCount: 32, kvHeadCount: 32 },
  },
  '13b': {
    ...llama2,
    ...{ hiddenSize: 5120, ffnSize: 13_824, layerCount: 40, headCount: 40, kvHeadCount: 40 },
  },
  '70b': {
    ...llama2,
    ...{ hiddenSize: 8192, ffnSize: 28_672, layerCount: 80, headCount: 64, kvHeadCount: 8 },
  },
} as const satisfies Record<string, LlamaConfig>;

/** Writes config.json and a file of float16 tensors that are all holes. */
export function writeShapeCheckpoint(folder: string, config: LlamaConfig): void {
  fs.mkdirSync(folder, { recursive: true });
  fs.writeFileSync(path.join(folder, 'config.json'), JSON.stringify(toHuggingFace(config, 'F16')));
  const header: Record<string, unknown> = {};
  let at = 0;
  for (const { tensor, shape } of listSlices(slicesOf(config, planRanks(config, 1)[0]!))) {
    const end = at + 2 * shape.reduce((a, b) => a * b, 1);
    header[tensor] = { dtype: 'F16', shape, data_offsets: [at, end] };
    at = end;
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const file = path.join(folder, 'model.safetensors');
  fs.writeFileSync(file, Buffer.concat([length, text]));
  fs.truncateSync(file, 8 + text.length + at);
}
