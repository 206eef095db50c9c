/**
 * Where a tensor of the network lies on disk. Every layout's reader describes its tensors in these terms, under
 * the names of Hugging Face's layout; `slice-reader` reads them.
 *
 *   tensor ─ piece 0 (file, offset) ┐
 *          ─ piece 1                ├ joined along an axis, each row by row in a storage format
 *          ─ …                      ┘
 */
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { formatNames, formatOf, type StorageFormat } from './formats.js';
import type { Range, TensorSlice } from './plan.js';

/** One tensor as it lies in a file. */
export interface StoredTensor {
  readonly file: string;
  /** A name of `formats`, or one that Caravan cannot read. */
  readonly format: string;
  /** [rows, columns], or [columns]. */
  readonly shape: readonly number[];
  /** First byte in the file. */
  readonly offset: number;
  readonly byteCount: number;
  /** Elements from a row, and from a column, to the next; rows without gaps if left out. */
  readonly strides?: readonly [number, number];
}

/** A tensor of the network: one stored tensor, or several joined. */
export interface TensorSource {
  /** At least one, in order. */
  readonly pieces: readonly StoredTensor[];
  /** Axis along which the pieces are joined; 1 for columns. */
  readonly axis: 0 | 1;
  /**
   * Rows of a head, where the file stores the rotary pairs of a head as neighbouring rows (2j, 2j + 1); null where
   * it stores them as halves (j, headSize / 2 + j), as the network wants them, and for all other tensors.
   */
  readonly pairedHeadSize: number | null;
}

/** A stored tensor that is a tensor of the network as it is. */
export const wholeTensor = (stored: StoredTensor): TensorSource => ({
  pieces: [stored],
  axis: 0,
  pairedHeadSize: null,
});

/** Shape of the joined tensor. */
export function shapeOf({ pieces, axis }: TensorSource): number[] {
  const shape = [...pieces[0]!.shape];
  const joined = Math.min(axis, shape.length - 1);
  shape[joined] = pieces.reduce((sum, piece) => sum + piece.shape[joined]!, 0);
  return shape;
}

/** The part of a slice that lies in one piece. */
export interface SlicePart {
  readonly piece: StoredTensor;
  readonly format: StorageFormat;
  /** Within the piece. */
  readonly rows: Range;
  readonly columns: Range;
  /** Where the part begins within the slice. */
  readonly firstRow: number;
  readonly firstColumn: number;
}

/**
 * Cuts a slice by the pieces of its tensor, after checking that the tensor has the shape that the model needs and
 * formats that can be read.
 *
 * @throws CaravanError `invalid_checkpoint` naming file, tensor, rule and value.
 */
export function partsOf(source: TensorSource, slice: TensorSlice): SlicePart[] {
  const shape = shapeOf(source);
  if (shape.join() !== slice.shape.join()) {
    const needed = `the configuration needs [${slice.shape.join(', ')}]`;
    refuse(source.pieces[0]!, slice, `shape is [${shape.join(', ')}]; ${needed}`);
  }
  const parts: SlicePart[] = [];
  let start = 0;
  for (const piece of source.pieces) {
    const format = formatOf(piece.format);
    if (format === undefined) {
      return refuse(
        piece,
        slice,
        `dtype is ${piece.format}; supported are ${formatNames().join(', ')}`,
      );
    }
    const [rowCount, columnCount] = piece.shape.length === 1 ? [1, piece.shape[0]!] : piece.shape;
    const isByColumns = source.axis === 1 || piece.shape.length === 1;
    const extent = isByColumns ? columnCount! : rowCount!;
    const common = overlap(isByColumns ? slice.columns : slice.rows, start, extent);
    if (common !== null) {
      const within = { start: common.start - start, count: common.count };
      parts.push({
        piece,
        format,
        rows: isByColumns ? slice.rows : within,
        columns: isByColumns ? within : slice.columns,
        firstRow: isByColumns ? 0 : common.start - slice.rows.start,
        firstColumn: isByColumns ? common.start - slice.columns.start : 0,
      });
    }
    start += extent;
  }
  return parts;
}

/** Bytes that are read for a part: whole blocks. */
export function partBytes({ format, rows, columns }: SlicePart): number {
  return rows.count * blocksOf(format, columns).count * format.blockBytes;
}

/** The blocks of a row that hold these columns. */
export function blocksOf({ blockElements }: StorageFormat, columns: Range): Range {
  const start = Math.floor(columns.start / blockElements);
  return { start, count: Math.ceil((columns.start + columns.count) / blockElements) - start };
}

function overlap(range: Range, start: number, count: number): Range | null {
  const first = Math.max(range.start, start);
  const end = Math.min(range.start + range.count, start + count);
  return first < end ? { start: first, count: end - first } : null;
}

function refuse(piece: StoredTensor, slice: TensorSlice, message: string): never {
  const file = path.basename(piece.file);
  throw new CaravanError('invalid_checkpoint', `${file}: ${slice.tensor}: ${message}`);
}
