/**
 * What the runtime's kernels do on this machine, where its documentation leaves it open. It is seen by trying them on a
 * small session, once for each question, and only when it is asked.
 */
import { GraphBuilder, type ByteLevels, type Graph } from './graph-builder.js';
import { arraysOf, emptyLinear, type Linear } from './linear.js';
import { allocateBytes } from './memory.js';
import { elementType, type Ort, type TensorArray } from './ort.js';
import type { Quantizer } from './quantizer.js';

const { uint8, int32, float32 } = elementType;

/** One row and several take different kernels. */
const ROW_COUNTS = [1, 5];

/** Enough columns and rows for the widest kernels of bytes. */
const [BYTE_INPUTS, BYTE_OUTPUTS] = [64, 32];

export class KernelProbe {
  readonly #ort: Ort;
  readonly #quantizer: Quantizer;
  readonly #packed = new Map<string, boolean>();
  #byteLevels: ByteLevels | null = null;

  constructor(ort: Ort, quantizer: Quantizer) {
    this.#ort = ort;
    this.#quantizer = quantizer;
  }

  /**
   * How finely activations may be rounded to bytes. On x86 without VNNI the products of bytes are added in pairs in 16
   * bits, which overflow: 255 · 127 + 255 · 127. Bytes up to 127 cannot.
   */
  get byteLevels(): ByteLevels {
    this.#byteLevels ??= this.#areLargeBytesRight() ? 127 : 63;
    return this.#byteLevels;
  }

  /**
   * Whether the runtime, once a session is made, no longer reads a matrix where we gave it. Its documentation says that
   * it may; its kernels mostly pack a copy. Which do is seen by clearing ours, once for every shape and form.
   */
  packs(matrix: Linear): boolean {
    const { kind, outputs, inputs } = matrix;
    const key = [kind, outputs, inputs, kind === 'int4' ? matrix.block : 0].join();
    let isPacked = this.#packed.get(key);
    if (isPacked === undefined) {
      isPacked = this.#isPackedLike(matrix);
      this.#packed.set(key, isPacked);
    }
    return isPacked;
  }

  #areLargeBytesRight(): boolean {
    const graph = new GraphBuilder();
    const weights = new Int8Array(BYTE_INPUTS * BYTE_OUTPUTS).fill(127);
    const shape = [BYTE_INPUTS, BYTE_OUTPUTS];
    graph.input('x', uint8, ['rows', BYTE_INPUTS]);
    graph.node('MatMulInteger', ['x', graph.constant('w', weights, shape)], ['y']);
    graph.output('y', int32, ['rows', BYTE_OUTPUTS]);
    const products = this.#try(
      graph.finish(),
      (rows) => ({
        x: { array: new Uint8Array(rows * BYTE_INPUTS).fill(255), shape: [rows, BYTE_INPUTS] },
        y: { array: new Int32Array(rows * BYTE_OUTPUTS), shape: [rows, BYTE_OUTPUTS] },
      }),
      (compute) => compute(),
    );
    return products.every((product) => product === 255 * 127 * BYTE_INPUTS);
  }

  /** Tries it on a matrix of the same width and remainders, but few outputs. */
  #isPackedLike(like: Linear): boolean {
    const { inputs } = like;
    const outputs = Math.min(like.outputs, 64 + (like.outputs % 64));
    const matrix = emptyLinear(like, outputs, inputs, { take: allocateBytes });
    this.#quantizer.write(matrix, wave(outputs * inputs), 0, outputs);
    const graph = new GraphBuilder();
    graph.input('x', float32, [1, 'rows', inputs]);
    graph.linear('x', matrix, 'y');
    graph.output('y', float32, [1, 'rows', outputs]);
    return this.#try(
      graph.finish(),
      (rows) => ({
        x: { array: wave(rows * inputs), shape: [1, rows, inputs] },
        y: { array: new Float32Array(rows * outputs), shape: [1, rows, outputs] },
      }),
      (compute) => {
        const before = compute();
        for (const array of arraysOf(matrix)) array.fill(0);
        const after = compute();
        return before.every((value, i) => value === after[i]);
      },
    );
  }

  /** Makes a session of one input and one output, and lets `look` run it, which gives the outputs of all row counts. */
  #try<T>(
    graph: Graph,
    valuesOf: (rowCount: number) => Readonly<Record<'x' | 'y', TrialValues>>,
    look: (compute: () => number[]) => T,
  ): T {
    const session = this.#ort.createSession(graph);
    const tensor = ({ array, shape }: TrialValues) => this.#ort.tensor(array, shape);
    const runs = ROW_COUNTS.map(valuesOf).map(({ x, y }) => ({ x: tensor(x), y: tensor(y) }));
    try {
      return look(() =>
        runs.flatMap(({ x, y }) => {
          session.run([x], [y]);
          return Array.from(y.array, Number);
        }),
      );
    } finally {
      for (const { x, y } of runs) {
        x.release();
        y.release();
      }
      session.release();
    }
  }
}

interface TrialValues {
  readonly array: TensorArray;
  readonly shape: readonly number[];
}

const wave = (count: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => Math.sin(i + 1));
