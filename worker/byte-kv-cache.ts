/**
 * A KV cache in 8 bits: a quarter of the memory of floats.
 *
 * Every channel (a KV head's element) of a layer's keys, and of its values, has one scale for all positions of all
 * slots, as ONNX Runtime's attention takes them. Llama's keys have channels that are ten times as large as others at
 * every position: a scale a channel keeps both (KIVI, arXiv 2402.02750, cuts keys the same way).
 *
 * Scales are not known beforehand. Each starts with what the first rows hold, and grows when a row holds more; what
 * the cache has of the channel is rounded anew then. That happens often in the first prompt and hardly ever after it.
 * But an answer depends, by a rounding, on what was computed before: this cache is never exact.
 */
import { KvCache, type KvShape } from './kv-cache.js';
import { allocateBytes } from './memory.js';
import type { Ort, Tensor } from './ort.js';

/** The largest integer. -128 is not used, so that a channel's range is the same on both sides. */
const LEVELS = 127;
/** How far beyond the largest value that was seen a channel reaches: fewer roundings anew, for a third of a bit. */
const HEADROOM = 1.25;
/** A channel that was always zero needs a scale too. */
const LEAST_LIMIT = 1e-6;

/** A layer's keys or values, and how far their channels reach. */
interface Part {
  readonly elements: Int8Array;
  /** (channels) largest magnitude that can be written. */
  readonly limits: Float32Array;
  /** (1, KV heads, 1, headSize) */
  readonly scales: Tensor;
}

export class ByteKvCache extends KvCache<Int8Array> {
  readonly #parts: readonly { readonly keys: Part; readonly values: Part }[];
  readonly #scales: readonly (readonly Tensor[])[];
  /** (channels) largest magnitudes of the rows at hand. */
  readonly #seen: Float32Array;

  /** @throws CaravanError `out_of_memory` when it cannot be reserved. */
  constructor(ort: Ort, shape: KvShape) {
    super(ort, shape, (count) => new Int8Array(allocateBytes(count)));
    const { heads, headSize } = shape;
    const channels = heads * headSize;
    this.#seen = new Float32Array(channels);
    const part = (elements: Int8Array): Part => {
      const scales = new Float32Array(channels).fill(LEAST_LIMIT / LEVELS);
      return {
        elements,
        limits: new Float32Array(channels).fill(LEAST_LIMIT),
        scales: ort.tensor(scales, [1, heads, 1, headSize]),
      };
    };
    this.#parts = this.layers.map(({ keys, values }) => ({
      keys: part(keys),
      values: part(values),
    }));
    this.#scales = this.#parts.map(({ keys, values }) => [keys.scales, values.scales]);
  }

  scales(layer: number): readonly Tensor[] {
    return this.#scales[layer]!;
  }

  admit(layer: number, k: Float32Array, v: Float32Array, rowCount: number): void {
    const { keys, values } = this.#parts[layer]!;
    this.#admit(keys, k, rowCount);
    this.#admit(values, v, rowCount);
  }

  override release(): void {
    super.release();
    for (const scales of this.#scales.flat()) scales.release();
  }

  #admit(part: Part, rows: Float32Array, rowCount: number): void {
    const { limits } = part;
    const channels = limits.length;
    let isMore = false;
    for (let at = 0; at < rowCount * channels; at += channels) {
      for (let channel = 0; channel < channels; channel += 1) {
        if (Math.abs(rows[at + channel]!) > limits[channel]!) isMore = true;
      }
    }
    if (!isMore) return;
    const seen = this.#seen.fill(0);
    for (let at = 0; at < rowCount * channels; at += channels) {
      for (let channel = 0; channel < channels; channel += 1) {
        seen[channel] = Math.max(seen[channel]!, Math.abs(rows[at + channel]!));
      }
    }
    for (let channel = 0; channel < channels; channel += 1) {
      if (seen[channel]! > limits[channel]!) this.#grow(part, channel, HEADROOM * seen[channel]!);
    }
  }

  #grow({ elements, limits, scales }: Part, channel: number, limit: number): void {
    const ratio = limits[channel]! / limit;
    limits[channel] = limit;
    (scales.array as Float32Array)[channel] = limit / LEVELS;
    const { heads, headSize, maxSeqLen, slotCount } = this.shape;
    const head = Math.floor(channel / headSize);
    for (let slot = 0; slot < slotCount; slot += 1) {
      const start = (slot * heads + head) * maxSeqLen * headSize + (channel % headSize);
      const end = start + this.lengths[slot]! * headSize;
      for (let at = start; at < end; at += headSize) {
        elements[at] = Math.round(elements[at]! * ratio);
      }
    }
  }
}
