/**
 * Plain elements of stored tensors, and their conversion to float32.
 */
import type { StorageFormat } from './formats.js';

/** Every float16 as float32, by its 16 bits: 256 KB, built on first use of the module. */
const float16 = Float32Array.from({ length: 65536 }, (_, bits) => {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 31;
  const fraction = bits & 1023;
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
});

/** The float32 of a float16, by its 16 bits. */
export const widenFloat16 = (bits: number): number => float16[bits]!;

const F32: StorageFormat = {
  blockElements: 1,
  blockBytes: 4,
  widen(source, byteOffset, count, target, index) {
    const bytes = new Uint8Array(target.buffer, target.byteOffset + 4 * index, 4 * count);
    source.copy(bytes, 0, byteOffset, byteOffset + 4 * count);
  },
};

const F16: StorageFormat = {
  blockElements: 1,
  blockBytes: 2,
  widen(source, byteOffset, count, target, index) {
    const halves = new Uint16Array(source.buffer, source.byteOffset + byteOffset, count);
    for (let i = 0; i < count; i += 1) target[index + i] = float16[halves[i]!]!;
  },
};

const BF16: StorageFormat = {
  blockElements: 1,
  blockBytes: 2,
  widen(source, byteOffset, count, target, index) {
    const halves = new Uint16Array(source.buffer, source.byteOffset + byteOffset, count);
    const bits = new Uint32Array(target.buffer, target.byteOffset + 4 * index, count);
    for (let i = 0; i < count; i += 1) bits[i] = halves[i]! << 16;
  },
};

/** By the names of safetensors and GGUF. */
export const elementFormats = { F32, F16, BF16 } as const;
export type ElementFormat = keyof typeof elementFormats;
