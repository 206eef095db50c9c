/**
 * A weight matrix (outputs, inputs) as a session takes it.
 */
import type { WeightForm } from '../model/weights.js';

export type Linear =
  | {
      readonly kind: 'fp32';
      readonly outputs: number;
      readonly inputs: number;
      readonly values: Float32Array; // (outputs, inputs)
    }
  | {
      readonly kind: 'int8';
      readonly outputs: number;
      readonly inputs: number;
      readonly values: Int8Array; // (inputs, outputs)
      readonly scales: Float32Array; // (outputs)
    }
  | {
      readonly kind: 'int8Blocks';
      readonly outputs: number;
      readonly inputs: number;
      readonly block: number;
      readonly values: Uint8Array; // (outputs, blocks, block), around 128
      readonly scales: Float32Array; // (outputs, blocks)
    }
  | {
      readonly kind: 'int4';
      readonly outputs: number;
      readonly inputs: number;
      readonly block: number;
      /** Two weights a byte, the earlier one low. (outputs, blocks, block / 2) */
      readonly values: Uint8Array;
      readonly scales: Float32Array; // (outputs, blocks)
      /** What stands for zero, two blocks a byte, (outputs, blocks / 2 rounded up); null where it is 8 in all. */
      readonly zeros: Uint8Array | null;
    };

/** One that is rounded in blocks along its inputs. */
export type BlockedLinear = Extract<Linear, { kind: 'int4' | 'int8Blocks' }>;

/** All that the runtime is given of a matrix. */
export function arraysOf(matrix: Linear): (Float32Array | Int8Array | Uint8Array)[] {
  switch (matrix.kind) {
    case 'fp32':
      return [matrix.values];
    case 'int8':
    case 'int8Blocks':
      return [matrix.values, matrix.scales];
    case 'int4':
      return [matrix.values, matrix.scales, ...(matrix.zeros === null ? [] : [matrix.zeros])];
  }
}

/** Where the arrays of a matrix come from: they are used again for the next layer's. */
export interface ArraySource {
  take(byteCount: number): ArrayBuffer;
}

/** A matrix with its arrays, which are yet to be written. */
export function emptyLinear(
  form: WeightForm,
  outputs: number,
  inputs: number,
  arrays: ArraySource,
): Linear {
  const bytes = (count: number): Uint8Array => new Uint8Array(arrays.take(count));
  const floats = (count: number): Float32Array => new Float32Array(arrays.take(4 * count));
  const count = outputs * inputs;
  switch (form.kind) {
    // Devices make their 16-bit floats themselves.
    case 'fp16':
    case 'fp32':
      return { kind: 'fp32', outputs, inputs, values: floats(count) };
    case 'int8': {
      const values = new Int8Array(arrays.take(count));
      return { kind: 'int8', outputs, inputs, values, scales: floats(outputs) };
    }
    case 'int8Blocks': {
      const { block } = form;
      const values = bytes(count);
      return { kind: 'int8Blocks', outputs, inputs, block, values, scales: floats(count / block) };
    }
    case 'int4': {
      const { block, isCentred = false } = form;
      const values = bytes(count / 2);
      const scales = floats(count / block);
      const zeros = isCentred ? null : bytes(outputs * zeroBytesOf(inputs, block));
      return { kind: 'int4', outputs, inputs, block, values, scales, zeros };
    }
  }
}

/** Bytes of a row's zeros. */
export const zeroBytesOf = (inputs: number, block: number): number => Math.ceil(inputs / block / 2);
