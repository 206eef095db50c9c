/**
 * Numbers as GGUF files store them, after ggml's quantize_row_*_ref functions (ggml-quants.c). Each quantizer also tells
 * what the stored bytes mean, so that nothing of the product's reader is needed to know it.
 */

export interface Quantized {
  readonly bytes: Uint8Array;
  /** What a reader must make of them. */
  readonly numbers: Float32Array;
}

export type Quantizer = (floats: Float32Array) => Quantized;

export const BLOCK_ELEMENTS = 32;

/** Float16 bits of a number, rounded to even. */
export function toHalf(x: number): number {
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const size = Math.abs(x);
  // Below 2^-14 numbers lie 2^-24 apart; above, 1024 of them between a power of two and the next.
  const exponent = size < 2 ** -14 ? -14 : Math.floor(Math.log2(size));
  const steps = roundToEven(size / 2 ** (exponent - 10));
  const bits = (size < 2 ** -14 ? 0 : (exponent + 14) << 10) + steps;
  if (bits >= 0x7c00) throw new RangeError(`${x} is too large for a float16`);
  return sign | bits;
}

function fromHalf(bits: number): number {
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  const size = exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25);
  return (bits & 0x8000) === 0 ? size : -size;
}

function roundToEven(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  if (rest !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** A byte for each number, one scale for 32. */
export const toQ8_0: Quantizer = (floats) => {
  const bytes = Buffer.alloc((floats.length / BLOCK_ELEMENTS) * 34);
  const numbers = new Float32Array(floats.length);
  eachBlock(floats, (block, index) => {
    const at = index * 34;
    const exact = block.reduce((most, x) => Math.max(most, Math.abs(x)), 0) / 127;
    const scale = storeScale(bytes, at, exact);
    block.forEach((x, j) => {
      const q = exact === 0 ? 0 : Math.round(x / exact);
      bytes.writeInt8(q, at + 2 + j);
      numbers[index * BLOCK_ELEMENTS + j] = q * scale;
    });
  });
  return { bytes, numbers };
};

/** Half a byte for each number, one scale for 32: the number of the largest size becomes -8. */
export const toQ4_0: Quantizer = (floats) => {
  const bytes = Buffer.alloc((floats.length / BLOCK_ELEMENTS) * 18);
  const numbers = new Float32Array(floats.length);
  eachBlock(floats, (block, index) => {
    const at = index * 18;
    const exact = block.reduce((far, x) => (Math.abs(x) > Math.abs(far) ? x : far), 0) / -8;
    const scale = storeScale(bytes, at, exact);
    block.forEach((x, j) => {
      const q = exact === 0 ? 8 : Math.min(15, Math.floor(x / exact + 8.5));
      bytes[at + 2 + (j % 16)]! |= j < 16 ? q : q << 4;
      numbers[index * BLOCK_ELEMENTS + j] = (q - 8) * scale;
    });
  });
  return { bytes, numbers };
};

/** Rounded to even. */
export const toF16: Quantizer = (floats) => {
  const halves = Uint16Array.from(floats, toHalf);
  return {
    bytes: new Uint8Array(halves.buffer),
    numbers: Float32Array.from(halves, fromHalf),
  };
};

export const toF32: Quantizer = (floats) => ({
  bytes: new Uint8Array(floats.buffer, floats.byteOffset, floats.byteLength),
  numbers: floats,
});

function eachBlock(
  floats: Float32Array,
  visit: (block: Float32Array, index: number) => void,
): void {
  for (let index = 0; index * BLOCK_ELEMENTS < floats.length; index += 1) {
    visit(floats.subarray(index * BLOCK_ELEMENTS, (index + 1) * BLOCK_ELEMENTS), index);
  }
}

/** The scale that a reader will find. */
function storeScale(bytes: Buffer, at: number, exact: number): number {
  const half = toHalf(exact);
  bytes.writeUInt16LE(half, at);
  return fromHalf(half);
}
