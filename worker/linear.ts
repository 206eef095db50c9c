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
      /** Two weights a byte, the earlier one low. (outputs, blocks, block / 2) */
      readonly values: Uint8Array;
      readonly scales: Float32Array; // (outputs, blocks)
      /** What stands for zero, two blocks a byte. (outputs, blocks / 2 rounded up) */
      readonly zeros: Uint8Array;
    };

/** All that the runtime is given of a matrix. */
export function arraysOf(matrix: Linear): (Float32Array | Int8Array | Uint8Array)[] {
  switch (matrix.kind) {
    case 'fp32':
      return [matrix.values];
    case 'int8':
      return [matrix.values, matrix.scales];
    case 'int4':
      return [matrix.values, matrix.scales, matrix.zeros];
  }
}

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
    // Devices make their 16-bit floats themselves.
    case 'fp16':
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

/**
 * Of each block either the weight that is largest in size becomes 0 (−8 steps from a zero of 8), or the smallest
 * becomes 0 and the largest 15: whichever comes nearer. What was 4 bits in such blocks before stays what it was.
 */
function int4Writer(
  outputs: number,
  inputs: number,
  block: number,
  arrays: ArraySource,
): LinearWriter {
  const blockCount = inputs / block;
  const zeroBytes = Math.ceil(blockCount / 2);
  const values = new Uint8Array(arrays.take((outputs * inputs) / 2));
  const scales = new Float32Array(arrays.take(4 * outputs * blockCount));
  const zeros = new Uint8Array(arrays.take(outputs * zeroBytes));
  return {
    linear: { kind: 'int4', outputs, inputs, block, values, scales, zeros },
    write(rows, first, count) {
      zeros.fill(0, first * zeroBytes, (first + count) * zeroBytes);
      for (let row = 0; row < count; row += 1) {
        for (let b = 0; b < blockCount; b += 1) {
          const from = row * inputs + b * block;
          const end = from + block;
          let smallest = 0;
          let largest = 0;
          for (let i = from; i < end; i += 1) {
            const weight = rows[i]!;
            if (weight > largest) largest = weight;
            else if (weight < smallest) smallest = weight;
          }
          const centred = (largest > -smallest ? largest : smallest) / -8;
          const spread = (largest - smallest) / 15;
          const spreadZero = spread === 0 ? 0 : Math.round(-smallest / spread);
          const isCentred =
            blockError(rows, from, end, centred, 8) <=
            blockError(rows, from, end, spread, spreadZero);
          const scale = isCentred ? centred : spread;
          const zero = isCentred ? 8 : spreadZero;
          const inverse = scale === 0 ? 0 : 1 / scale;
          const offset = zero + 0.5;
          let to = ((first + row) * inputs + b * block) / 2;
          for (let i = from; i < end; i += 2) {
            let low = (rows[i]! * inverse + offset) | 0;
            let high = (rows[i + 1]! * inverse + offset) | 0;
            if (low > 15) low = 15;
            if (high > 15) high = 15;
            values[to] = low | (high << 4);
            to += 1;
          }
          scales[(first + row) * blockCount + b] = scale;
          zeros[(first + row) * zeroBytes + (b >> 1)]! |= zero << (4 * (b & 1));
        }
      }
    },
  };
}

/** Sum of the squared errors of a block, in its steps' own size. */
function blockError(
  rows: Float32Array,
  from: number,
  end: number,
  scale: number,
  zero: number,
): number {
  if (scale === 0) return 0;
  const inverse = 1 / scale;
  let sum = 0;
  for (let i = from; i < end; i += 1) {
    const steps = rows[i]! * inverse + zero;
    let nearest = (steps + 0.5) | 0;
    if (nearest > 15) nearest = 15;
    const error = steps - nearest;
    sum += error * error;
  }
  return sum * scale * scale;
}
