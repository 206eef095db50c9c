/**
 * Every format of GGUF against a decoder that goes number by number, in float64, straight from ggml's structures
 * (ggml-common.h): whole rows of random blocks, and slices that begin and end within blocks.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { formatNames, formatOf } from '../model/formats.js';
import { SliceReader } from '../model/slice-reader.js';
import { wholeTensor } from '../model/stored-tensor.js';
import { Random } from './random.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-blocks-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

/** A float16, by IEEE 754. */
function half(block: DataView, at: number): number {
  const bits = block.getUint16(at, true);
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits % 1024];
  return (
    sign * (exponent === 0 ? fraction / 2 ** 24 : (1 + fraction / 1024) * 2 ** (exponent - 15))
  );
}

/** Number i of 32 in nibbles: the first 16 are the low ones. */
const nibble = (block: DataView, at: number, i: number): number =>
  i < 16 ? block.getUint8(at + i) % 16 : block.getUint8(at + i - 16) >>> 4;

const fifth = (block: DataView, at: number, i: number): number =>
  16 * ((block.getUint32(at, true) >>> i) & 1);

/** Number i of 256 in 2 bits: of each half of 128, four runs of 32 share 32 bytes. */
const crumb = (block: DataView, at: number, i: number): number =>
  (block.getUint8(at + 32 * Math.floor(i / 128) + (i % 32)) >>> (2 * Math.floor((i % 128) / 32))) &
  3;

/** Number i of 256 in 4 bits: of each 64, two runs of 32 share 32 bytes. */
const nibbleOf64 = (block: DataView, at: number, i: number): number =>
  (block.getUint8(at + 32 * Math.floor(i / 64) + (i % 32)) >>> (i % 64 < 32 ? 0 : 4)) & 15;

/** ggml's get_scale_min_k4. */
function scaleAndMinimum(block: DataView, at: number, j: number): [number, number] {
  const q = (k: number): number => block.getUint8(at + k);
  if (j < 4) return [q(j) & 63, q(j + 4) & 63];
  return [(q(j + 4) & 0xf) | ((q(j - 4) >> 6) << 4), (q(j + 4) >> 4) | ((q(j) >> 6) << 4)];
}

/** Q3_K's sixteen scales, unpacked as ggml does it: four words at once. */
function scalesOf3(block: DataView, at: number): DataView {
  const [a, b, tmp] = [0, 4, 8].map((k) => block.getUint32(at + k, true)) as [
    number,
    number,
    number,
  ];
  const [two, four] = [0x03030303, 0x0f0f0f0f];
  const words = [
    (a & four) | ((tmp & two) << 4),
    (b & four) | (((tmp >>> 2) & two) << 4),
    ((a >>> 4) & four) | (((tmp >>> 4) & two) << 4),
    ((b >>> 4) & four) | (((tmp >>> 6) & two) << 4),
  ];
  const scales = new DataView(new ArrayBuffer(16));
  words.forEach((word, k) => {
    scales.setUint32(4 * k, word >>> 0, true);
  });
  return scales;
}

function sixBits(block: DataView, i: number): number {
  const [part, run, l] = [Math.floor(i / 128), Math.floor((i % 128) / 32), i % 32];
  const low = block.getUint8(64 * part + 32 * (run % 2) + l);
  const high = block.getUint8(128 + 32 * part + l);
  return ((run < 2 ? low : low >>> 4) & 15) + 16 * ((high >>> (2 * run)) & 3);
}

/** By format: elements and bytes of a block, where its float16 numbers lie, and number i of it. */
const decoders: Readonly<
  Record<string, readonly [number, number, readonly number[], (b: DataView, i: number) => number]>
> = {
  F32: [1, 4, [], (b) => b.getFloat32(0, true)],
  F16: [1, 2, [0], (b) => half(b, 0)],
  BF16: [
    1,
    2,
    [],
    (b) => {
      const wide = new DataView(new ArrayBuffer(4));
      wide.setUint16(2, b.getUint16(0, true), true);
      return wide.getFloat32(0, true);
    },
  ],
  Q8_0: [32, 34, [0], (b, i) => half(b, 0) * b.getInt8(2 + i)],
  Q4_0: [32, 18, [0], (b, i) => half(b, 0) * (nibble(b, 2, i) - 8)],
  Q4_1: [32, 20, [0, 2], (b, i) => half(b, 0) * nibble(b, 4, i) + half(b, 2)],
  Q5_0: [32, 22, [0], (b, i) => half(b, 0) * (nibble(b, 6, i) + fifth(b, 2, i) - 16)],
  Q5_1: [32, 24, [0, 2], (b, i) => half(b, 0) * (nibble(b, 8, i) + fifth(b, 4, i)) + half(b, 2)],
  Q2_K: [
    256,
    84,
    [80, 82],
    (b, i) => {
      const scales = b.getUint8(Math.floor(i / 16));
      return half(b, 80) * (scales % 16) * crumb(b, 16, i) - half(b, 82) * (scales >>> 4);
    },
  ],
  Q3_K: [
    256,
    110,
    [108],
    (b, i) => {
      const scale = scalesOf3(b, 96).getInt8(Math.floor(i / 16)) - 32;
      const isSet = (b.getUint8(i % 32) >>> Math.floor(i / 32)) & 1;
      return half(b, 108) * scale * (crumb(b, 32, i) - (isSet === 1 ? 0 : 4));
    },
  ],
  Q4_K: [
    256,
    144,
    [0, 2],
    (b, i) => {
      const [scale, minimum] = scaleAndMinimum(b, 4, Math.floor(i / 32));
      return half(b, 0) * scale * nibbleOf64(b, 16, i) - half(b, 2) * minimum;
    },
  ],
  Q5_K: [
    256,
    176,
    [0, 2],
    (b, i) => {
      const [scale, minimum] = scaleAndMinimum(b, 4, Math.floor(i / 32));
      const high = 16 * ((b.getUint8(16 + (i % 32)) >>> Math.floor(i / 32)) & 1);
      return half(b, 0) * scale * (nibbleOf64(b, 48, i) + high) - half(b, 2) * minimum;
    },
  ],
  Q6_K: [
    256,
    210,
    [208],
    (b, i) => half(b, 208) * b.getInt8(192 + Math.floor(i / 16)) * (sixBits(b, i) - 32),
  ],
};

void test('there is a decoder for every format', () => {
  assert.deepEqual(Object.keys(decoders).sort(), formatNames().sort());
});

const ROWS = 5;
const BLOCKS_A_ROW = 3;

for (const [name, [elements, blockBytes, halves, decode]] of Object.entries(decoders)) {
  void test(`${name}: random blocks, whole and cut`, async () => {
    const format = formatOf(name)!;
    assert.equal(format.blockElements, elements);
    assert.equal(format.blockBytes, blockBytes);
    const random = new Random(name.length * 1000 + blockBytes);
    // Plain elements get rows that are as long.
    const perRow = elements === 1 ? 3 * 32 : BLOCKS_A_ROW;
    const columns = perRow * elements;
    for (let round = 0; round < (isLong ? 200 : 4); round += 1) {
      const bytes = new Uint8Array(ROWS * perRow * blockBytes).map(() => random.below(256));
      const view = new DataView(bytes.buffer);
      const blockAt = (index: number): DataView =>
        new DataView(bytes.buffer, index * blockBytes, blockBytes);
      for (let block = 0; block < ROWS * perRow; block += 1) {
        // No infinities: half an exponent bit less.
        for (const at of halves) {
          const place = block * blockBytes + at;
          view.setUint16(place, view.getUint16(place, true) & 0xbfff, true);
        }
        if (halves.length === 0)
          view.setUint8((block + 1) * blockBytes - 1, random.below(2) * 128 + 60);
      }
      const expected = Float32Array.from({ length: ROWS * columns }, (_, i) =>
        decode(blockAt(Math.floor(i / elements)), i % elements),
      );
      const file = path.join(scratch, name);
      // Where no alignment helps.
      fs.writeFileSync(file, Buffer.concat([Buffer.alloc(7), bytes]));
      const shape = [ROWS, columns];
      const stored = { file, format: name, shape, offset: 7, byteCount: bytes.length };
      const reader = new SliceReader({
        ...openCheckpoint(embeddedModelPath()),
        tensors: new Map([['w', wholeTensor(stored)]]),
      });
      const cuts = [
        { rows: { start: 0, count: ROWS }, columns: { start: 0, count: columns } },
        { rows: { start: 1, count: 3 }, columns: { start: 1, count: columns - 2 } },
        ...Array.from({ length: 6 }, () => {
          const [row, column] = [random.below(ROWS), random.below(columns)];
          return {
            rows: { start: row, count: 1 + random.below(ROWS - row) },
            columns: { start: column, count: 1 + random.below(columns - column) },
          };
        }),
      ];
      for (const cut of cuts) {
        const read = new Float32Array(cut.rows.count * cut.columns.count);
        await reader.read({ tensor: 'w', shape, ...cut }, read, 0);
        const wanted = Float32Array.from(read, (_, i) => {
          const row = cut.rows.start + Math.floor(i / cut.columns.count);
          return expected[row * columns + cut.columns.start + (i % cut.columns.count)]!;
        });
        assert.deepEqual(read, wanted, `${name}, round ${round}: ${JSON.stringify(cut)}`);
      }
      reader.close();
    }
  });
}
