/**
 * Reads a rank's matrices and turns them into the forms that its sessions take, some rows at a time: beside the
 * final weights, only the matrices of one segment are in memory.
 */
import type { Checkpoint } from '../model/checkpoint.js';
import type { LayerSlices, TensorSlice } from '../model/plan.js';
import { SliceReader } from '../model/slice-reader.js';
import type { FormVariant, WeightForm } from '../model/weights.js';
import { CaravanError } from '../proto/errors.js';
import { chooseBlock, openChoices, withBlocks } from './block-choice.js';
import type { Graph } from './graph-builder.js';
import { HalfWidener } from './half-widener.js';
import { KernelProbe } from './kernel-probe.js';
import { arraysOf, emptyLinear, type ArraySource, type Linear } from './linear.js';
import type { Ort, Session } from './ort.js';
import { allocate, allocateBytes } from './memory.js';
import { recording, type WeightRecorder } from './weight-cache.js';
import { ScratchMemory } from './mapped-file.js';
import { Quantizer } from './quantizer.js';
import type { WeightFileReader } from './weight-file.js';

/** Floats that are read before they are turned into another form. */
const CHUNK_ELEMENTS = 1 << 20;

/** What is built of the rows of a matrix. */
export interface RowSink {
  /** @param rows (count, inputs), from row `first` of all parts. */
  write(rows: Float32Array, first: number, count: number): void;
}

/** Where weights come from, and whether they are written down for the next start. */
export type WeightSource =
  | { readonly kind: 'checkpoint'; readonly recorder: WeightRecorder | null }
  | { readonly kind: 'cache'; readonly file: WeightFileReader };

export class WeightLoader {
  readonly kernels: KernelProbe;
  readonly #reader: SliceReader;
  /** Of rows by which blocks are chosen, most of which other ranks hold: they do not count. */
  readonly #sampler: SliceReader;
  readonly #source: WeightSource;
  readonly #headSize: number;
  readonly #onProgress: (bytesDone: number) => void;
  readonly #signal: AbortSignal;
  readonly #pool = new ArrayPool();
  readonly #quantizer: Quantizer;
  readonly #halves: HalfWidener;
  readonly #ort: Ort;
  #chunk = new Float32Array(0);
  #mappedBytes = 0;

  /** @param onProgress hears of the bytes read so far, of the checkpoint or of the cache. */
  constructor(
    ort: Ort,
    checkpoint: Checkpoint,
    source: WeightSource,
    onProgress: (bytesDone: number) => void,
    signal: AbortSignal,
  ) {
    this.#ort = ort;
    this.#source = source;
    this.#halves = new HalfWidener(ort);
    this.#reader = new SliceReader(checkpoint, this.#halves.widen);
    this.#sampler = new SliceReader(checkpoint, this.#halves.widen);
    this.#headSize = checkpoint.config.headSize;
    this.#onProgress = onProgress;
    this.#signal = signal;
    this.#quantizer = new Quantizer(ort);
    this.kernels = new KernelProbe(ort, this.#quantizer);
  }

  /** Of the checkpoint's slices. */
  get bytesRead(): number {
    return this.#reader.bytesRead;
  }

  close(): void {
    this.#reader.close();
    this.#sampler.close();
    this.#halves.release();
    this.#quantizer.release();
    this.#pool.release();
  }

  /** The arrays of a matrix may be written again: whoever needed them has copies. */
  giveBack(matrix: Linear): void {
    this.#pool.giveBack(matrix);
  }

  async vector(slice: TensorSlice): Promise<Float32Array> {
    const count = slice.columns.count;
    const { values } = await this.#build(slice.tensor, { take: allocateBytes }, (arrays) => {
      const values = new Float32Array(arrays.take(4 * count));
      return { values, read: () => this.#reader.read(slice, values, 0) };
    });
    return values;
  }

  /**
   * The forms of a layer with the block of each of its matrices, where there is a choice: the cache knows what came of it.
   *
   * @throws as `rows`.
   */
  async settle(
    variants: readonly FormVariant[],
    layer: LayerSlices,
  ): Promise<readonly FormVariant[]> {
    const choices = openChoices(variants);
    if (choices.length === 0) return variants;
    const name = `${layer.q.tensor} blocks`;
    const { blocks } = await this.#build(name, { take: allocateBytes }, (arrays) => {
      const blocks = new Int32Array(arrays.take(4 * choices.length));
      const read = async (): Promise<void> => {
        for (const [i, choice] of choices.entries()) {
          const sample: SliceReader['read'] = (...args) => this.#sampler.read(...args);
          blocks[i] = await chooseBlock(choice, layer, sample, this.#quantizer);
        }
      };
      return { blocks, read };
    });
    return withBlocks(variants, choices, blocks);
  }

  /** One matrix of the rows of all parts, in each of the forms. */
  async matrix(forms: readonly WeightForm[], ...parts: TensorSlice[]): Promise<Linear[]> {
    return this.matrixHeard(forms, parts, () => undefined);
  }

  /** As `matrix`. @param hear gets the rows too, when they are read. */
  async matrixHeard(
    forms: readonly WeightForm[],
    parts: readonly TensorSlice[],
    hear: RowSink['write'],
  ): Promise<Linear[]> {
    const outputs = parts.reduce((sum, part) => sum + part.rows.count, 0);
    const inputs = parts[0]!.columns.count;
    const { matrices } = await this.rows(parts, this.#pool, (arrays) => {
      const matrices = forms.map((form) => emptyLinear(form, outputs, inputs, arrays));
      const write: RowSink['write'] = (rows, first, count) => {
        for (const matrix of matrices) this.#quantizer.write(matrix, rows, first, count);
        hear(rows, first, count);
      };
      return { matrices, write };
    });
    return matrices;
  }

  /**
   * What is built of the rows of all parts: from the cache, which holds the arrays as they were when all was written,
   * or from the checkpoint, some rows at a time.
   *
   * @param build takes its arrays from the source, always the same ones in the same order.
   * @throws CaravanError `invalid_checkpoint`, or `cancelled` when the signal aborts; DamagedWeights.
   */
  async rows<T extends RowSink>(
    parts: readonly TensorSlice[],
    arrays: ArraySource,
    build: (arrays: ArraySource) => T,
  ): Promise<T> {
    const { tensor, rows, columns } = parts[0]!;
    const name = [tensor, rows.start, columns.start].join(' ');
    const { sink } = await this.#build(name, arrays, (source) => {
      const sink = build(source);
      return { sink, read: () => this.#readRows(parts, sink) };
    });
    return sink;
  }

  async #build<T extends { read(): Promise<void> }>(
    name: string,
    arrays: ArraySource,
    build: (arrays: ArraySource) => T,
  ): Promise<T> {
    const { built, keep } = await this.hold(name, arrays, build);
    if (this.#source.kind === 'checkpoint') await built.read();
    keep();
    return built;
  }

  /**
   * What is built of arrays of the cache, which are as they were when they were kept; else of new ones, to be filled
   * from the checkpoint and then kept.
   */
  async hold<T>(
    name: string,
    arrays: ArraySource,
    build: (arrays: ArraySource) => T,
  ): Promise<{ readonly built: T; readonly keep: () => void }> {
    const taken: ArrayBuffer[] = [];
    const nameOf = (index: number): string => `${name} ${index}`;
    if (this.#signal.aborted) throw new CaravanError('cancelled', 'loading was cancelled');
    if (this.#source.kind === 'cache') {
      const { file } = this.#source;
      const mapped: ArraySource = {
        take: (byteCount) => file.take(nameOf(taken.length), byteCount),
      };
      const built = build(recording(mapped, taken));
      for (const [i, array] of taken.entries()) {
        await file.check(nameOf(i), array);
        this.#mappedBytes += array.byteLength;
        this.#onProgress(this.#mappedBytes);
      }
      return { built, keep: () => undefined };
    }
    const { recorder } = this.#source;
    // The arrays of a pool may still be on their way to the disk.
    await recorder?.settled();
    const built = build(recording(arrays, taken));
    const keep = (): void => {
      taken.forEach((array, i) => recorder?.append(nameOf(i), array));
    };
    return { built, keep };
  }

  /** Reads the rows of all parts into what holds them; nothing where it came from the cache. */
  async fill(parts: readonly TensorSlice[], sink: RowSink): Promise<void> {
    if (this.#source.kind === 'checkpoint') await this.#readRows(parts, sink);
  }

  async #readRows(parts: readonly TensorSlice[], sink: RowSink): Promise<void> {
    let first = 0;
    for (const part of parts) {
      const width = part.columns.count;
      // Readers exchange rows within heads: a chunk has whole ones.
      const heads = Math.max(1, Math.floor(CHUNK_ELEMENTS / (width * this.#headSize)));
      const most = heads * this.#headSize;
      for (let done = 0; done < part.rows.count; done += most) {
        if (this.#signal.aborted) throw new CaravanError('cancelled', 'loading was cancelled');
        const count = Math.min(most, part.rows.count - done);
        if (this.#chunk.length < count * width) this.#chunk = allocate(count * width);
        const rows = { start: part.rows.start + done, count };
        await this.#reader.read({ ...part, rows }, this.#chunk, 0);
        sink.write(this.#chunk, first, count);
        first += count;
        this.#onProgress(this.#reader.bytesRead);
      }
    }
  }

  /** Loads a graph of these matrices; their arrays serve the next ones, where the runtime has its own copies. */
  open(graph: Graph, matrices: readonly Linear[]): Session {
    const session = this.#ort.createSession(graph);
    for (const matrix of matrices) {
      if (!this.kernels.packs(matrix)) session.keep(this.#pool.leave(matrix));
      else if (this.#source.kind === 'checkpoint') this.#pool.giveBack(matrix);
      else
        for (const { buffer } of arraysOf(matrix)) this.#source.file.forget(buffer as ArrayBuffer);
    }
    return session;
  }
}

/** Free memory beyond this is given back before more is taken. */
const POOL_BYTES = 192 << 20;

/**
 * Memory of matrices until their sessions are made, to be used again by the next ones of the same size. It is mapped by
 * itself and given back by hand: what a garbage collector may leave for later would be the largest part of a rank.
 */
class ArrayPool implements ArraySource {
  readonly #free: ScratchMemory[] = [];
  readonly #used = new Map<ArrayBufferLike, ScratchMemory>();

  take(byteCount: number): ArrayBuffer {
    const index = this.#free.findIndex(({ bytes }) => bytes.byteLength === byteCount);
    const memory = index === -1 ? this.#reserve(byteCount) : this.#free.splice(index, 1)[0]!;
    this.#used.set(memory.bytes, memory);
    return memory.bytes;
  }

  /** The arrays of a matrix may be written again: whoever needed them has copies. */
  giveBack(matrix: Linear): void {
    for (const { buffer } of arraysOf(matrix)) {
      const memory = this.#used.get(buffer);
      if (memory === undefined) continue;
      this.#used.delete(buffer);
      this.#free.push(memory);
    }
  }

  /** The matrix stays. @returns what gives its memory back. */
  leave(matrix: Linear): () => void {
    const memories = arraysOf(matrix).flatMap(({ buffer }) => this.#used.get(buffer) ?? []);
    for (const { bytes } of memories) this.#used.delete(bytes);
    return () => {
      for (const memory of memories) memory.release();
    };
  }

  release(): void {
    for (const memory of [...this.#free.splice(0), ...this.#used.values()]) memory.release();
    this.#used.clear();
  }

  #reserve(byteCount: number): ScratchMemory {
    // Oldest first; what is in use is little, since segments are loaded one after the other.
    let held = byteCount + this.#free.reduce((sum, { bytes }) => sum + bytes.byteLength, 0);
    while (held > POOL_BYTES && this.#free.length > 0) {
      const oldest = this.#free.shift()!;
      held -= oldest.bytes.byteLength;
      oldest.release();
    }
    return new ScratchMemory(byteCount);
  }
}
