/**
 * Writes ONNX graphs, node by node. Weights stay outside of the encoded graph: the runtime takes them from our memory.
 */
import {
  AttributeType,
  DataLocation,
  ModelProto,
  type AttributeProto,
  type NodeProto,
  type TensorProto,
  type ValueInfoProto,
} from '../proto/gen/onnx.js';
import type { Linear } from './linear.js';
import { elementTypeOf, type ElementType, type TensorArray } from './ort.js';

const IR_VERSION = 9;
const OPSET = 20;
export const MICROSOFT = 'com.microsoft';

/** A weight that the runtime takes from our memory when the session is made. */
export interface GraphWeight {
  readonly name: string;
  readonly array: TensorArray;
  readonly shape: readonly number[];
}

/** A graph, encoded, with the order in which its inputs and outputs are bound. */
export interface Graph {
  readonly model: Uint8Array;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly weights: readonly GraphWeight[];
}

export type Dimension = number | string;

/**
 * Activations of 8 bits a row, or of 16 for twice the multiplications: where a row has one channel a thousand times
 * larger than the others, 8 bits leave nothing of these. Where bytes of 7 bits are all there is, both are of 14.
 */
export type Activations = 'coarse' | 'fine';

/** Activations in bytes are whole numbers from -levels to levels, around a zero point of levels + 1. */
export type ByteLevels = 127 | 63;

/** What graphs must know of the machine that runs them. It may have to be found out: only graphs that need it ask. */
export interface Kernels {
  readonly byteLevels: ByteLevels;
}

/** Collects nodes, weights, inputs and outputs of one graph. */
export class GraphBuilder {
  readonly #nodes: NodeProto[] = [];
  readonly #initializers: TensorProto[] = [];
  readonly #inputs: ValueInfoProto[] = [];
  readonly #outputs: ValueInfoProto[] = [];
  readonly #weights: GraphWeight[] = [];
  /** Activations that are quantized already. */
  readonly #quantized = new Set<string>();
  readonly #kernels: Kernels;

  /** @param kernels of graphs with weights of 8 bits; others may leave it out. */
  constructor(kernels: Kernels = { byteLevels: 127 }) {
    this.#kernels = kernels;
  }

  input(name: string, type: ElementType, shape: readonly Dimension[]): string {
    this.#inputs.push(valueInfo(name, type, shape));
    return name;
  }

  output(name: string, type: ElementType, shape: readonly Dimension[]): void {
    this.#outputs.push(valueInfo(name, type, shape));
  }

  /** Numbers that are few enough to stand in the graph itself. */
  constant(name: string, values: TensorArray, shape: readonly number[]): string {
    this.#initializers.push({
      name,
      dims: [...shape],
      dataType: elementTypeOf(values),
      rawData: Buffer.from(values.buffer, values.byteOffset, values.byteLength),
      externalData: [],
      dataLocation: DataLocation.DEFAULT,
    });
    return name;
  }

  integers(name: string, values: readonly number[]): string {
    return this.constant(name, BigInt64Array.from(values, BigInt), [values.length]);
  }

  /** Weights of a matrix, which stay in our memory. */
  weights(name: string, array: TensorArray, shape: readonly number[]): string {
    this.#weights.push({ name, array, shape });
    const entry = (key: string, value: string) => ({ key, value });
    this.#initializers.push({
      name,
      dims: [...shape],
      dataType: elementTypeOf(array),
      rawData: Buffer.alloc(0),
      externalData: [
        entry('location', 'memory'),
        entry('offset', '0'),
        entry('length', String(array.byteLength)),
      ],
      dataLocation: DataLocation.EXTERNAL,
    });
    return name;
  }

  /** Adds a node; an output left empty is not computed. */
  node(
    operator: string,
    inputs: readonly string[],
    outputs: readonly string[],
    attributes: readonly AttributeProto[] = [],
    domain = '',
  ): void {
    this.#nodes.push({
      opType: operator,
      domain,
      name: '',
      input: [...inputs],
      output: [...outputs],
      attribute: [...attributes],
    });
  }

  /**
   * y = x · Wᵀ for x (1, rows, inputs). A row's result does not depend on other rows; but for blocks of 4 bits
   * above 32 it can, in the last bits, on whether the number of rows is odd.
   *
   * @param activations of a matrix in 8 bits; others ignore it.
   */
  linear(x: string, matrix: Linear, y: string, activations: Activations = 'coarse'): void {
    const { outputs, inputs } = matrix;
    switch (matrix.kind) {
      case 'fp32': {
        const w = this.weights(`${y}.weight`, matrix.values, [outputs, inputs]);
        this.node('FusedMatMul', [x, w], [y], [int('transB', 1)], MICROSOFT);
        return;
      }
      case 'int8': {
        const { quantized, rowScales, zero, one } = this.#quantizeRows(x);
        const w = this.weights(`${y}.weight`, matrix.values, [inputs, outputs]);
        const scales = this.weights(`${y}.scales`, matrix.scales, [outputs]);
        const unscaled = `${y}.unscaled`;
        // In 7 bits even attention's outputs lose what a chat's answer hangs on.
        const isFine = activations === 'fine' || this.#kernels.byteLevels === 63;
        const operand = isFine ? this.#quantizeRest(x) : quantized;
        const product = isFine ? `${y}.both` : unscaled;
        const operands = [operand, w, one, scales, zero];
        this.node('MatMulIntegerToFloat', operands, [product], [], MICROSOFT);
        if (isFine) {
          const [coarse, fine, rest] = [`${y}.coarse`, `${y}.fine`, `${y}.rest`];
          const halves = [int('axis', 1), int('num_outputs', 2)];
          this.node('Split', [product], [coarse, fine], halves);
          this.node('Mul', [fine, 'quantized.restStep'], [rest]);
          this.node('Add', [coarse, rest], [unscaled]);
        }
        this.node('Mul', [unscaled, rowScales], [y]);
        return;
      }
      case 'int4': {
        const { block } = matrix;
        const shape = [outputs, inputs / block, block / 2];
        const w = this.weights(`${y}.weight`, matrix.values, shape);
        const scales = this.weights(`${y}.scales`, matrix.scales, [(outputs * inputs) / block]);
        const attributes = [int('K', inputs), int('N', outputs), int('bits', 4)];
        const zeroShape = [outputs * Math.ceil(inputs / block / 2)];
        const zeros = this.weights(`${y}.zeros`, matrix.zeros, zeroShape);
        // Level 4: activations as 8-bit blocks.
        attributes.push(int('block_size', block), int('accuracy_level', 4));
        this.node('MatMulNBits', [x, w, scales, zeros], [y], attributes, MICROSOFT);
      }
    }
  }

  /**
   * x in 8 bits (7 where `byteLevels` is 63) around a zero point, each row by its own scale, so that a row never sees its
   * neighbours: x ≈ (quantized − zero) · rowScales. Done once for all matrices that x is multiplied with.
   */
  #quantizeRows(x: string) {
    const names = {
      quantized: `${x}.quantized`, // (1, rows, inputs)
      rowScales: `${x}.rowScales`, // (rows, 1)
      zero: 'quantized.zero',
      one: 'quantized.one',
    };
    if (this.#quantized.has(x)) return names;
    if (this.#quantized.size === 0) {
      this.constant('quantized.zero', Uint8Array.of(this.#kernels.byteLevels + 1), []);
      this.constant('quantized.one', Float32Array.of(1), []);
      this.constant('quantized.step', Float32Array.of(1 / this.#kernels.byteLevels), []);
      // A row of zeros has no scale of its own.
      this.constant('quantized.least', Float32Array.of(1e-30), []);
      this.integers('quantized.widthAxes', [0, 2]);
      this.integers('quantized.lastAxis', [1]);
    }
    this.#quantized.add(x);
    const part = (name: string): string => `${x}.${name}`;
    this.node('Abs', [x], [part('sizes')]);
    const largest = [part('sizes'), 'quantized.widthAxes'];
    this.node('ReduceMax', largest, [part('largest')], [int('keepdims', 0)]);
    this.node('Mul', [part('largest'), 'quantized.step'], [part('steps')]);
    this.node('Max', [part('steps'), 'quantized.least'], [part('scales')]);
    this.node('Shape', [part('scales')], [part('rowCount')]);
    this.node('Expand', ['quantized.zero', part('rowCount')], [part('zeros')]);
    const operands = [x, part('scales'), part('zeros')];
    this.node('QuantizeLinear', operands, [names.quantized], [int('axis', 1)]);
    this.node('Unsqueeze', [part('scales'), 'quantized.lastAxis'], [names.rowScales]);
    return names;
  }

  /**
   * What is left of x once `#quantizeRows` has rounded it, in 8 bits of a 254th (7 bits of a 126th) of the row's
   * scale, below what was rounded: (1, 2 × rows, inputs). Together they are x in 16 bits, for twice the multiplications.
   */
  #quantizeRest(x: string): string {
    const part = (name: string): string => `${x}.${name}`;
    this.constant('quantized.restStep', Float32Array.of(0.5 / this.#kernels.byteLevels), []);
    const rounded = [part('quantized'), part('scales'), part('zeros')];
    this.node('DequantizeLinear', rounded, [part('rounded')], [int('axis', 1)]);
    this.node('Sub', [x, part('rounded')], [part('rest')]);
    this.node('Mul', [part('scales'), 'quantized.restStep'], [part('restScales')]);
    const rest = [part('rest'), part('restScales'), part('zeros')];
    this.node('QuantizeLinear', rest, [part('restQuantized')], [int('axis', 1)]);
    const both = [part('quantized'), part('restQuantized')];
    this.node('Concat', both, [part('both')], [int('axis', 1)]);
    return part('both');
  }

  /** The sum of all ranks' partials, in rank order. */
  sumPartials(names: readonly string[]): string {
    return names.reduce((sum, next, i) => {
      this.node('Add', [sum, next], [`sum.${i}`]);
      return `sum.${i}`;
    });
  }

  /** normed = RMSNorm(h + delta); newH = h + delta (left out when empty). */
  addAndNorm(
    h: string,
    delta: string,
    norm: Float32Array,
    epsilon: number,
    normed: string,
    newH: string,
  ): void {
    const gamma = this.constant('gamma', norm, [norm.length]);
    this.node(
      'SkipSimplifiedLayerNormalization',
      [h, delta, gamma],
      newH === '' ? [normed] : [normed, '', '', newH],
      [float('epsilon', epsilon)],
      MICROSOFT,
    );
  }

  finish(): Graph {
    const model = ModelProto.encode({
      irVersion: IR_VERSION,
      producerName: 'caravan',
      opsetImport: [
        { domain: '', version: OPSET },
        { domain: MICROSOFT, version: 1 },
      ],
      graph: {
        name: 'segment',
        node: this.#nodes,
        initializer: this.#initializers,
        input: this.#inputs,
        output: this.#outputs,
      },
    }).finish();
    return {
      model,
      inputs: this.#inputs.map((input) => input.name),
      outputs: this.#outputs.map((output) => output.name),
      weights: this.#weights,
    };
  }
}

function valueInfo(name: string, elemType: number, shape: readonly Dimension[]): ValueInfoProto {
  const dim = shape.map((n) =>
    typeof n === 'number'
      ? { value: { $case: 'dimValue' as const, dimValue: n } }
      : { value: { $case: 'dimParam' as const, dimParam: n } },
  );
  const tensorType = { elemType, shape: { dim } };
  return { name, type: { value: { $case: 'tensorType', tensorType } } };
}

const attribute = (name: string, value: Partial<AttributeProto>): AttributeProto => ({
  name,
  f: 0,
  i: 0,
  s: Buffer.alloc(0),
  floats: [],
  ints: [],
  type: AttributeType.UNDEFINED,
  ...value,
});
export const int = (name: string, i: number) => attribute(name, { i, type: AttributeType.INT });
export const float = (name: string, f: number) => attribute(name, { f, type: AttributeType.FLOAT });
export const text = (name: string, s: string) =>
  attribute(name, { s: Buffer.from(s), type: AttributeType.STRING });
