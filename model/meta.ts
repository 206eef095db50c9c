/**
 * Checkpoints in the layout of Meta's download: params.json beside consolidated.00.pth and its like, one a rank of the
 * reference implementation. The pieces of a tensor are joined, so that they can be cut anew for any number of ranks.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import type { Checkpoint } from './checkpoint.js';
import type { LlamaConfig } from './config.js';
import { parseMetaParams } from './meta-params.js';
import { layerTensors } from './plan.js';
import { readPthFile, type PthFile } from './pth.js';
import { parseSentencePieceModel } from './sentencepiece.js';
import type { StoredTensor, TensorSource } from './stored-tensor.js';
import { readFolderTokenizer } from './tokenizer-files.js';

const pieceName = /^consolidated\.(\d{2,3})\.pth$/;

/** Whether a folder is of this layout and of no other. */
export const isMeta = (folder: string): boolean =>
  fs.existsSync(path.join(folder, 'params.json')) &&
  !fs.existsSync(path.join(folder, 'config.json'));

/**
 * Reads headers, pickles and, for a vocab_size of -1, the tokenizer.
 *
 * @throws CaravanError `invalid_checkpoint` or `unsupported_model`, naming file, field or tensor, and rule.
 */
export function openMeta(folder: string): Checkpoint {
  const paramsText = fs.readFileSync(path.join(folder, 'params.json'), 'utf8');
  const config = parseMetaParams(paramsText, 'params.json', () => countPieces(folder));
  const files = listPieces(folder);
  const pieces = files.map((file) => ({ file, pth: readPthFile(file) }));
  const hash = createHash('sha256').update(paramsText).update(String(config.vocabSize));
  for (const { file, pth } of pieces) {
    hash.update(path.basename(file));
    for (const bytes of pth.header) hash.update(bytes);
  }
  const pickled = pieces.reduce((sum, { pth }) => sum + pth.headerBytes, 0);
  return {
    path: folder,
    layout: 'meta',
    config,
    tensors: joinTensors(config, pieces),
    digest: hash.digest('hex'),
    localStamp: files.map(stampOf).join('\n'),
    headerBytes: Buffer.byteLength(paramsText) + pickled,
    readTokenizerFiles: () => readFolderTokenizer(folder),
  };
}

function stampOf(file: string): string {
  const { size, mtimeMs } = fs.statSync(file);
  return `${file} ${size} ${mtimeMs}`;
}

/** Pieces of the tokenizer's vocabulary. */
function countPieces(folder: string): number {
  const model = readFolderTokenizer(folder).get('tokenizer.model');
  if (model === undefined) {
    throw damaged(
      'params.json: vocab_size is -1, which means the tokenizer’s, and tokenizer.model is neither in ' +
        `${folder} nor one folder above`,
    );
  }
  return parseSentencePieceModel(model, 'tokenizer.model').pieces.length;
}

/** The .pth files, in order. */
function listPieces(folder: string): string[] {
  const numbers = fs
    .readdirSync(folder)
    .flatMap((name) => pieceName.exec(name)?.[1] ?? [])
    .sort((a, b) => Number(a) - Number(b));
  if (numbers.length === 0) throw damaged(`${folder}: has no consolidated.00.pth`);
  numbers.forEach((number, i) => {
    if (Number(number) !== i) {
      throw damaged(`consolidated.${String(i).padStart(2, '0')}.pth: is missing in ${folder}`);
    }
  });
  return numbers.map((number) => path.join(folder, `consolidated.${number}.pth`));
}

interface Piece {
  readonly file: string;
  readonly pth: PthFile;
}

/** How the reference implementation cuts a tensor: not at all, or along an axis. */
interface Cut {
  readonly tensor: string;
  readonly axis: 0 | 1 | null;
  readonly isPaired?: boolean;
}

/** By Meta's names. Its layers are ColumnParallelLinear (rows of the weight) and RowParallelLinear (columns). */
function cutsOf(config: LlamaConfig): Map<string, Cut> {
  const cuts: [string, Cut][] = [
    ['tok_embeddings.weight', { tensor: 'model.embed_tokens.weight', axis: 1 }],
    ['norm.weight', { tensor: 'model.norm.weight', axis: null }],
    ['output.weight', { tensor: 'lm_head.weight', axis: 0 }],
  ];
  for (let layer = 0; layer < config.layerCount; layer += 1) {
    const names = layerTensors(layer);
    const prefix = `layers.${layer}`;
    cuts.push(
      [`${prefix}.attention_norm.weight`, { tensor: names.attentionNorm, axis: null }],
      [`${prefix}.attention.wq.weight`, { tensor: names.q, axis: 0, isPaired: true }],
      [`${prefix}.attention.wk.weight`, { tensor: names.k, axis: 0, isPaired: true }],
      [`${prefix}.attention.wv.weight`, { tensor: names.v, axis: 0 }],
      [`${prefix}.attention.wo.weight`, { tensor: names.o, axis: 1 }],
      [`${prefix}.ffn_norm.weight`, { tensor: names.ffnNorm, axis: null }],
      [`${prefix}.feed_forward.w1.weight`, { tensor: names.gate, axis: 0 }],
      [`${prefix}.feed_forward.w3.weight`, { tensor: names.up, axis: 0 }],
      [`${prefix}.feed_forward.w2.weight`, { tensor: names.down, axis: 1 }],
    );
  }
  return new Map(cuts);
}

function joinTensors(config: LlamaConfig, pieces: readonly Piece[]): Map<string, TensorSource> {
  const cuts = cutsOf(config);
  refuseOtherTensors(cuts, pieces);
  refuseMissingPieces(config, pieces);
  const tensors = new Map<string, TensorSource>();
  for (const [name, cut] of cuts) {
    const holders = cut.axis === null ? pieces.slice(0, 1) : pieces;
    const stored = holders.map((piece) => {
      const tensor = piece.pth.tensors.get(name);
      if (tensor !== undefined) return tensor;
      throw damaged(`${path.basename(piece.file)}: ${name}: the tensor is missing`);
    });
    const first = stored[0]!;
    for (const tensor of stored) refuseOtherShape(name, cut, first, tensor);
    if (cut.isPaired === true) refuseCutHeads(name, config.headSize, stored);
    tensors.set(cut.tensor, {
      pieces: stored,
      axis: cut.axis ?? 0,
      pairedHeadSize: cut.isPaired === true ? config.headSize : null,
    });
  }
  return tensors;
}

/** rope.freqs is a table of what params.json says already. */
function refuseOtherTensors(cuts: ReadonlyMap<string, Cut>, pieces: readonly Piece[]): void {
  for (const { file, pth } of pieces) {
    for (const name of pth.tensors.keys()) {
      if (cuts.has(name) || name === 'rope.freqs') continue;
      throw new CaravanError(
        'unsupported_model',
        `${path.basename(file)}: ${name}: no tensor of a Llama 2 with the layers of params.json`,
      );
    }
  }
}

/** The first file's share of the query heads tells how many files there must be. */
function refuseMissingPieces(config: LlamaConfig, pieces: readonly Piece[]): void {
  const [rows] = pieces[0]!.pth.tensors.get('layers.0.attention.wq.weight')?.shape ?? [];
  if (rows === undefined || rows === 0) return;
  const count = (config.headCount * config.headSize) / rows;
  if (Number.isInteger(count) && count !== pieces.length) {
    throw damaged(
      `has ${pieces.length} of the ${count} files consolidated.NN.pth that its tensors are cut into`,
    );
  }
}

/** Pieces differ along the axis of the cut at most. */
function refuseOtherShape(name: string, cut: Cut, first: StoredTensor, tensor: StoredTensor): void {
  const across = (shape: readonly number[]): string =>
    shape.filter((_, i) => i !== cut.axis).join();
  const dimensions = cut.axis === null ? 1 : 2;
  if (tensor.shape.length === dimensions && across(tensor.shape) === across(first.shape)) return;
  const rule =
    tensor.shape.length === dimensions
      ? `that of ${path.basename(first.file)} is [${first.shape.join(', ')}]`
      : `it must have ${dimensions} dimensions`;
  throw damaged(
    `${path.basename(tensor.file)}: ${name}: shape is [${tensor.shape.join(', ')}]; ${rule}`,
  );
}

/** Rotary pairs are exchanged within a head, which must therefore lie in one file. */
function refuseCutHeads(name: string, headSize: number, stored: readonly StoredTensor[]): void {
  for (const { file, shape } of stored) {
    if (shape[0]! % headSize === 0) continue;
    throw damaged(
      `${path.basename(file)}: ${name}: has ${shape[0]!} rows, which are not whole heads of ${headSize}`,
    );
  }
}

const damaged = (message: string): CaravanError => new CaravanError('invalid_checkpoint', message);
