/**
 * The KV cache of one rank: keys and values of every layer, all slots, pre-allocated.
 *
 *   a layer's keys    (slots, KV heads, maxSeqLen, headSize)      values alike
 *
 * Attention writes in place. A slot's memory is neighbouring, so the slots s to s + n - 1 are a tensor of
 * batch n without a copy. The memory is reserved at once and committed by the operating system as
 * positions are written.
 */
import type { LlamaConfig } from '../model/config.js';
import type { RankPlan } from '../model/plan.js';
import type { Ort, Tensor } from './ort.js';
import { allocate } from './memory.js';

/** Keys and values of one layer, for some neighbouring slots. */
export interface KvTensors {
  readonly keys: Tensor;
  readonly values: Tensor;
}

/** Elements of keys or values; integers stand for a multiple of their channel's scale. */
export type KvArray = Float32Array | Int8Array;

export interface KvLayer<A extends KvArray> {
  readonly keys: A;
  readonly values: A;
}

export interface KvShape {
  readonly heads: number;
  readonly maxSeqLen: number;
  readonly headSize: number;
  readonly slotCount: number;
  readonly layerCount: number;
}

/** @returns the shape of one rank's cache. */
export const kvShape = (
  config: LlamaConfig,
  plan: RankPlan,
  maxSeqLen: number,
  slotCount: number,
): KvShape => ({
  heads: plan.kvHeads.count,
  headSize: config.headSize,
  layerCount: config.layerCount,
  maxSeqLen,
  slotCount,
});

export abstract class KvCache<A extends KvArray = KvArray> {
  readonly shape: KvShape;
  readonly byteCount: number;
  /** Positions in use, by slot. */
  readonly lengths: Int32Array;
  protected readonly layers: readonly KvLayer<A>[];
  protected readonly ort: Ort;
  /** By first slot × (slots + 1) + count: tensors of all layers. */
  readonly #views = new Map<number, readonly KvTensors[]>();

  /** @throws CaravanError `out_of_memory` when it cannot be reserved. */
  constructor(ort: Ort, shape: KvShape, allocateArray: (elementCount: number) => A) {
    this.ort = ort;
    this.shape = shape;
    this.lengths = new Int32Array(shape.slotCount);
    const elements = shape.slotCount * this.slotElements;
    this.layers = Array.from({ length: shape.layerCount }, () => ({
      keys: allocateArray(elements),
      values: allocateArray(elements),
    }));
    this.byteCount = this.layers.reduce((sum, { keys }) => sum + 2 * keys.byteLength, 0);
  }

  /** What attention needs to know of a layer's elements beside them: scales of keys and of values, or nothing. */
  abstract scales(layer: number): readonly Tensor[];

  /**
   * Makes room for what attention is about to write into a layer.
   *
   * @param k (rows, KV heads × headSize) keys of a step's rows.
   * @param v as k.
   */
  abstract admit(layer: number, k: Float32Array, v: Float32Array, rowCount: number): void;

  /** Tensors over slots `first` to `first + count - 1`, by layer; made once and kept. */
  view(first: number, count: number): readonly KvTensors[] {
    const { slotCount, heads, maxSeqLen, headSize } = this.shape;
    const key = first * (slotCount + 1) + count;
    let view = this.#views.get(key);
    if (view === undefined) {
      const size = this.slotElements;
      const tensor = (array: A) =>
        this.ort.tensor(array.subarray(first * size, (first + count) * size), [
          count,
          heads,
          maxSeqLen,
          headSize,
        ]);
      view = this.layers.map(({ keys, values }) => ({
        keys: tensor(keys),
        values: tensor(values),
      }));
      this.#views.set(key, view);
    }
    return view;
  }

  /** Copies the first `count` positions of a slot, in all layers. */
  copy(from: number, to: number, count: number): void {
    const { heads, maxSeqLen, headSize } = this.shape;
    const headElements = maxSeqLen * headSize;
    for (const { keys, values } of this.layers) {
      for (let head = 0; head < heads; head += 1) {
        const start = from * this.slotElements + head * headElements;
        const target = to * this.slotElements + head * headElements;
        keys.copyWithin(target, start, start + count * headSize);
        values.copyWithin(target, start, start + count * headSize);
      }
    }
  }

  release(): void {
    for (const view of this.#views.values()) {
      for (const { keys, values } of view) {
        keys.release();
        values.release();
      }
    }
    this.#views.clear();
  }

  protected get slotElements(): number {
    return this.shape.heads * this.shape.maxSeqLen * this.shape.headSize;
  }
}

/** Keys and values as they come. */
export class FloatKvCache extends KvCache<Float32Array> {
  constructor(ort: Ort, shape: KvShape) {
    super(ort, shape, allocate);
  }

  scales(): readonly Tensor[] {
    return [];
  }

  admit(): void {
    // Floats need no room.
  }
}
