/** Checkpoints in GGUF, made of other layouts' as llama.cpp's converter and quantizer make them. */
import fs from 'node:fs';
import path from 'node:path';
import { openCheckpoint } from '../model/checkpoint.js';
import type { LlamaConfig } from '../model/config.js';
import { layerTensors } from '../model/plan.js';
import { parseSentencePieceModel } from '../model/sentencepiece.js';
import { BLOCK_ELEMENTS, toF16, toF32, toQ4_0, toQ8_0, type Quantizer } from './gguf-quantizers.js';
import { ggufBytes, value, valueTypes, type GgufContents, type GgufTensor } from './gguf-writer.js';
import { readWhole } from './whole-tensors.js';

const quantizers = { F32: toF32, F16: toF16, Q8_0: toQ8_0, Q4_0: toQ4_0 } as const;
type GgufFormat = keyof typeof quantizers;

export interface GgufSettings {
  /** Of matrices whose rows are whole blocks; the others, and vectors, are F32. */
  readonly format: GgufFormat;
  readonly version?: 2 | 3;
  readonly alignment?: number;
  /** Files; with more than one, `file` is the name of the whole. */
  readonly partCount?: number;
  /** Folder for the same numbers in Hugging Face's layout, for the oracle. */
  readonly numbersFolder?: string;
}

type Metadata = GgufContents['metadata'];

/**
 * Rewrites a checkpoint in Hugging Face's layout.
 *
 * @returns the files, in order.
 */
export async function rewriteAsGguf(
  file: string,
  from: string,
  settings: GgufSettings,
): Promise<string[]> {
  const checkpoint = openCheckpoint(from);
  const { config } = checkpoint;
  const { version = 3, alignment = 32, partCount = 1 } = settings;
  const numbers = new Map<string, { shape: readonly number[]; numbers: Float32Array }>();
  const tensors: GgufTensor[] = [];
  const whole = await readWhole(checkpoint);
  for (const { name, from: source, columns, isPaired } of ggufTensors(config)) {
    const floats = whole.get(source)!;
    const rows = floats.length / columns;
    const shape = name.includes('norm') ? [columns] : [rows, columns];
    const isQuantized = shape.length === 2 && columns % BLOCK_ELEMENTS === 0;
    const quantize: Quantizer = isQuantized ? quantizers[settings.format] : toF32;
    const quantized = quantize(floats);
    numbers.set(source, { shape, numbers: quantized.numbers });
    const stored = isPaired ? pairRows(floats, columns, config.headSize) : floats;
    const format = isQuantized ? settings.format : 'F32';
    tensors.push({ name, shape, format, bytes: quantize(stored).bytes });
  }
  if (settings.numbersFolder !== undefined) writeNumbers(settings.numbersFolder, from, numbers);
  const alignmentEntry: Metadata =
    alignment === 32 ? [] : [['general.alignment', value.uint32(alignment)]];
  const metadata = [...alignmentEntry, ...configMetadata(config), ...tokenizerMetadata(from)];
  if (partCount === 1) {
    fs.writeFileSync(file, ggufBytes({ version, alignment, metadata, tensors }));
    return [file];
  }
  return writeParts(file, { version, alignment, metadata, tensors }, partCount);
}

/** As llama.cpp's gguf-split does: the metadata is in the first part, the tensors are dealt in order. */
function writeParts(file: string, contents: GgufContents, partCount: number): string[] {
  const perPart = Math.ceil(contents.tensors.length / partCount);
  return Array.from({ length: partCount }, (_, i) => {
    const part = partFile(file, i, partCount);
    const split: Metadata = [
      ['split.no', value.uint16(i)],
      ['split.count', value.uint16(partCount)],
      ['split.tensors.count', value.int32(contents.tensors.length)],
    ];
    const metadata = i === 0 ? [...contents.metadata, ...split] : split;
    const tensors = contents.tensors.slice(i * perPart, (i + 1) * perPart);
    const alignment: Metadata =
      i === 0 ? [] : contents.metadata.filter(([key]) => key === 'general.alignment');
    const bytes = ggufBytes({ ...contents, metadata: [...alignment, ...metadata], tensors });
    fs.writeFileSync(part, bytes);
    return part;
  });
}

/** NAME-00001-of-00003.gguf for the first of three. */
export function partFile(file: string, index: number, partCount: number): string {
  const digits = (n: number): string => String(n).padStart(5, '0');
  return file.replace(/\.gguf$/, `-${digits(index + 1)}-of-${digits(partCount)}.gguf`);
}

interface NamedTensor {
  readonly name: string;
  /** Hugging Face's. */
  readonly from: string;
  readonly columns: number;
  readonly isPaired: boolean;
}

function ggufTensors(config: LlamaConfig): NamedTensor[] {
  const { hiddenSize: hidden, ffnSize: ffn, headCount, headSize, isHeadTied } = config;
  const tensor = (name: string, from: string, columns: number, isPaired = false): NamedTensor => ({
    ...{ name: `${name}.weight`, from, columns, isPaired },
  });
  return [
    tensor('token_embd', 'model.embed_tokens.weight', hidden),
    ...Array.from({ length: config.layerCount }, (_, i) => {
      const names = layerTensors(i);
      return [
        tensor(`blk.${i}.attn_norm`, names.attentionNorm, hidden),
        tensor(`blk.${i}.attn_q`, names.q, hidden, true),
        tensor(`blk.${i}.attn_k`, names.k, hidden, true),
        tensor(`blk.${i}.attn_v`, names.v, hidden),
        tensor(`blk.${i}.attn_output`, names.o, headCount * headSize),
        tensor(`blk.${i}.ffn_norm`, names.ffnNorm, hidden),
        tensor(`blk.${i}.ffn_gate`, names.gate, hidden),
        tensor(`blk.${i}.ffn_up`, names.up, hidden),
        tensor(`blk.${i}.ffn_down`, names.down, ffn),
      ];
    }).flat(),
    tensor('output_norm', 'model.norm.weight', hidden),
    ...(isHeadTied ? [] : [tensor('output', 'lm_head.weight', hidden)]),
  ];
}

/** The converter's order of the rows of q and k: row 2j + h of a head is row h × headSize / 2 + j of the halves. */
function pairRows(floats: Float32Array, columns: number, headSize: number): Float32Array {
  const paired = new Float32Array(floats.length);
  for (let row = 0; row < floats.length / columns; row += 1) {
    const within = row % headSize;
    const from = row - within + (within % 2) * (headSize / 2) + Math.floor(within / 2);
    paired.set(floats.subarray(from * columns, (from + 1) * columns), row * columns);
  }
  return paired;
}

function configMetadata(config: LlamaConfig): Metadata {
  const { headCount, headSize, hiddenSize } = config;
  const sizes = {
    ...{ context_length: config.maxPositions, embedding_length: hiddenSize },
    ...{ block_count: config.layerCount, feed_forward_length: config.ffnSize },
    ...{ 'attention.head_count': headCount, 'attention.head_count_kv': config.kvHeadCount },
    ...{ 'rope.dimension_count': headSize, vocab_size: config.vocabSize },
    ...(headCount * headSize === hiddenSize
      ? {}
      : { 'attention.key_length': headSize, 'attention.value_length': headSize }),
  };
  return [
    ['general.architecture', value.text('llama')],
    ['general.name', value.text('A model, rewritten')],
    ...Object.entries(sizes).map(([key, size]) => [`llama.${key}`, value.uint32(size)] as const),
    ['llama.attention.layer_norm_rms_epsilon', value.float32(config.normEps)],
    ['llama.rope.freq_base', value.float32(config.ropeTheta)],
  ];
}

/** Of tokenizer.model, where there is one. */
function tokenizerMetadata(from: string): Metadata {
  const file = path.join(from, 'tokenizer.model');
  if (!fs.existsSync(file)) return [];
  const model = parseSentencePieceModel(fs.readFileSync(file), file);
  const { text, float32, int32 } = valueTypes;
  const { pieces } = model;
  return [
    ['tokenizer.ggml.model', value.text('llama')],
    [
      'tokenizer.ggml.tokens',
      value.list(
        text,
        pieces.map((piece) => value.text(piece.text)),
      ),
    ],
    [
      'tokenizer.ggml.scores',
      value.list(
        float32,
        pieces.map(({ score }) => value.float32(score)),
      ),
    ],
    [
      'tokenizer.ggml.token_type',
      value.list(
        int32,
        pieces.map(({ type }) => value.int32(type)),
      ),
    ],
    ['tokenizer.ggml.bos_token_id', value.uint32(model.bosTokenId)],
    ['tokenizer.ggml.eos_token_id', value.uint32(model.eosTokenId)],
    ['tokenizer.ggml.unknown_token_id', value.uint32(model.unknownTokenId)],
    ['tokenizer.ggml.add_bos_token', value.flag(true)],
    ['tokenizer.ggml.add_eos_token', value.flag(false)],
    ['tokenizer.ggml.add_space_prefix', value.flag(model.addsDummyPrefix)],
    ['tokenizer.ggml.remove_extra_whitespaces', value.flag(model.removesExtraSpaces)],
  ];
}

/** A checkpoint of F32 in Hugging Face's layout: `from` with other numbers. */
function writeNumbers(
  folder: string,
  from: string,
  tensors: ReadonlyMap<string, { shape: readonly number[]; numbers: Float32Array }>,
): void {
  fs.mkdirSync(folder, { recursive: true });
  fs.copyFileSync(path.join(from, 'config.json'), path.join(folder, 'config.json'));
  const header: Record<string, unknown> = {};
  let end = 0;
  for (const [name, { shape, numbers }] of tensors) {
    const begin = end;
    end += numbers.byteLength;
    header[name] = { dtype: 'F32', shape, data_offsets: [begin, end] };
  }
  const json = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  const data = [...tensors.values()].map(({ numbers }) => toF32(numbers).bytes);
  fs.writeFileSync(path.join(folder, 'model.safetensors'), Buffer.concat([length, json, ...data]));
}
