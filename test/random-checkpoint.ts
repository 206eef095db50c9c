/**
 * Checkpoints of random weights in Hugging Face layout, written tensor by tensor in constant memory. Weights are
 * scaled by their inputs, so that activations stay near 1 and logits between about -6 and 6.
 */
import fs from 'node:fs';
import path from 'node:path';
import type { LlamaConfig } from '../model/config.js';
import type { RopeScaling } from '../model/rope-scaling.js';
import { Random } from './random.js';

export interface RandomCheckpoint {
  readonly config: LlamaConfig;
  readonly seed: number;
  readonly format: 'F32' | 'F16' | 'BF16';
  /** Files; with more than one, an index names them. */
  readonly shardCount: number;
  /** Matrices have 16 values, and blocks of 32 the least of them: what 4 bits say exactly. */
  readonly isFourBit?: boolean;
}

/** A tensor to be written: uniform in centre ± spread. */
interface Plan {
  readonly name: string;
  readonly shape: readonly number[];
  readonly centre: number;
  readonly spread: number;
}

const BUFFER_ELEMENTS = 1 << 18;

/**
 * Writes config.json and the tensors into a folder, which is made.
 *
 * @returns bytes of all tensors.
 */
export function writeRandomCheckpoint(folder: string, checkpoint: RandomCheckpoint): number {
  const { config, format, shardCount } = checkpoint;
  fs.mkdirSync(folder, { recursive: true });
  fs.writeFileSync(
    path.join(folder, 'config.json'),
    JSON.stringify(toHuggingFace(config, format), null, 1),
  );
  const plans = planTensors(config);
  const perShard = Math.ceil(plans.length / shardCount);
  const weightMap: Record<string, string> = {};
  let byteCount = 0;
  for (let shard = 0; shard < shardCount; shard += 1) {
    const number = (n: number): string => String(n).padStart(5, '0');
    const file =
      shardCount === 1
        ? 'model.safetensors'
        : `model-${number(shard + 1)}-of-${number(shardCount)}.safetensors`;
    const inShard = plans.slice(shard * perShard, (shard + 1) * perShard);
    for (const { name } of inShard) weightMap[name] = file;
    byteCount += writeShard(path.join(folder, file), inShard, checkpoint);
  }
  if (shardCount > 1) {
    const index = { metadata: { total_size: byteCount }, weight_map: weightMap };
    fs.writeFileSync(path.join(folder, 'model.safetensors.index.json'), JSON.stringify(index));
  }
  return byteCount;
}

export const toHuggingFace = (config: LlamaConfig, format: RandomCheckpoint['format']) => ({
  architectures: ['LlamaForCausalLM'],
  model_type: 'llama',
  hidden_size: config.hiddenSize,
  intermediate_size: config.ffnSize,
  num_hidden_layers: config.layerCount,
  num_attention_heads: config.headCount,
  num_key_value_heads: config.kvHeadCount,
  head_dim: config.headSize,
  vocab_size: config.vocabSize,
  max_position_embeddings: config.maxPositions,
  rms_norm_eps: config.normEps,
  rope_theta: config.ropeTheta,
  ...(config.ropeScaling === undefined ? {} : { rope_scaling: scalingOf(config.ropeScaling) }),
  hidden_act: 'silu',
  tie_word_embeddings: config.isHeadTied,
  bos_token_id: 1,
  eos_token_id: 2,
  torch_dtype: { F32: 'float32', F16: 'float16', BF16: 'bfloat16' }[format],
});

/** In the spelling of transformers 4. */
function scalingOf(scaling: RopeScaling): object {
  const { kind, factor } = scaling;
  if (kind === 'linear') return { type: kind, factor };
  const original = { original_max_position_embeddings: scaling.originalPositions };
  if (kind === 'dynamic') return { rope_type: kind, factor, ...original };
  return {
    ...{ rope_type: kind, factor, ...original },
    low_freq_factor: scaling.lowFrequencyFactor,
    high_freq_factor: scaling.highFrequencyFactor,
  };
}

function planTensors(config: LlamaConfig): Plan[] {
  const { hiddenSize: hidden, ffnSize: ffn, vocabSize } = config;
  const query = config.headCount * config.headSize;
  const keyValue = config.kvHeadCount * config.headSize;
  /** A uniform ± s√3 has standard deviation s. */
  const matrix = (name: string, rows: number, columns: number, deviation: number): Plan => ({
    name: `${name}.weight`,
    shape: [rows, columns],
    centre: 0,
    spread: deviation * Math.sqrt(3),
  });
  const norm = (name: string): Plan => ({
    name: `${name}.weight`,
    shape: [hidden],
    centre: 1,
    spread: 0.2,
  });
  const headDeviation = 2 / Math.sqrt(hidden);
  return [
    matrix('model.embed_tokens', vocabSize, hidden, config.isHeadTied ? headDeviation : 1),
    ...Array.from({ length: config.layerCount }, (_, i) => {
      const layer = `model.layers.${i}`;
      return [
        norm(`${layer}.input_layernorm`),
        matrix(`${layer}.self_attn.q_proj`, query, hidden, 1 / Math.sqrt(hidden)),
        matrix(`${layer}.self_attn.k_proj`, keyValue, hidden, 1 / Math.sqrt(hidden)),
        matrix(`${layer}.self_attn.v_proj`, keyValue, hidden, 1 / Math.sqrt(hidden)),
        matrix(`${layer}.self_attn.o_proj`, hidden, query, 1 / Math.sqrt(query)),
        norm(`${layer}.post_attention_layernorm`),
        matrix(`${layer}.mlp.gate_proj`, ffn, hidden, 1 / Math.sqrt(hidden)),
        matrix(`${layer}.mlp.up_proj`, ffn, hidden, 1 / Math.sqrt(hidden)),
        // SiLU(gate) × up is about 0.6 in size.
        matrix(`${layer}.mlp.down_proj`, hidden, ffn, 1.5 / Math.sqrt(ffn)),
      ];
    }).flat(),
    norm('model.norm'),
    ...(config.isHeadTied ? [] : [matrix('lm_head', vocabSize, hidden, headDeviation)]),
  ];
}

function writeShard(file: string, plans: readonly Plan[], checkpoint: RandomCheckpoint): number {
  const { format } = checkpoint;
  const width = format === 'F32' ? 4 : 2;
  const header: Record<string, unknown> = { __metadata__: { format: 'pt' } };
  let byteCount = 0;
  for (const { name, shape } of plans) {
    const end = byteCount + width * shape.reduce((a, b) => a * b, 1);
    header[name] = { dtype: format, shape, data_offsets: [byteCount, end] };
    byteCount = end;
  }
  // Spaces after the JSON align the data, as the reference implementation does.
  const json = JSON.stringify(header);
  const text = Buffer.from(json.padEnd(Math.ceil(json.length / 8) * 8));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const descriptor = fs.openSync(file, 'w');
  try {
    fs.writeSync(descriptor, length);
    fs.writeSync(descriptor, text);
    for (const plan of plans) writeTensor(descriptor, plan, checkpoint);
  } finally {
    fs.closeSync(descriptor);
  }
  return byteCount;
}

function writeTensor(
  descriptor: number,
  { name, shape, centre, spread }: Plan,
  { format, seed, isFourBit = false }: RandomCheckpoint,
): void {
  const random = new Random(seed ^ hashOf(name));
  const total = shape.reduce((a, b) => a * b, 1);
  const floats = new Float32Array(Math.min(total, BUFFER_ELEMENTS));
  for (let done = 0; done < total; done += floats.length) {
    const count = Math.min(floats.length, total - done);
    if (isFourBit && shape.length === 2) {
      const step = 2 ** Math.round(Math.log2(spread / 8));
      for (let i = 0; i < count; i += 1) {
        floats[i] = step * (i % 32 === 0 ? -8 : random.below(16) - 8);
      }
    } else {
      for (let i = 0; i < count; i += 1) floats[i] = centre + spread * (2 * random.next() - 1);
    }
    writeWhole(descriptor, encode(floats.subarray(0, count), format));
  }
}

/** writeSync may write less than it was given. */
function writeWhole(descriptor: number, bytes: Uint8Array): void {
  for (let done = 0; done < bytes.length;) done += fs.writeSync(descriptor, bytes, done);
}

function encode(floats: Float32Array, format: RandomCheckpoint['format']): Uint8Array {
  if (format === 'F32') return new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength);
  const bits = new Uint32Array(floats.buffer, floats.byteOffset, floats.length);
  const halves = new Uint16Array(floats.length);
  for (let i = 0; i < halves.length; i += 1) {
    // Truncation is as good as rounding: what is written is what the checkpoint holds.
    halves[i] = format === 'BF16' ? bits[i]! >>> 16 : truncateToHalf(bits[i]!);
  }
  return new Uint8Array(halves.buffer);
}

/** Float32 bits to float16 bits; what is too small becomes zero. */
function truncateToHalf(bits: number): number {
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 0xff) - 112;
  return exponent <= 0 ? sign : sign | (exponent << 10) | ((bits >>> 13) & 0x3ff);
}

/** FNV-1a, so that a tensor is the same in whichever file and order it is written. */
function hashOf(name: string): number {
  let hash = 0x811c9dc5;
  for (const byte of Buffer.from(name)) hash = Math.imul(hash ^ byte, 0x01000193);
  return hash;
}
