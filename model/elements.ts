/**
 * Element formats of stored tensors, and their conversion to float32.
 */

/** Bytes of one element. */
export const elementBytes = { F32: 4, F16: 2, BF16: 2 } as const;
export type ElementFormat = keyof typeof elementBytes;

export const isElementFormat = (format: string): format is ElementFormat =>
  Object.hasOwn(elementBytes, format);

/** Every float16 as float32, by its 16 bits: 256 KB, built on first use of the module. */
const float16 = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

/** Widens `count` elements of `source`, from byte `byteOffset`, into `target` from index `index`. */
export function widen(
  format: ElementFormat,
  source: Buffer,
  byteOffset: number,
  count: number,
  target: Float32Array,
  index: number,
): void {
  switch (format) {
    case 'F32': {
      const bytes = new Uint8Array(target.buffer, target.byteOffset + 4 * index, 4 * count);
      source.copy(bytes, 0, byteOffset, byteOffset + 4 * count);
      return;
    }
    case 'F16': {
      const halves = new Uint16Array(source.buffer, source.byteOffset + byteOffset, count);
      for (let i = 0; i < count; i += 1) target[index + i] = float16[halves[i]!]!;
      return;
    }
    case 'BF16': {
      const halves = new Uint16Array(source.buffer, source.byteOffset + byteOffset, count);
      const bits = new Uint32Array(target.buffer, target.byteOffset + 4 * index, count);
      for (let i = 0; i < count; i += 1) bits[i] = halves[i]! << 16;
      return;
    }
  }
}
