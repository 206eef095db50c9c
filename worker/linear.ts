/**
 * A weight matrix (outputs, inputs) as a session takes it, and how rows of float32 are turned into one.
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
      readonly kind: 'int4';
      readonly outputs: number;
      readonly inputs: number;
      readonly block: number;
      /** Two weights a byte, the earlier one low; 8 is zero. (outputs, blocks, block / 2) */
      readonly values: Uint8Array;
      readonly scales: Float32Array; // (outputs, blocks)
    };

/** Where the arrays of a matrix come from: they are used again for the next layer's. */
export interface ArraySource {
  take(byteCount: number): ArrayBuffer;
}

/** Takes the rows of a matrix one group after another, in order. */
export interface LinearWriter {
  /** @param rows (count, inputs), from the matrix's row `first`. */
  write(rows: Float32Array, first: number, count: number): void;
  readonly linear: Linear;
}

export function linearWriter(
  form: WeightForm,
  outputs: number,
  inputs: number,
  arrays: ArraySource,
): LinearWriter {
  switch (form.kind) {
    case 'fp32':
      return fp32Writer(outputs, inputs, arrays);
    case 'int8':
      return int8Writer(outputs, inputs, arrays);
    case 'int4':
      return int4Writer(outputs, inputs, form.block, arrays);
  }
}

function fp32Writer(outputs: number, inputs: number, arrays: ArraySource): LinearWriter {
  const values = new Float32Array(arrays.take(4 * outputs * inputs));
  return {
    linear: { kind: 'fp32', outputs, inputs, values },
    write(rows, first, count) {
      values.set(rows.subarray(0, count * inputs), first * inputs);
    },
  };
}

/** Rows that are transposed together, so that what is written are runs of bytes. */
const INT8_ROWS = 32;

/** Symmetric, one scale a row: the largest weight of a row becomes ±127. */
function int8Writer(outputs: number, inputs: number, arrays: ArraySource): LinearWriter {
  const values = new Int8Array(arrays.take(outputs * inputs));
  const scales = new Float32Array(arrays.take(4 * outputs));
  const inverses = new Float64Array(INT8_ROWS);
  return {
    linear: { kind: 'int8', outputs, inputs, values, scales },
    write(rows, first, count) {
      for (let start = 0; start < count; start += INT8_ROWS) {
        const group = Math.min(INT8_ROWS, count - start);
        for (let r = 0; r < group; r += 1) {
          const from = (start + r) * inputs;
          let largest = 0;
          for (let i = from; i < from + inputs; i += 1) {
            const size = Math.abs(rows[i]!);
            if (size > largest) largest = size;
          }
          scales[first + start + r] = largest / 127;
          inverses[r] = largest === 0 ? 0 : 127 / largest;
        }
        for (let i = 0; i < inputs; i += 1) {
          const to = i * outputs + first + start;
          let from = start * inputs + i;
          for (let r = 0; r < group; r += 1) {
            // Round half up, by truncation of a positive number.
            values[to + r] = ((rows[from]! * inverses[r]! + 128.5) | 0) - 128;
            from += inputs;
          }
        }
      }
    },
  };
}

/** Symmetric around 8: of each block the weight that is largest in size becomes 0 (−8 scales). */
function int4Writer(
  outputs: number,
  inputs: number,
  block: number,
  arrays: ArraySource,
): LinearWriter {
  const blockCount = inputs / block;
  const values = new Uint8Array(arrays.take((outputs * inputs) / 2));
  const scales = new Float32Array(arrays.take(4 * outputs * blockCount));
  return {
    linear: { kind: 'int4', outputs, inputs, block, values, scales },
    write(rows, first, count) {
      let from = 0;
      let to = (first * inputs) / 2;
      let scaleAt = first * blockCount;
      for (let b = 0; b < count * blockCount; b += 1) {
        let smallest = 0;
        let largest = 0;
        for (let i = from; i < from + block; i += 1) {
          const weight = rows[i]!;
          if (weight > largest) largest = weight;
          else if (weight < smallest) smallest = weight;
        }
        const extreme = largest > -smallest ? largest : smallest;
        const inverse = extreme === 0 ? 0 : -8 / extreme;
        scales[scaleAt] = extreme / -8;
        scaleAt += 1;
        for (let i = from; i < from + block; i += 2) {
          let low = (rows[i]! * inverse + 8.5) | 0;
          let high = (rows[i + 1]! * inverse + 8.5) | 0;
          if (low > 15) low = 15;
          if (high > 15) high = 15;
          values[to] = low | (high << 4);
          to += 1;
        }
        from += block;
      }
    },
  };
}
