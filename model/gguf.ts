/**
 * Checkpoints in GGUF: one file, or the parts NAME-00001-of-0000N.gguf of one. Everything is in them: the configuration
 * and the tokenizer are metadata. Keys and tensor names are those of ggml's docs/gguf.md and llama.cpp's gguf-py.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import type { Checkpoint } from './checkpoint.js';
import { checkConfig, type LlamaConfig } from './config.js';
import { readGgufFile, type GgufFile } from './gguf-file.js';
import type { GgufMetadata } from './gguf-metadata.js';
import { checkFrequencyFactors, readRopeScaling, ROPE_FACTORS } from './gguf-rope.js';
import { ggufTokenizerFiles } from './gguf-tokenizer.js';
import { layerTensors } from './plan.js';
import { wholeTensor, type TensorSource } from './stored-tensor.js';

/** By its name, or because it is a file: the other layouts are folders, and mounted files may have any name. */
export const isGguf = (model: string): boolean =>
  model.toLowerCase().endsWith('.gguf') ||
  fs.statSync(model, { throwIfNoEntry: false })?.isFile() === true;

/**
 * Reads the headers only, of every part.
 *
 * @param model one file, or any part of a split one.
 * @throws CaravanError `invalid_checkpoint` or `unsupported_model`, naming file, key or tensor, and rule.
 */
export function openGguf(model: string): Checkpoint {
  const parts = readParts(model);
  const { metadata } = parts[0]!;
  const stored = new Map(parts.flatMap(({ tensors }) => [...tensors]));
  const config = configOf(metadata, stored.has('output.weight'));
  const factors = stored.get(ROPE_FACTORS);
  const scaling =
    factors === undefined ? config.ropeScaling : checkFrequencyFactors(metadata, config, factors);
  const tensors = new Map<string, TensorSource>();
  for (const [name, tensor] of stored) {
    if (name === ROPE_FACTORS) continue;
    const { key, headed } = networkName(name, config.layerCount);
    if (key === undefined) {
      metadata.unsupported(name, 'no tensor of a Llama', 'networks of its tensors alone');
    } else {
      const pairedHeadSize = headed ? config.headSize : null;
      tensors.set(key, { ...wholeTensor(tensor), pairedHeadSize });
    }
  }
  const hash = createHash('sha256');
  for (const { headerBytes } of parts) hash.update(headerBytes);
  const first = parts[0]!.file;
  return {
    path: first,
    layout: 'gguf',
    config: scaling === undefined ? config : { ...config, ropeScaling: scaling },
    tensors,
    digest: hash.digest('hex'),
    localStamp: parts.map(({ file }) => stampOf(file)).join('\n'),
    headerBytes: parts.reduce((sum, { headerBytes }) => sum + headerBytes.length, 0),
    // Read again, since a vocabulary takes much more memory than the rest.
    readTokenizerFiles: () => ggufTokenizerFiles(readGgufFile(first).metadata),
  };
}

function stampOf(file: string): string {
  const { size, mtimeMs } = fs.statSync(file);
  return `${file} ${size} ${mtimeMs}`;
}

const partName = /^(.*)-(\d{5})-of-(\d{5})\.gguf$/i;

/** In order. */
function readParts(model: string): GgufFile[] {
  const named = partName.exec(path.basename(model));
  const opened = readGgufFile(model);
  const count = opened.metadata.natural('split.count') ?? 0;
  if (count <= 1 && Number(named?.[3] ?? 1) <= 1) return [opened];
  if (named === null || Number(named[3]) !== count) {
    return opened.metadata.damaged(
      'split.count',
      `is ${count}, and the file's name must end in -0000K-of-${String(count).padStart(5, '0')}.gguf`,
    );
  }
  const extension = path.extname(model);
  const parts = Array.from({ length: count }, (_, i) => {
    const number = String(i + 1).padStart(5, '0');
    const name = `${named[1]}-${number}-of-${named[3]}${extension}`;
    const file = path.join(path.dirname(model), name);
    const part = file === model ? opened : readGgufFile(file);
    const { metadata } = part;
    const [no, ofCount] = [metadata.natural('split.no'), metadata.natural('split.count')];
    if (no !== i) metadata.damaged('split.no', `is ${no ?? 'missing'}; this name needs ${i}`);
    if (ofCount !== count) {
      metadata.damaged('split.count', `is ${ofCount ?? 'missing'}; other parts have ${count}`);
    }
    return part;
  });
  const names = parts.flatMap(({ tensors }) => [...tensors.keys()]);
  const { metadata } = parts[0]!;
  const twice = names.find((name, i) => names.indexOf(name) !== i);
  if (twice !== undefined) metadata.damaged(twice, 'is in two parts');
  const promised = metadata.natural('split.tensors.count');
  if (promised !== undefined && promised !== names.length) {
    metadata.damaged('split.tensors.count', `is ${promised}; the parts hold ${names.length}`);
  }
  return parts;
}

function configOf(metadata: GgufMetadata, hasHead: boolean): LlamaConfig {
  const architecture = metadata.text('general.architecture');
  if (metadata.need('general.architecture', architecture) !== 'llama') {
    metadata.unsupported('general.architecture', architecture, '"llama"');
  }
  const size = (key: string, fallback?: number): number => {
    const value = metadata.need(`llama.${key}`, metadata.perLayer(`llama.${key}`) ?? fallback);
    return value > 0 ? value : metadata.damaged(`llama.${key}`, 'must be above 0');
  };
  const above0 = (key: string, fallback?: number): number => {
    const value = metadata.need(`llama.${key}`, metadata.number(`llama.${key}`) ?? fallback);
    return value > 0 ? value : metadata.damaged(`llama.${key}`, 'must be above 0');
  };
  for (const [key, neutral] of NEUTRAL) {
    const value = metadata.number(`llama.${key}`) ?? neutral;
    if (value !== neutral) metadata.unsupported(`llama.${key}`, value, `${neutral}`);
  }
  const hiddenSize = size('embedding_length');
  const headCount = size('attention.head_count');
  const headSize = size('attention.key_length', hiddenSize / headCount);
  const valueLength = size('attention.value_length', headSize);
  if (valueLength !== headSize) {
    metadata.unsupported('llama.attention.value_length', valueLength, `the key's, ${headSize}`);
  }
  const rotated = size('rope.dimension_count', headSize);
  if (rotated !== headSize) {
    metadata.unsupported('llama.rope.dimension_count', rotated, `the head size, ${headSize}`);
  }
  const context = size('context_length');
  const scaling = readRopeScaling(metadata);
  const config: LlamaConfig = {
    hiddenSize,
    ffnSize: size('feed_forward_length'),
    layerCount: size('block_count'),
    headCount,
    kvHeadCount: size('attention.head_count_kv', headCount),
    headSize,
    vocabSize: size('vocab_size', metadata.texts('tokenizer.ggml.tokens')?.length),
    // Within a sliding window attention sees everything, as Llama's does.
    maxPositions: Math.min(context, metadata.natural('llama.attention.sliding_window') || context),
    normEps: above0('attention.layer_norm_rms_epsilon'),
    ropeTheta: above0('rope.freq_base', 10000),
    ...(scaling === undefined ? {} : { ropeScaling: scaling }),
    isHeadTied: !hasHead,
  };
  checkConfig(config, 'metadata');
  return config;
}

/** Keys that change the network unless they have this value. */
const NEUTRAL: readonly (readonly [key: string, neutral: number])[] = [
  ['expert_count', 0],
  ['expert_used_count', 0],
  ['attention.clamp_kqv', 0],
  ['attention.max_alibi_bias', 0],
  ['logit_scale', 1],
  ['residual_scale', 1],
  ['embedding_scale', 1],
];

const outside: Readonly<Record<string, string>> = {
  'token_embd.weight': 'model.embed_tokens.weight',
  'output_norm.weight': 'model.norm.weight',
  'output.weight': 'lm_head.weight',
};

const inLayer: Readonly<Record<string, keyof ReturnType<typeof layerTensors>>> = {
  attn_norm: 'attentionNorm',
  attn_q: 'q',
  attn_k: 'k',
  attn_v: 'v',
  attn_output: 'o',
  ffn_norm: 'ffnNorm',
  ffn_gate: 'gate',
  ffn_up: 'up',
  ffn_down: 'down',
};

/** Hugging Face's name; undefined for what no Llama has. Rows of q and k are stored in rotary pairs. */
function networkName(name: string, layerCount: number): { key?: string; headed: boolean } {
  if (Object.hasOwn(outside, name)) return { key: outside[name]!, headed: false };
  const [, layer, part] = /^blk\.(0|[1-9]\d{0,5})\.([a-z_]+)\.weight$/.exec(name) ?? [];
  if (part === undefined || !Object.hasOwn(inLayer, part)) return { headed: false };
  if (Number(layer) >= layerCount) return { headed: false };
  const key = inLayer[part]!;
  return { key: layerTensors(Number(layer))[key], headed: key === 'q' || key === 'k' };
}
