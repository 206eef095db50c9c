/**
 * The block formats of GGUF files: neighbours of a row that share a scale, and a minimum or a scale of scales. Layouts
 * are those of ggml's block structures (ggml-common.h) and dequantize_row functions (ggml-quants.c). Every number
 * below is computed in float64, where all of it is exact, and rounded once, as ggml's float32 arithmetic rounds it once.
 */
import { widenFloat16 } from './elements.js';
import type { StorageFormat } from './formats.js';

/** Turns the block at `at` into numbers from index `to`. */
type WidenBlock = (bytes: Uint8Array, at: number, target: Float32Array, to: number) => void;

const blocks = (blockElements: number, blockBytes: number, widen: WidenBlock): StorageFormat => ({
  blockElements,
  blockBytes,
  widen(source, byteOffset, blockCount, target, index) {
    for (let block = 0; block < blockCount; block += 1) {
      widen(source, byteOffset + block * blockBytes, target, index + block * blockElements);
    }
  },
});

const half = (bytes: Uint8Array, at: number): number =>
  widenFloat16(bytes[at]! | (bytes[at + 1]! << 8));

/** A byte as a signed number. */
const signed = (byte: number): number => (byte << 24) >> 24;

// scale (2), 16 bytes: byte j holds elements j and j + 16.
const Q4_0 = blocks(32, 18, (bytes, at, target, to) => {
  const scale = half(bytes, at);
  for (let j = 0; j < 16; j += 1) {
    const pair = bytes[at + 2 + j]!;
    target[to + j] = ((pair & 15) - 8) * scale;
    target[to + 16 + j] = ((pair >> 4) - 8) * scale;
  }
});

// scale (2), minimum (2), 16 bytes as in Q4_0.
const Q4_1 = blocks(32, 20, (bytes, at, target, to) => {
  const scale = half(bytes, at);
  const minimum = half(bytes, at + 2);
  for (let j = 0; j < 16; j += 1) {
    const pair = bytes[at + 4 + j]!;
    target[to + j] = (pair & 15) * scale + minimum;
    target[to + 16 + j] = (pair >> 4) * scale + minimum;
  }
});

/** Four bytes: the fifth bit of element j is bit j. */
const fifthBits = (bytes: Uint8Array, at: number): number =>
  bytes[at]! | (bytes[at + 1]! << 8) | (bytes[at + 2]! << 16) | (bytes[at + 3]! << 24);

// scale (2), fifth bits (4), 16 bytes as in Q4_0.
const Q5_0 = blocks(32, 22, (bytes, at, target, to) => {
  const scale = half(bytes, at);
  const high = fifthBits(bytes, at + 2);
  for (let j = 0; j < 16; j += 1) {
    const pair = bytes[at + 6 + j]!;
    target[to + j] = (((pair & 15) | (((high >> j) & 1) << 4)) - 16) * scale;
    target[to + 16 + j] = (((pair >> 4) | (((high >> (j + 16)) & 1) << 4)) - 16) * scale;
  }
});

// scale (2), minimum (2), fifth bits (4), 16 bytes as in Q4_0.
const Q5_1 = blocks(32, 24, (bytes, at, target, to) => {
  const scale = half(bytes, at);
  const minimum = half(bytes, at + 2);
  const high = fifthBits(bytes, at + 4);
  for (let j = 0; j < 16; j += 1) {
    const pair = bytes[at + 8 + j]!;
    target[to + j] = ((pair & 15) | (((high >> j) & 1) << 4)) * scale + minimum;
    target[to + 16 + j] = ((pair >> 4) | (((high >> (j + 16)) & 1) << 4)) * scale + minimum;
  }
});

// scale (2), 32 signed bytes.
const Q8_0 = blocks(32, 34, (bytes, at, target, to) => {
  const scale = half(bytes, at);
  for (let j = 0; j < 32; j += 1) target[to + j] = signed(bytes[at + 2 + j]!) * scale;
});

// 16 bytes of scale (low) and minimum (high) of 16 elements each, 64 bytes of 2-bit numbers, scale of scales (2),
// scale of minima (2). Byte l of a half's 32 holds elements l, l + 32, l + 64 and l + 96 of the half.
const Q2_K = blocks(256, 84, (bytes, at, target, to) => {
  const scaleScale = half(bytes, at + 80);
  const minimumScale = half(bytes, at + 82);
  for (let group = 0; group < 16; group += 1) {
    const scale = scaleScale * (bytes[at + group]! & 15);
    const minimum = minimumScale * (bytes[at + group]! >> 4);
    const from = at + 16 + 32 * (group >> 3) + 16 * (group & 1);
    const shift = group & 6;
    const first = to + 16 * group;
    for (let l = 0; l < 16; l += 1) {
      target[first + l] = scale * ((bytes[from + l]! >> shift) & 3) - minimum;
    }
  }
});

// 32 bytes of third bits (bit b of byte l is that of element 32 b + l; unset subtracts 4), 64 bytes of 2-bit numbers as
// in Q2_K, 12 bytes of sixteen 6-bit scales (32 is zero), scale of scales (2).
const Q3_K = blocks(256, 110, (bytes, at, target, to) => {
  const scaleScale = half(bytes, at + 108);
  for (let group = 0; group < 16; group += 1) {
    const low = (bytes[at + 96 + (group & 7)]! >> (group < 8 ? 0 : 4)) & 15;
    const high = (bytes[at + 104 + (group & 3)]! >> (2 * (group >> 2))) & 3;
    const scale = scaleScale * ((low | (high << 4)) - 32);
    const side = 16 * (group & 1);
    const from = at + 32 + 32 * (group >> 3) + side;
    const third = at + side;
    const bit = group >> 1;
    const shift = group & 6;
    const first = to + 16 * group;
    for (let l = 0; l < 16; l += 1) {
      const number = (bytes[from + l]! >> shift) & 3;
      target[first + l] = scale * (number - 4 + (((bytes[third + l]! >> bit) & 1) << 2));
    }
  }
});

/** Scale `group` of eight, of the 12 bytes that hold eight 6-bit scales and minima. */
const scaleOf = (bytes: Uint8Array, at: number, group: number): number =>
  group < 4
    ? bytes[at + group]! & 63
    : (bytes[at + group + 4]! & 15) | ((bytes[at + group - 4]! >> 6) << 4);

const minimumOf = (bytes: Uint8Array, at: number, group: number): number =>
  group < 4
    ? bytes[at + group + 4]! & 63
    : (bytes[at + group + 4]! >> 4) | ((bytes[at + group]! >> 6) << 4);

// scale of scales (2), scale of minima (2), 12 bytes of scales and minima, 128 bytes: byte l of a quarter's 32 holds
// elements l and l + 32 of the quarter.
const Q4_K = blocks(256, 144, (bytes, at, target, to) => {
  const scaleScale = half(bytes, at);
  const minimumScale = half(bytes, at + 2);
  for (let group = 0; group < 8; group += 1) {
    const scale = scaleScale * scaleOf(bytes, at + 4, group);
    const minimum = minimumScale * minimumOf(bytes, at + 4, group);
    const from = at + 16 + 32 * (group >> 1);
    const shift = 4 * (group & 1);
    const first = to + 32 * group;
    for (let l = 0; l < 32; l += 1) {
      target[first + l] = scale * ((bytes[from + l]! >> shift) & 15) - minimum;
    }
  }
});

// As Q4_K, with 32 bytes of fifth bits before the 128: bit b of byte l is that of element 32 b + l.
const Q5_K = blocks(256, 176, (bytes, at, target, to) => {
  const scaleScale = half(bytes, at);
  const minimumScale = half(bytes, at + 2);
  for (let group = 0; group < 8; group += 1) {
    const scale = scaleScale * scaleOf(bytes, at + 4, group);
    const minimum = minimumScale * minimumOf(bytes, at + 4, group);
    const from = at + 48 + 32 * (group >> 1);
    const shift = 4 * (group & 1);
    const first = to + 32 * group;
    for (let l = 0; l < 32; l += 1) {
      const fifth = ((bytes[at + 16 + l]! >> group) & 1) << 4;
      target[first + l] = scale * (((bytes[from + l]! >> shift) & 15) | fifth) - minimum;
    }
  }
});

// 128 bytes of low 4 bits, 64 of high 2 bits, 16 signed scales of 16 elements each, scale of scales (2). Of a half's 64
// low bytes, byte l holds elements l and l + 64 of the half; of its 32 high ones, l, l + 32, l + 64 and l + 96.
const Q6_K = blocks(256, 210, (bytes, at, target, to) => {
  const scaleScale = half(bytes, at + 208);
  for (let group = 0; group < 16; group += 1) {
    const scale = scaleScale * signed(bytes[at + 192 + group]!);
    const side = 16 * (group & 1);
    const quarter = (group >> 1) & 3;
    const low = at + 64 * (group >> 3) + 32 * (quarter & 1) + side;
    const high = at + 128 + 32 * (group >> 3) + side;
    const lowShift = 4 * (quarter >> 1);
    const highShift = 2 * quarter;
    const first = to + 16 * group;
    for (let l = 0; l < 16; l += 1) {
      const number =
        ((bytes[low + l]! >> lowShift) & 15) | (((bytes[high + l]! >> highShift) & 3) << 4);
      target[first + l] = scale * (number - 32);
    }
  }
});

/** By ggml's names. */
export const blockFormats = {
  Q8_0,
  Q4_0,
  Q4_1,
  Q5_0,
  Q5_1,
  Q2_K,
  Q3_K,
  Q4_K,
  Q5_K,
  Q6_K,
} as const;
export type BlockFormat = keyof typeof blockFormats;
