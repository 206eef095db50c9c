/** Checkpoints in Meta's layout: other layouts' rewritten, and holes in the real shapes. */
import fs from 'node:fs';
import path from 'node:path';
import { openCheckpoint } from '../model/checkpoint.js';
import type { LlamaConfig } from '../model/config.js';
import { ffnSizeOf } from '../model/meta-params.js';
import { layerTensors } from '../model/plan.js';
import { writePth, type PthStorage, type PthTensor } from './pth-writer.js';
import { readWhole } from './whole-tensors.js';

type Format = PthStorage['format'];

interface MetaTensor {
  readonly name: string;
  readonly from: string;
  readonly shape: readonly number[];
  /** Along which it is cut; null for tensors that every file has whole. */
  readonly axis: 0 | 1 | null;
  readonly isPaired: boolean;
}

/** By the reference implementation's layers. */
function metaTensors(config: LlamaConfig): MetaTensor[] {
  const { hiddenSize: hidden, ffnSize: ffn, vocabSize, headSize } = config;
  const query = config.headCount * headSize;
  const keyValue = config.kvHeadCount * headSize;
  const tensor = (
    name: string,
    from: string,
    shape: readonly number[],
    axis: 0 | 1 | null,
    isPaired = false,
  ): MetaTensor => ({ name: `${name}.weight`, from, shape, axis, isPaired });
  return [
    tensor('tok_embeddings', 'model.embed_tokens.weight', [vocabSize, hidden], 1),
    ...Array.from({ length: config.layerCount }, (_, i) => {
      const names = layerTensors(i);
      const layer = `layers.${i}`;
      return [
        tensor(`${layer}.attention.wq`, names.q, [query, hidden], 0, true),
        tensor(`${layer}.attention.wk`, names.k, [keyValue, hidden], 0, true),
        tensor(`${layer}.attention.wv`, names.v, [keyValue, hidden], 0),
        tensor(`${layer}.attention.wo`, names.o, [hidden, query], 1),
        tensor(`${layer}.feed_forward.w1`, names.gate, [ffn, hidden], 0),
        tensor(`${layer}.feed_forward.w2`, names.down, [hidden, ffn], 1),
        tensor(`${layer}.feed_forward.w3`, names.up, [ffn, hidden], 0),
        tensor(`${layer}.attention_norm`, names.attentionNorm, [hidden], null),
        tensor(`${layer}.ffn_norm`, names.ffnNorm, [hidden], null),
      ];
    }).flat(),
    tensor('norm', 'model.norm.weight', [hidden], null),
    tensor('output', 'lm_head.weight', [vocabSize, hidden], 0),
  ];
}

/** Rows and columns of piece `index` of `count`. */
function pieceOf({ shape, axis }: MetaTensor, count: number, index: number) {
  const [rows, columns] = shape.length === 1 ? [1, shape[0]!] : (shape as [number, number]);
  if (axis === null) return { rows, columns, firstRow: 0, firstColumn: 0 };
  if (axis === 0) {
    const own = rows / count;
    return { rows: own, columns, firstRow: index * own, firstColumn: 0 };
  }
  const own = columns / count;
  return { rows, columns: own, firstRow: 0, firstColumn: index * own };
}

/**
 * Rewrites a checkpoint as `mp` files. Without `isTransposed` as Meta's; with it, each matrix lies column by column
 * and is a transposed view, and all tensors of a file share one storage.
 */
export async function rewriteAsMeta(
  folder: string,
  from: string,
  mp: number,
  format: Format,
  isTransposed = false,
): Promise<void> {
  const checkpoint = openCheckpoint(from);
  const { config } = checkpoint;
  fs.mkdirSync(folder, { recursive: true });
  writeParams(folder, config, -1);
  fs.copyFileSync(path.join(from, 'tokenizer.model'), path.join(folder, 'tokenizer.model'));
  const tensors = metaTensors(config);
  const whole = await readWhole(checkpoint);
  for (let index = 0; index < mp; index += 1) {
    const views = tensors.map((tensor, number) => {
      const floats = cutOut(tensor, whole.get(tensor.from)!, mp, index, config.headSize);
      const { rows, columns } = pieceOf(tensor, mp, index);
      return { tensor, number, floats, rows, columns };
    });
    const pieces = views.map(({ tensor, number, floats, rows, columns }): PthTensor => {
      const isFlipped = isTransposed && tensor.shape.length === 2;
      const bytes = encode(isFlipped ? transpose(floats, rows, columns) : floats, format);
      const shape = tensor.shape.length === 1 ? [columns] : [rows, columns];
      const storage = { key: String(number), format, elementCount: floats.length, bytes };
      return { name: tensor.name, storage, shape, ...(isFlipped ? { strides: [1, rows] } : {}) };
    });
    writePth(pieceFile(folder, index), isTransposed ? shareStorage(pieces) : pieces);
  }
}

const pieceFile = (folder: string, index: number): string =>
  path.join(folder, `consolidated.${String(index).padStart(2, '0')}.pth`);

/** One storage for all, in which each tensor starts where the one before ended. */
function shareStorage(pieces: readonly PthTensor[]): PthTensor[] {
  const { format } = pieces[0]!.storage;
  const bytes = Buffer.concat(pieces.map(({ storage }) => storage.bytes!));
  const elementCount = pieces.reduce((sum, { storage }) => sum + storage.elementCount, 0);
  const shared = { key: '0', format, elementCount, bytes };
  let start = 0;
  return pieces.map((piece) => {
    const view = { ...piece, storage: shared, start };
    start += piece.storage.elementCount;
    return view;
  });
}

function cutOut(
  tensor: MetaTensor,
  whole: Float32Array,
  mp: number,
  index: number,
  headSize: number,
): Float32Array {
  const { rows, columns, firstRow, firstColumn } = pieceOf(tensor, mp, index);
  const width = tensor.shape.at(-1)!;
  const floats = new Float32Array(rows * columns);
  for (let row = 0; row < rows; row += 1) {
    let from = firstRow + row;
    if (tensor.isPaired) {
      // Meta's row 2j + h of a head is row h × headSize / 2 + j of the halves.
      const within = from % headSize;
      from += (within % 2) * (headSize / 2) + Math.floor(within / 2) - within;
    }
    const at = from * width + firstColumn;
    floats.set(whole.subarray(at, at + columns), row * columns);
  }
  return floats;
}

function transpose(floats: Float32Array, rows: number, columns: number): Float32Array {
  return floats.map((_, i) => floats[(i % rows) * columns + Math.floor(i / rows)]!);
}

/** BF16 is rounded to even; F16 is for values that have no more bits than it. */
function encode(floats: Float32Array, format: Format): Uint8Array {
  if (format === 'F32') return new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength);
  const bits = new Uint32Array(floats.buffer, floats.byteOffset, floats.length);
  const halves = Uint16Array.from(bits, (b) => {
    if (format === 'BF16') return (b + 0x7fff + ((b >>> 16) & 1)) >>> 16;
    const exponent = ((b >>> 23) & 0xff) - 112;
    const sign = (b >>> 16) & 0x8000;
    if (exponent > 0) return sign | (exponent << 10) | ((b >>> 13) & 0x3ff);
    // Subnormal: the leading one is no longer implied.
    return sign | (exponent < -10 ? 0 : ((b & 0x7fffff) | 0x800000) >>> (14 - exponent));
  });
  return new Uint8Array(halves.buffer);
}

export interface MetaParams {
  readonly dim: number;
  readonly n_layers: number;
  readonly n_heads: number;
  readonly n_kv_heads?: number;
  readonly multiple_of: number;
  readonly ffn_dim_multiplier?: number;
  readonly norm_eps: number;
  readonly vocab_size: number;
}

function writeParams(folder: string, config: LlamaConfig, vocabSize: number): void {
  const multiple = Array.from({ length: config.ffnSize }, (_, i) => i + 1).find(
    (m) => ffnSizeOf(config.hiddenSize, m, null) === config.ffnSize,
  );
  if (multiple === undefined) throw new Error(`no multiple_of gives ${config.ffnSize}`);
  const params: MetaParams = {
    ...{ dim: config.hiddenSize, n_layers: config.layerCount, n_heads: config.headCount },
    ...{ n_kv_heads: config.kvHeadCount, multiple_of: multiple, norm_eps: config.normEps },
    vocab_size: vocabSize,
  };
  fs.writeFileSync(path.join(folder, 'params.json'), JSON.stringify(params));
}

/** Holes of bfloat16 in the shapes of `config`, which is what `params` leads to. */
export function writeSparseMeta(
  folder: string,
  params: MetaParams,
  config: LlamaConfig,
  mp: number,
): void {
  fs.mkdirSync(folder, { recursive: true });
  fs.writeFileSync(path.join(folder, 'params.json'), JSON.stringify(params));
  for (let index = 0; index < mp; index += 1) {
    const tensors = metaTensors(config).map((tensor, number): PthTensor => {
      const { rows, columns } = pieceOf(tensor, mp, index);
      const storage = {
        key: String(number),
        format: 'BF16' as const,
        elementCount: rows * columns,
      };
      return {
        name: tensor.name,
        storage,
        shape: tensor.shape.length === 1 ? [columns] : [rows, columns],
      };
    });
    const frequencies = config.headSize / 2;
    const storage = { key: 'freqs', format: 'BF16' as const, elementCount: frequencies };
    tensors.push({ name: 'rope.freqs', storage, shape: [frequencies] });
    writePth(pieceFile(folder, index), tensors);
  }
}
