/**
 * Reads slices of a checkpoint by byte range, and nothing else, as float32.
 */
import fs from 'node:fs';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { locateSlice, type Checkpoint } from './checkpoint.js';
import type { TensorSlice } from './plan.js';
import type { StorageFormat } from './formats.js';
import { openForReading } from './safetensors.js';
import { blocksOf, type SlicePart } from './stored-tensor.js';

const SCRATCH_BYTES = 1 << 20;
const YIELD_AFTER_MS = 20;

/** Where the rows of a part go in the target. */
interface Destination {
  readonly target: Float32Array;
  /** Of the slice's first element. */
  readonly index: number;
  /** Elements from a row of the slice to the next. */
  readonly rowStride: number;
  readonly pairedHeadSize: number | null;
}

/** How whole blocks become float32: `StorageFormat.widen`, or whatever does the same sooner. */
export type Widening = (format: StorageFormat, ...run: Parameters<StorageFormat['widen']>) => void;

const asFormatsDo: Widening = (format, ...run) => {
  format.widen(...run);
};

/** Close it after use. */
export class SliceReader {
  readonly #checkpoint: Checkpoint;
  readonly #widen: Widening;
  readonly #descriptors = new Map<string, number>();
  readonly #scratch = Buffer.from(new ArrayBuffer(SCRATCH_BYTES));
  /** Elements of blocks that a slice touches in part. */
  readonly #widened = new Float32Array(SCRATCH_BYTES / 4);
  #lastYieldMs = performance.now();
  /** Bytes of slices read so far. */
  bytesRead = 0;

  constructor(checkpoint: Checkpoint, widen = asFormatsDo) {
    this.#checkpoint = checkpoint;
    this.#widen = widen;
  }

  /**
   * Reads a slice as float32 into `target` from index `index`, row by row; yields to the event loop
   * every 20 ms.
   *
   * @throws CaravanError `invalid_checkpoint` when the file ends early.
   */
  async read(slice: TensorSlice, target: Float32Array, index: number): Promise<void> {
    const { source, parts } = locateSlice(this.#checkpoint, slice);
    const { pairedHeadSize } = source;
    const rowStride = slice.columns.count;
    for (const part of parts) {
      const destination = { target, index, rowStride, pairedHeadSize };
      if (part.piece.strides?.[0] === 1) await this.#readTransposed(part, destination);
      else await this.#readRows(part, destination);
    }
  }

  close(): void {
    for (const descriptor of this.#descriptors.values()) fs.closeSync(descriptor);
    this.#descriptors.clear();
  }

  /** Rows as they lie: many at a time where they are neighbours in the file. */
  async #readRows(part: SlicePart, destination: Destination): Promise<void> {
    const { piece, format, rows, columns } = part;
    const { blockElements, blockBytes } = format;
    const columnCount = piece.shape.at(-1)!;
    const strideBytes = ((piece.strides?.[0] ?? columnCount) / blockElements) * blockBytes;
    const { target, rowStride } = destination;
    // A row longer than the scratch is read in several spans of columns.
    const span = Math.floor(
      Math.min(SCRATCH_BYTES / blockBytes, this.#widened.length / blockElements),
    );
    for (let done = 0; done < columns.count;) {
      const first = columns.start + done;
      const room = span * blockElements - (first % blockElements);
      const count = Math.min(columns.count - done, room);
      const blocks = blocksOf(format, { start: first, count });
      const runBytes = blocks.count * blockBytes;
      const isWholeBlocks = blocks.count * blockElements === count;
      const areNeighbours = runBytes === strideBytes;
      // What was read lies row after row, and so does what it becomes.
      const isOneRun = count === rowStride && isWholeBlocks && destination.pairedHeadSize === null;
      const perRead = Math.floor(SCRATCH_BYTES / runBytes);
      for (let row = 0; row < rows.count; row += perRead) {
        const rowCount = Math.min(perRead, rows.count - row);
        const offset = piece.offset + (rows.start + row) * strideBytes + blocks.start * blockBytes;
        if (areNeighbours) this.#readExactly(piece.file, 0, rowCount * runBytes, offset);
        else {
          for (let r = 0; r < rowCount; r += 1) {
            this.#readExactly(piece.file, r * runBytes, runBytes, offset + r * strideBytes);
          }
        }
        if (isOneRun) {
          const at = destination.index + (part.firstRow + row) * rowStride;
          this.#widen(format, this.#scratch, 0, rowCount * blocks.count, target, at);
        } else {
          for (let r = 0; r < rowCount; r += 1) {
            const at = placeOf(part, destination, row + r) + done;
            if (isWholeBlocks) {
              this.#widen(format, this.#scratch, r * runBytes, blocks.count, target, at);
            } else {
              this.#widen(format, this.#scratch, r * runBytes, blocks.count, this.#widened, 0);
              const from = first - blocks.start * blockElements;
              target.set(this.#widened.subarray(from, from + count), at);
            }
          }
        }
        await this.#yieldIfDue();
      }
      done += count;
    }
  }

  /** A matrix that is stored column by column: each column's run of rows is spread over the target. */
  async #readTransposed(part: SlicePart, destination: Destination): Promise<void> {
    const { piece, format, rows, columns } = part;
    const { blockBytes } = format;
    const columnStride = piece.strides![1];
    const perRead = SCRATCH_BYTES / 4;
    for (let column = 0; column < columns.count; column += 1) {
      for (let row = 0; row < rows.count; row += perRead) {
        const count = Math.min(perRead, rows.count - row);
        const element = (columns.start + column) * columnStride + rows.start + row;
        const offset = piece.offset + element * blockBytes;
        this.#readExactly(piece.file, 0, count * blockBytes, offset);
        this.#widen(format, this.#scratch, 0, count, this.#widened, 0);
        for (let r = 0; r < count; r += 1) {
          destination.target[placeOf(part, destination, row + r) + column] = this.#widened[r]!;
        }
      }
      await this.#yieldIfDue();
    }
  }

  #readExactly(file: string, at: number, byteCount: number, offset: number): void {
    let descriptor = this.#descriptors.get(file);
    if (descriptor === undefined) {
      descriptor = openForReading(file);
      this.#descriptors.set(file, descriptor);
    }
    for (let done = 0; done < byteCount;) {
      const n = fs.readSync(descriptor, this.#scratch, at + done, byteCount - done, offset + done);
      if (n === 0) {
        throw new CaravanError(
          'invalid_checkpoint',
          `${path.basename(file)}: ends at byte ${offset + done}: truncated?`,
        );
      }
      done += n;
    }
    this.bytesRead += byteCount;
  }

  #yieldIfDue(): Promise<void> | undefined {
    if (performance.now() - this.#lastYieldMs <= YIELD_AFTER_MS) return undefined;
    return new Promise((resolve) =>
      setImmediate(() => {
        this.#lastYieldMs = performance.now();
        resolve();
      }),
    );
  }
}

/** Index in the target of the part's first column in its row `row`. */
function placeOf(part: SlicePart, destination: Destination, row: number): number {
  const { index, rowStride, pairedHeadSize } = destination;
  let to = part.firstRow + row;
  if (pairedHeadSize !== null) {
    // Slices hold whole heads, and so do pieces: rows are exchanged within a head of the slice.
    const within = to % pairedHeadSize;
    to += (within >> 1) + (within & 1) * (pairedHeadSize >> 1) - within;
  }
  return index + to * rowStride + part.firstColumn;
}
