/**
 * Readers of .pth (zip and pickle), safetensors, GGUF and SentencePiece files, and of kept weights, against damaged input;
 * texts are in fuzzed-texts. CARAVAN_LONG=1 tries 100,000 inputs a reader.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { embeddedModelPath, rankBytes } from '../model/checkpoint.js';
import { formatOf } from '../model/formats.js';
import { readGgufFile } from '../model/gguf-file.js';
import { openGguf } from '../model/gguf.js';
import { planRanks, slicesOf } from '../model/plan.js';
import { readPthFile } from '../model/pth.js';
import { readSafetensorsHeader } from '../model/safetensors.js';
import { parseSentencePieceModel } from '../model/sentencepiece.js';
import type { StoredTensor } from '../model/stored-tensor.js';
import { openTokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import { DamagedWeights, WeightFileReader, WeightFileWriter } from '../worker/weight-file.js';
import { fuzzAll, JSON_WORDS, type FuzzTarget } from './fuzz.js';
import { ggufBytes, uint64, value, valueTypes } from './gguf-writer.js';
import { pickleOf, pthBytes, type PthTensor } from './pth-writer.js';
import { tinyGguf } from './tiny-gguf.js';

/** Whatever was taken lies within its file; of formats that no slice is read of, the bytes that are named. */
function assertWithin(tensors: ReadonlyMap<string, StoredTensor>, fileBytes: number): void {
  for (const [name, { shape, strides, format, offset, byteCount }] of tensors) {
    const known = formatOf(format);
    if (known === undefined) {
      assert.ok(offset >= 0 && byteCount >= 0 && offset + byteCount <= fileBytes, name);
      continue;
    }
    if (shape.includes(0)) continue;
    const last =
      strides === undefined
        ? shape.reduce((product, n) => product * n, 1) - 1
        : (shape[0]! - 1) * strides[0] + (shape[1]! - 1) * strides[1];
    const neededBytes = ((last + 1) / known.blockElements) * known.blockBytes;
    assert.ok(offset >= 0 && offset + neededBytes <= fileBytes, name);
  }
}

const storage = (key: string, format: 'F32' | 'BF16', elementCount: number) => ({
  ...{ key, format, elementCount },
  bytes: new Uint8Array(elementCount * (format === 'F32' ? 4 : 2)).fill(7),
});
const shared = storage('1', 'BF16', 24);
const tensors: PthTensor[] = [
  { name: 'layers.0.attention.wq.weight', storage: storage('0', 'F32', 12), shape: [3, 4] },
  { name: 'layers.0.attention.wo.weight', storage: shared, shape: [4, 3], strides: [1, 4] },
  { name: 'norm.weight', storage: shared, shape: [12], start: 12 },
];

const pth: FuzzTarget = {
  seeds: [
    pthBytes(tensors),
    pthBytes(tensors.slice(0, 1)),
    pthBytes(
      tensors,
      Buffer.concat([Buffer.from([0x80, 4, 0x95]), Buffer.alloc(8), pickleOf(tensors).subarray(2)]),
    ),
  ],
  words: [
    'PK\x01\x02',
    'PK\x03\x04',
    'PK\x05\x06',
    'PK\x06\x06',
    'cos\nsystem\n',
    'ctorch\nHalfStorage\n',
    'ctorch._utils\n_rebuild_parameter\n',
    ...['(', 't', 'R', 'Q', 'u', 's', 'b', '}', ']', ')', '.', 'N', '0', 'e', 'a', 'X', 'j'],
    ...[0x81, 0x85, 0x86, 0x87, 0x8a, 0x93, 0x94].map((byte) => Uint8Array.of(byte)),
  ],
  isFile: true,
  read: (input, file) => {
    assertWithin(readPthFile(file).tensors, input.length);
  },
};

function safetensorsBytes(header: object, dataBytes: number): Buffer {
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([length, text, Buffer.alloc(dataBytes, 3)]);
}

const safetensors: FuzzTarget = {
  seeds: [
    safetensorsBytes(
      {
        __metadata__: { format: 'pt' },
        'model.norm.weight': { dtype: 'F32', shape: [4], data_offsets: [0, 16] },
        'lm_head.weight': { dtype: 'BF16', shape: [2, 4], data_offsets: [16, 32] },
      },
      32,
    ),
    safetensorsBytes({ a: { dtype: 'I64', shape: [], data_offsets: [0, 8] } }, 8),
    safetensorsBytes({}, 0),
  ],
  words: [
    ...['"', '{', '}', '[', ']', ',', ':', '-1', '1e400', '9007199254740993', 'null', 'true'],
    ...['\\n', '\\u2028', '"__proto__":', '"dtype"', '"shape"', '"data_offsets"', '[[[[[['],
  ],
  isFile: true,
  read: (input, file) => {
    assertWithin(readSafetensorsHeader(file).tensors, input.length);
  },
};

const gguf: FuzzTarget = {
  seeds: [
    ggufBytes(tinyGguf),
    ggufBytes({
      ...tinyGguf,
      metadata: [
        ...tinyGguf.metadata.filter(([key]) => key !== 'tokenizer.ggml.model'),
        ['tokenizer.ggml.model', value.text('gpt2')],
        ['tokenizer.ggml.pre', value.text('smollm')],
        ['tokenizer.ggml.merges', value.list(valueTypes.text, [value.text('B B')])],
      ],
    }),
    // Without the tensors, so that most damages hit the metadata.
    ggufBytes({ ...tinyGguf, tensors: [] }),
    ggufBytes({
      metadata: [['a', value.list(valueTypes.list, [value.list(0, [])])]],
      tensors: [{ name: 'b', shape: [2, 32], format: 'Q8_0', bytes: new Uint8Array(68) }],
    }),
  ],
  words: [
    ...Object.values(valueTypes).map((type) => Uint8Array.of(type, 0, 0, 0)),
    ...[5n, 64n, 10n ** 9n, 2n ** 61n].map(uint64),
    ...['GGUF', 'llama.', 'gpt2', 'split.count', '.weight', 'rope_freqs.weight', '\n', '\u2028'],
  ],
  isFile: true,
  read: (input, file) => {
    assertWithin(readGgufFile(file).tensors, input.length);
    const checkpoint = openGguf(file);
    const plan = planRanks(checkpoint.config, 1)[0]!;
    assert.ok(rankBytes(checkpoint, slicesOf(checkpoint.config, plan)) <= input.length);
    const tokenizerFiles = checkpoint.readTokenizerFiles();
    if (tokenizerFiles.size > 0) openTokenizer(tokenizerFiles);
  },
};

const model = fs.readFileSync(path.join(embeddedModelPath(), 'tokenizer.model'));
const sentencePiece: FuzzTarget = {
  // Whole, and its first pieces alone, where a damage hits more.
  seeds: [model, model.subarray(0, 200), model.subarray(-120)],
  words: [
    Uint8Array.of(0x0a),
    Uint8Array.of(0x12),
    Uint8Array.of(0x1a),
    Uint8Array.of(0xff, 0xff, 0xff, 0xff, 0x0f),
    Uint8Array.of(0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01),
    Uint8Array.of(0x18, 0x06),
    '<0x41>',
    '<s>',
  ],
  isFile: false,
  read: (input) => {
    const { pieces } = parseSentencePieceModel(input, 'tokenizer.model');
    assert.ok(pieces.length <= input.length);
  },
};

const OWNER = { digest: 'f'.repeat(32), rank: 1 };
async function weightFileBytes(arrays: Readonly<Record<string, number>>): Promise<Buffer> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-weight-file-'));
  const file = path.join(folder, 'weights');
  const writer = await WeightFileWriter.create(file);
  for (const [name, count] of Object.entries(arrays)) {
    await writer.append(name, new Uint8Array(count).fill(3).buffer);
  }
  await writer.finish(OWNER);
  const bytes = fs.readFileSync(file);
  fs.rmSync(folder, { recursive: true });
  return bytes;
}

const weightSeeds = [await weightFileBytes({ a: 10, b: 4100 }), await weightFileBytes({})];
/** The table as somebody would write it who knows the checksums: only its meaning is damaged then. */
const sealed = (bytes: Buffer): Buffer => {
  const start = bytes.lastIndexOf('{"digest"');
  const end = bytes.lastIndexOf('CRVNWGT1');
  if (start < 0 || end < start || end + 48 > bytes.length) return bytes;
  const copy = Buffer.from(bytes.subarray(0, end + 48));
  copy.writeBigUInt64LE(BigInt(end - start), end + 8);
  createHash('sha256')
    .update(copy.subarray(start, end))
    .digest()
    .copy(copy, end + 16);
  return copy;
};

const weightFile: FuzzTarget = {
  seeds: weightSeeds,
  words: [...JSON_WORDS, 'CRVNWGT1', '"rank":', '"arrays":', '["a",10,"', 'ffff'],
  isFile: true,
  read: (input, file) => {
    const whole = input.length % 2 === 0 ? sealed(input) : input;
    if (whole !== input) fs.writeFileSync(file, whole);
    let reader: WeightFileReader | null = null;
    try {
      reader = WeightFileReader.open(file, OWNER);
      assert.ok(reader !== null && reader.byteCount === whole.length);
      const array = new Uint8Array(reader.take('a', 10));
      // Memory behind the end of the file would end the process.
      assert.ok(array.reduce((sum, byte) => sum + byte, 0) >= 0);
    } catch (error) {
      if (!(error instanceof DamagedWeights)) throw error;
      throw new CaravanError('invalid_checkpoint', error.message, { cause: error });
    } finally {
      reader?.close();
    }
  },
};

fuzzAll({ pth, safetensors, gguf, 'tokenizer.model': sentencePiece, 'kept weights': weightFile });
