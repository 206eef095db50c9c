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
/** The first that knows blocks within rows, and 4 bits. */
const BLOCK_OPSET = 21;
const BLOCK_IR_VERSION = 10;
export const MICROSOFT = 'com.microsoft';

/** A weight that the runtime takes from our memory when the session is made. */
export interface GraphWeight {
  readonly name: string;
  readonly array: TensorArray;
  readonly shape: readonly number[];
  readonly type: ElementType;
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
 * Activations of 8 bits a row; 'fine' ones of 16 in rows with an outlier, for twice the multiplications: where a row has
 * one channel a thousand times larger than the others, 8 bits leave nothing of these.
 */
export type Activations = 'coarse' | 'fine';

/** A row has an outlier when a step of its bytes is larger than this part of the row's root mean square. */
const LARGEST_STEP = 1 / 8;

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
  /** Of these, those whose outliers are quantized further. */
  readonly #refined = new Set<string>();
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

  /**
   * Weights of a matrix, which stay in our memory.
   *
   * @param type of elements that JavaScript has no arrays of; then `array` holds their bytes.
   */
  weights(
    name: string,
    array: TensorArray,
    shape: readonly number[],
    type: ElementType = elementTypeOf(array),
  ): string {
    this.#weights.push({ name, array, shape, type });
    const entry = (key: string, value: string) => ({ key, value });
    this.#initializers.push({
      name,
      dims: [...shape],
      dataType: type,
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
        const operand = isFine ? this.#quantizeOutliers(x, inputs) : quantized;
        const product = isFine ? `${y}.all` : unscaled;
        const operands = [operand, w, one, scales, zero];
        this.node('MatMulIntegerToFloat', operands, [product], [], MICROSOFT);
        if (isFine) this.#addOutliers(x, product, unscaled);
        this.node('Mul', [unscaled, rowScales], [y]);
        return;
      }
      case 'int8Blocks':
        throw new Error('sessions in host memory take int8 by outputs');
      case 'int4': {
        const { block } = matrix;
        const shape = [outputs, inputs / block, block / 2];
        const w = this.weights(`${y}.weight`, matrix.values, shape);
        const scales = this.weights(`${y}.scales`, matrix.scales, [(outputs * inputs) / block]);
        const attributes = [int('K', inputs), int('N', outputs), int('bits', 4)];
        const operands = [x, w, scales];
        if (matrix.zeros !== null) {
          const zeroShape = [outputs * Math.ceil(inputs / block / 2)];
          operands.push(this.weights(`${y}.zeros`, matrix.zeros, zeroShape));
        }
        // Level 4: activations as 8-bit blocks.
        attributes.push(int('block_size', block), int('accuracy_level', 4));
        this.node('MatMulNBits', operands, [y], attributes, MICROSOFT);
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
   * The rows of x as `#quantizeRows` has rounded them, and after them what is left of the rows with an outlier, in bytes
   * of a 254th (a 126th where `byteLevels` is 63) of the row's scale: (1, rows + outliers, inputs). Whether a row has
   * one depends on the row alone.
   */
  #quantizeOutliers(x: string, inputs: number): string {
    const part = (name: string): string => `${x}.${name}`;
    const all = part('all');
    if (this.#refined.has(x)) return all;
    if (this.#refined.size === 0) {
      this.constant('quantized.restStep', Float32Array.of(0.5 / this.#kernels.byteLevels), []);
      this.integers('quantized.firstRow', [0]);
      this.integers('quantized.batchAxis', [0]);
    }
    this.#refined.add(x);
    // √inputs turns a norm into a root mean square. A row of zeros is none.
    const bound = Float32Array.of(LARGEST_STEP / Math.sqrt(inputs));
    const norms = [x, 'quantized.widthAxes'];
    this.node('ReduceL2', norms, [part('norms')], [int('keepdims', 0)]);
    this.node('Mul', [part('norms'), this.constant(part('bound'), bound, [])], [part('bounds')]);
    this.node('Greater', [part('steps'), part('bounds')], [part('isOutlier')]);
    this.node('NonZero', [part('isOutlier')], [part('found')]);
    this.node('Squeeze', [part('found'), 'quantized.batchAxis'], [part('outliers')]);
    const outliersOf = (name: string, axis: number): string => {
      const gathered = `${name}.ofOutliers`;
      this.node('Gather', [name, part('outliers')], [gathered], [int('axis', axis)]);
      return gathered;
    };
    const [scales, zeros] = [outliersOf(part('scales'), 0), outliersOf(part('zeros'), 0)];
    const rounded = [outliersOf(part('quantized'), 1), scales, zeros];
    this.node('DequantizeLinear', rounded, [part('rounded')], [int('axis', 1)]);
    this.node('Sub', [outliersOf(x, 1), part('rounded')], [part('rest')]);
    this.node('Mul', [scales, 'quantized.restStep'], [part('restScales')]);
    const rest = [part('rest'), part('restScales'), zeros];
    this.node('QuantizeLinear', rest, [part('restQuantized')], [int('axis', 1)]);
    this.node('Concat', [part('quantized'), part('restQuantized')], [all], [int('axis', 1)]);
    this.node('Shape', [all], [part('allCount')], [int('start', 1), int('end', 2)]);
    // (outliers, 1), as ScatterND takes them.
    this.node('Transpose', [part('found')], [part('places')]);
    return all;
  }

  /** Adds the products of what was left of outliers, the last rows of `product`, to their rows, the first. */
  #addOutliers(x: string, product: string, sum: string): void {
    const [rowCount, allCount] = [`${x}.rowCount`, `${x}.allCount`];
    const rowsOf = (name: string, first: string, end: string): string => {
      const [rows, flat] = [`${product}.${name}`, `${product}.${name}.flat`];
      this.node('Slice', [product, first, end, 'quantized.lastAxis'], [rows]);
      this.node('Squeeze', [rows, 'quantized.batchAxis'], [flat]);
      return flat;
    };
    const coarse = rowsOf('coarse', 'quantized.firstRow', rowCount);
    const fine = rowsOf('fine', rowCount, allCount);
    this.node('Mul', [fine, 'quantized.restStep'], [`${fine}.scaled`]);
    const scattered = [coarse, `${x}.places`, `${fine}.scaled`];
    this.node('ScatterND', scattered, [`${sum}.flat`], [text('reduction', 'add')]);
    this.node('Unsqueeze', [`${sum}.flat`, 'quantized.batchAxis'], [sum]);
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

  /** @param hasBlocks whether nodes quantize in blocks, or into 4 bits. */
  finish({ hasBlocks = false } = {}): Graph {
    const model = ModelProto.encode({
      irVersion: hasBlocks ? BLOCK_IR_VERSION : IR_VERSION,
      producerName: 'caravan',
      opsetImport: [
        { domain: '', version: hasBlocks ? BLOCK_OPSET : OPSET },
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
