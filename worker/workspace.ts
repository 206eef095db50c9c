/**
 * The activations of one rank: allocated once for the largest step, seen through tensors that are made once
 * per shape and kept.
 */
import type { LlamaConfig } from '../model/config.js';
import type { RankPlan } from '../model/plan.js';
import type { Ort, Tensor, TensorArray } from './ort.js';
import { rotaryTables } from './rotary.js';
import { allocate } from './memory.js';
import type { AttentionGroup } from './step-layout.js';

/** Tensors over the first `rows` rows of every buffer. */
export interface RowTensors {
  /** The residual stream, two buffers in turn. (1, rows, hidden) */
  readonly h: readonly [Tensor, Tensor];
  /** By turn, then by rank. (1, rows, hidden) */
  readonly partials: readonly (readonly Tensor[])[];
  readonly positions: Tensor; // (1, rows)
  readonly q: Tensor; // (1, rows, query heads × headSize)
  readonly k: Tensor; // (1, rows, KV heads × headSize)
  readonly v: Tensor;
  readonly attended: Tensor; // as q
}

/** Tensors over the rows of one attention group. */
export interface GroupTensors {
  readonly q: Tensor; // (batch, length, query heads × headSize)
  readonly k: Tensor; // (batch, length, KV heads × headSize)
  readonly v: Tensor;
  readonly attended: Tensor; // as q
  readonly lastPositions: Tensor; // (batch)
  readonly totalLength: Tensor; // (1)
}

export interface SampledTensors {
  readonly rows: Tensor; // (sampled)
  readonly logits: Tensor; // (1, sampled, vocab.count)
}

/** Shapes kept per kind; the least recently used goes first. A server meets few shapes again and again. */
const KEPT_SHAPES = 512;

class TensorCache<T extends object> {
  readonly #kept = new Map<number, T>();

  get(key: number, make: () => T): T {
    let tensors = this.#kept.get(key);
    if (tensors === undefined) {
      tensors = make();
      if (this.#kept.size >= KEPT_SHAPES) {
        const [oldestKey, oldest] = this.#kept.entries().next().value!;
        this.#kept.delete(oldestKey);
        releaseAll(oldest);
      }
    } else {
      this.#kept.delete(key);
    }
    this.#kept.set(key, tensors);
    return tensors;
  }

  release(): void {
    for (const tensors of this.#kept.values()) releaseAll(tensors);
    this.#kept.clear();
  }
}

function releaseAll(tensors: object): void {
  for (const value of Object.values(tensors) as (Tensor | readonly unknown[])[]) {
    if (Array.isArray(value)) releaseAll(value);
    else (value as Tensor).release();
  }
}

export class Workspace {
  readonly maxRows: number;
  /** int64, as ONNX wants positions and indices. (maxRows) */
  readonly positions: BigInt64Array<ArrayBuffer>;
  readonly sampledRows: BigInt64Array<ArrayBuffer>;
  /** By first row of a group: its rows' last positions, and its longest length. (maxRows) */
  readonly lastPositions: Int32Array<ArrayBuffer>;
  readonly totalLengths: Int32Array<ArrayBuffer>;
  /** (sampled, vocab.count) of the last step. */
  readonly logits: Float32Array<ArrayBuffer>;
  readonly cos: Tensor; // (table rows, headSize / 2)
  readonly sin: Tensor;
  /** What the residual stream is before the embedding's all-reduce. */
  readonly #zeros: Float32Array;
  readonly #ort: Ort;
  readonly #widths: {
    readonly hidden: number;
    readonly query: number;
    readonly key: number;
    readonly vocab: number;
  };
  readonly #h: readonly [Float32Array, Float32Array];
  readonly #q: Float32Array;
  readonly #k: Float32Array;
  readonly #v: Float32Array;
  readonly #attended: Float32Array;
  readonly #partials: readonly (readonly Float32Array[])[];
  readonly #byRows = new TensorCache<RowTensors>();
  readonly #byGroup = new TensorCache<GroupTensors>();
  readonly #bySampled = new TensorCache<SampledTensors>();
  readonly #zeroTensors = new TensorCache<{ readonly zeros: Tensor }>();

  constructor(
    ort: Ort,
    config: LlamaConfig,
    plan: RankPlan,
    maxRows: number,
    maxSeqLen: number,
    partials: readonly (readonly Float32Array[])[],
  ) {
    this.#ort = ort;
    this.maxRows = maxRows;
    const widths = {
      hidden: config.hiddenSize,
      query: plan.queryHeads.count * config.headSize,
      key: plan.kvHeads.count * config.headSize,
      vocab: plan.vocab.count,
    };
    this.#widths = widths;
    this.positions = new BigInt64Array(new ArrayBuffer(8 * maxRows));
    this.sampledRows = new BigInt64Array(new ArrayBuffer(8 * maxRows));
    this.lastPositions = new Int32Array(new ArrayBuffer(4 * maxRows));
    this.totalLengths = new Int32Array(new ArrayBuffer(4 * maxRows));
    this.logits = allocate(maxRows * widths.vocab);
    this.#h = [allocate(maxRows * widths.hidden), allocate(maxRows * widths.hidden)];
    this.#zeros = allocate(maxRows * widths.hidden);
    this.#q = allocate(maxRows * widths.query);
    this.#k = allocate(maxRows * widths.key);
    this.#v = allocate(maxRows * widths.key);
    this.#attended = allocate(maxRows * widths.query);
    this.#partials = partials;
    // The node refuses more rows than the tables have, whatever their positions.
    const tableRows = Math.max(maxSeqLen, maxRows);
    const { cos, sin } = rotaryTables(config, tableRows);
    this.cos = ort.tensor(cos, [tableRows, config.headSize / 2]);
    this.sin = ort.tensor(sin, [tableRows, config.headSize / 2]);
  }

  rows(count: number): RowTensors {
    return this.#byRows.get(count, () => {
      const { hidden, query, key } = this.#widths;
      const tensor = (array: TensorArray, width: number) =>
        this.#ort.tensor(array.subarray(0, count * width), [1, count, width]);
      return {
        h: [tensor(this.#h[0], hidden), tensor(this.#h[1], hidden)],
        partials: this.#partials.map((ranks) => ranks.map((array) => tensor(array, hidden))),
        positions: this.#ort.tensor(this.positions.subarray(0, count), [1, count]),
        q: tensor(this.#q, query),
        k: tensor(this.#k, key),
        v: tensor(this.#v, key),
        attended: tensor(this.#attended, query),
      };
    });
  }

  /** (1, count, hidden) of zeros. */
  zeros(count: number): Tensor {
    const { hidden } = this.#widths;
    return this.#zeroTensors.get(count, () => ({
      zeros: this.#ort.tensor(this.#zeros.subarray(0, count * hidden), [1, count, hidden]),
    })).zeros;
  }

  group({ firstRow, batch, length }: AttentionGroup): GroupTensors {
    const size = this.maxRows + 1;
    return this.#byGroup.get((firstRow * size + batch) * size + length, () => {
      const { query, key } = this.#widths;
      const rowCount = batch * length;
      const tensor = (array: Float32Array, width: number) =>
        this.#ort.tensor(array.subarray(firstRow * width, (firstRow + rowCount) * width), [
          batch,
          length,
          width,
        ]);
      return {
        q: tensor(this.#q, query),
        k: tensor(this.#k, key),
        v: tensor(this.#v, key),
        attended: tensor(this.#attended, query),
        lastPositions: this.#ort.tensor(this.lastPositions.subarray(firstRow, firstRow + batch), [
          batch,
        ]),
        totalLength: this.#ort.tensor(this.totalLengths.subarray(firstRow, firstRow + 1), [1]),
      };
    });
  }

  sampled(count: number): SampledTensors {
    return this.#bySampled.get(count, () => ({
      rows: this.#ort.tensor(this.sampledRows.subarray(0, count), [count]),
      logits: this.#ort.tensor(this.logits.subarray(0, count * this.#widths.vocab), [
        1,
        count,
        this.#widths.vocab,
      ]),
    }));
  }

  release(): void {
    this.#byRows.release();
    this.#byGroup.release();
    this.#bySampled.release();
    this.#zeroTensors.release();
    this.cos.release();
    this.sin.release();
  }
}
