/**
 * This rank's rows of the token embedding, looked up by our own code: a copy of a row is all that is asked of it.
 */
import type { WeightForm } from '../model/weights.js';
import type { ArraySource } from './linear.js';

export class Embedding {
  readonly #hiddenSize: number;
  /** (vocab.count, hidden) */
  readonly #values: Float32Array | Int8Array;
  /** (vocab.count) with 8 bits; else empty. */
  readonly #scales: Float32Array;

  /** @param form fp32, or else 8 bits with a scale a row. */
  constructor(form: WeightForm, rowCount: number, hiddenSize: number, arrays: ArraySource) {
    this.#hiddenSize = hiddenSize;
    const isWhole = form.kind === 'fp32';
    this.#values = isWhole
      ? new Float32Array(arrays.take(4 * rowCount * hiddenSize))
      : new Int8Array(arrays.take(rowCount * hiddenSize));
    this.#scales = isWhole ? new Float32Array(0) : new Float32Array(arrays.take(4 * rowCount));
  }

  /** @param rows (count, hidden), from our row `first`. */
  write(rows: Float32Array, first: number, count: number): void {
    const width = this.#hiddenSize;
    if (this.#values instanceof Float32Array) {
      this.#values.set(rows.subarray(0, count * width), first * width);
      return;
    }
    const values = this.#values;
    for (let r = 0; r < count; r += 1) {
      const row = rows.subarray(r * width, (r + 1) * width);
      let largest = 0;
      for (let i = 0; i < width; i += 1) {
        const size = Math.abs(row[i]!);
        if (size > largest) largest = size;
      }
      this.#scales[first + r] = largest / 127;
      const inverse = largest === 0 ? 0 : 127 / largest;
      const to = (first + r) * width;
      for (let i = 0; i < width; i += 1) {
        values[to + i] = ((row[i]! * inverse + 128.5) | 0) - 128;
      }
    }
  }

  /**
   * A rank's partial of the embedding: the rows of those tokens that are in its slice of the vocabulary, else zero.
   *
   * @param partial (tokens, width)
   */
  writePartial(
    tokens: readonly number[],
    slice: { readonly start: number; readonly count: number },
    partial: Float32Array,
  ): void {
    const width = this.#hiddenSize;
    tokens.forEach((token, row) => {
      const own = token - slice.start;
      if (own >= 0 && own < slice.count) this.#copyRow(own, partial, row * width);
      else partial.fill(0, row * width, (row + 1) * width);
    });
  }

  /** Copies our row `row` to `target`, from index `at`. */
  #copyRow(row: number, target: Float32Array, at: number): void {
    const width = this.#hiddenSize;
    const from = row * width;
    if (this.#values instanceof Float32Array) {
      target.set(this.#values.subarray(from, from + width), at);
      return;
    }
    const scale = this.#scales[row]!;
    for (let i = 0; i < width; i += 1) target[at + i] = this.#values[from + i]! * scale;
  }
}
