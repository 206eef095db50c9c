/** What graphs of a rank on a device are made of: products, norms and partials, with weights as inputs or in the graph. */
import type { LlamaConfig } from '../model/config.js';
import type { RankPlan } from '../model/plan.js';
import type { WeightForm } from '../model/weights.js';
import { float, GraphBuilder, int, MICROSOFT } from './graph-builder.js';
import { elementType, type ElementType } from './ort.js';

const { float16, uint8 } = elementType;

/** What all graphs of a rank on a device have in common. */
export interface DeviceShape {
  readonly config: LlamaConfig;
  readonly plan: RankPlan;
  /** Of activations, partials and dense weights. */
  readonly activations: ElementType;
  /** Of keys and values, and of what attention computes with. */
  readonly attention: ElementType;
  /** Products with transposed weights in one node, which WebGPU lacks. */
  readonly hasFusedProducts: boolean;
  /** Sums of any number of tensors in one node. */
  readonly hasSums: boolean;
  /** Total lengths of attention over single rows are rounded up to multiples of this. */
  readonly lengthStep: number;
  /** Of the layers' dense matrices. */
  readonly isInputsFirst: boolean;
  /** Whether layers have graphs of their own, with their weights of 4 or 8 bits in them. */
  readonly hasFixedWeights: boolean;
}

/** Weights of a matrix that are part of a graph. */
export interface FixedWeights {
  readonly values: Uint8Array; // (outputs, blocks, bytes of a block)
  /** Floats of 16 bits, in bytes. (outputs, blocks) */
  readonly scales: Uint8Array;
}

/** A matrix among a graph's inputs, or in it. */
export interface MatrixShape {
  readonly form: WeightForm;
  readonly outputs: number;
  readonly inputs: number;
  /** Dense ones lie as (inputs, outputs) where the device multiplies few rows faster so. */
  readonly isInputsFirst: boolean;
  /** In graphs of one layer. */
  readonly fixed?: FixedWeights | undefined;
}

export class DeviceGraphBuilder extends GraphBuilder {
  readonly #shape: DeviceShape;

  constructor(shape: DeviceShape) {
    super();
    this.#shape = shape;
  }

  /**
   * y = x · Wᵀ, of weights that are in the graph, or inputs `${name}.weight` and, in blocks, `.scales` and `.zeros`.
   */
  product(x: string, name: string, matrix: MatrixShape, y: string): void {
    const { form, outputs, inputs, isInputsFirst, fixed } = matrix;
    const { activations, hasFusedProducts } = this.#shape;
    if (form.kind === 'int4' || form.kind === 'int8Blocks') {
      const { block } = form;
      const blocks = inputs / block;
      const bits = form.kind === 'int4' ? 4 : 8;
      const weight = { name: `${name}.weight`, shape: [outputs, blocks, (block * bits) / 8] };
      const scales = { name: `${name}.scales`, shape: [outputs * blocks] };
      const operands = [x, weight.name, scales.name];
      if (fixed === undefined) {
        this.input(weight.name, uint8, weight.shape);
        this.input(scales.name, activations, scales.shape);
        operands.push(this.input(`${name}.zeros`, uint8, [outputs * Math.ceil(blocks / 2)]));
      } else {
        this.weights(weight.name, fixed.values, weight.shape);
        this.weights(scales.name, fixed.scales, scales.shape, float16);
      }
      this.node(
        'MatMulNBits',
        operands,
        [y],
        [int('K', inputs), int('N', outputs), int('bits', bits), int('block_size', block)],
        MICROSOFT,
      );
      return;
    }
    if (isInputsFirst) {
      this.input(`${name}.weight`, activations, [inputs, outputs]);
      this.node('MatMul', [x, `${name}.weight`], [y]);
      return;
    }
    this.input(`${name}.weight`, activations, [outputs, inputs]);
    if (hasFusedProducts) {
      this.node('FusedMatMul', [x, `${name}.weight`], [y], [int('transB', 1)], MICROSOFT);
      return;
    }
    this.reshape(x, [-1, inputs], `${y}.in`);
    this.node('Gemm', [`${y}.in`, `${name}.weight`], [`${y}.out`], [int('transB', 1)]);
    this.reshape(`${y}.out`, [1, -1, outputs], y);
  }

  reshape(x: string, shape: readonly number[], y: string): void {
    this.node('Reshape', [x, this.integers(`${y}.shape`, shape)], [y]);
  }

  cast(x: string, from: ElementType, to: ElementType, y: string): string {
    if (from === to) return x;
    this.node('Cast', [x], [y], [int('to', to)]);
    return y;
  }

  /** Declares the residual stream h and all partials; gives norm(h + Σ partials) as `x`, and the sum as `newH`. */
  residual(newH: string): void {
    const { h, partials } = this.residualInputs();
    this.normed(h, partials, newH);
    const { hasFixedWeights, config } = this.#shape;
    if (!hasFixedWeights) return;
    this.along('x', config.hiddenSize);
    if (partials.length > 1) this.along('sum', config.hiddenSize);
  }

  residualInputs(): { h: string; partials: string[] } {
    const { config, plan, activations } = this.#shape;
    const shape = [1, 'rows', config.hiddenSize];
    const h = this.input('h', activations, shape);
    const names = Array.from({ length: plan.tp }, (_, rank) =>
      this.input(`partial.${rank}`, activations, shape),
    );
    return { h, partials: names };
  }

  normed(h: string, partials: readonly string[], newH: string): void {
    const { config, activations } = this.#shape;
    const gamma = this.input('gamma', activations, [config.hiddenSize]);
    const delta = this.#sumOf(partials);
    this.node(
      'SkipSimplifiedLayerNormalization',
      [h, delta, gamma],
      newH === '' ? ['x'] : ['x', '', '', newH],
      [float('epsilon', config.normEps)],
      MICROSOFT,
    );
    if (newH !== '') this.output(newH, activations, [1, 'rows', config.hiddenSize]);
  }

  /** In rank order; in one kernel, where the device has one. */
  #sumOf(partials: readonly string[]): string {
    if (!this.#shape.hasSums || partials.length === 1) return this.sumPartials(partials);
    this.node('Sum', partials, ['sum']);
    return 'sum';
  }

  /** Has what is computed on the way to the outputs written where the caller says. */
  along(name: string, width: number): void {
    this.output(name, this.#shape.activations, [1, 'rows', width]);
  }

  /** Declares what a product called `partial` has given. */
  partialOutput(): void {
    const { config, activations } = this.#shape;
    this.output('partial', activations, [1, 'rows', config.hiddenSize]);
  }

  split(x: string, widths: readonly number[], names: readonly string[]): void {
    this.node('Split', [x, this.integers(`${x}.widths`, widths)], names, [int('axis', -1)]);
  }
}
