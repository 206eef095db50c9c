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

export class KvCache {
  readonly maxSeqLen: number;
  readonly slotCount: number;
  readonly byteCount: number;
  /** Positions in use, by slot. */
  readonly lengths: Int32Array;
  readonly #ort: Ort;
  readonly #layers: readonly { readonly keys: Float32Array; readonly values: Float32Array }[];
  readonly #shape: readonly [kvHeads: number, maxSeqLen: number, headSize: number];
  /** By first slot × (slots + 1) + count: tensors of all layers. */
  readonly #views = new Map<number, readonly KvTensors[]>();

  /** @throws CaravanError `out_of_memory` when it cannot be reserved. */
  constructor(ort: Ort, config: LlamaConfig, plan: RankPlan, maxSeqLen: number, slotCount: number) {
    this.#ort = ort;
    this.maxSeqLen = maxSeqLen;
    this.slotCount = slotCount;
    this.lengths = new Int32Array(slotCount);
    this.#shape = [plan.kvHeads.count, maxSeqLen, config.headSize];
    const elements = slotCount * this.#slotElements;
    this.byteCount = 2 * config.layerCount * elements * 4;
    this.#layers = Array.from({ length: config.layerCount }, () => ({
      keys: allocate(elements),
      values: allocate(elements),
    }));
  }

  /** Tensors over slots `first` to `first + count - 1`, by layer; made once and kept. */
  view(first: number, count: number): readonly KvTensors[] {
    const key = first * (this.slotCount + 1) + count;
    let view = this.#views.get(key);
    if (view === undefined) {
      const size = this.#slotElements;
      const tensor = (array: Float32Array) =>
        this.#ort.tensor(array.subarray(first * size, (first + count) * size), [
          count,
          ...this.#shape,
        ]);
      view = this.#layers.map(({ keys, values }) => ({
        keys: tensor(keys),
        values: tensor(values),
      }));
      this.#views.set(key, view);
    }
    return view;
  }

  /** Copies the first `count` positions of a slot, in all layers. */
  copy(from: number, to: number, count: number): void {
    const [heads, , headSize] = this.#shape;
    const headElements = this.#slotElements / heads;
    for (const { keys, values } of this.#layers) {
      for (let head = 0; head < heads; head += 1) {
        const start = from * this.#slotElements + head * headElements;
        const target = to * this.#slotElements + head * headElements;
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

  get #slotElements(): number {
    return this.#shape[0] * this.#shape[1] * this.#shape[2];
  }
}
