/**
 * Readers of .pth, safetensors, GGUF and SentencePiece files, of JSON beside them, and of kept weights, against damaged
 * input. CARAVAN_LONG=1 tries 100,000 inputs and more a reader.
 */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { embeddedModelPath, rankBytes } from '../model/checkpoint.js';
import { parseHuggingFaceConfig, type LlamaConfig } from '../model/config.js';
import { formatOf } from '../model/formats.js';
import { readGgufFile } from '../model/gguf-file.js';
import { openGguf } from '../model/gguf.js';
import { parseMetaParams } from '../model/meta-params.js';
import { planRanks, slicesOf } from '../model/plan.js';
import { readPthFile } from '../model/pth.js';
import { readSafetensorsHeader } from '../model/safetensors.js';
import { parseSentencePieceModel } from '../model/sentencepiece.js';
import type { StoredTensor } from '../model/stored-tensor.js';
import { openTokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import { DamagedWeights, WeightFileReader, WeightFileWriter } from '../worker/weight-file.js';
import { byteLevelTokenizer, fileOf } from './byte-level-tokenizer.js';
import { fuzz, spellReport, type FuzzTarget } from './fuzz.js';
import { ggufBytes, uint64, value, valueTypes } from './gguf-writer.js';
import { pickleOf, pthBytes, type PthTensor } from './pth-writer.js';
import { tinyGguf } from './tiny-gguf.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const COUNT = isLong ? 120_000 : 6_000;

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

const jsonWords = [
  ...['"', '{', '}', '[', ']', ',', ':', '-1', '1e400', '9007199254740993', 'null', 'true', '0.5'],
  ...['\\n', '\\u2028', '"__proto__":', '[[[[[[', '""', '1e9', '4294967296'],
];
const text = (input: Buffer): string => input.toString('utf8');

/** Whatever was taken is a network that can be planned. */
function assertPlannable(config: LlamaConfig): void {
  for (const size of [config.hiddenSize, config.layerCount, config.headCount, config.vocabSize]) {
    assert.ok(Number.isSafeInteger(size) && size > 0, JSON.stringify(config));
  }
  assert.equal(config.headCount % config.kvHeadCount, 0);
  planRanks(config, 1);
}

const configJson: FuzzTarget = {
  seeds: [
    {
      ...{ model_type: 'llama', hidden_size: 64, intermediate_size: 172, num_hidden_layers: 5 },
      ...{ num_attention_heads: 8, num_key_value_heads: 4, vocab_size: 512, rms_norm_eps: 1e-5 },
      ...{ hidden_act: 'silu', max_position_embeddings: 512, rope_theta: 10_000 },
      ...{ tie_word_embeddings: true, torch_dtype: 'float32' },
    },
    {
      ...{ model_type: 'llama', hidden_size: 64, intermediate_size: 96, num_hidden_layers: 1 },
      ...{ num_attention_heads: 4, vocab_size: 99, max_position_embeddings: 64 },
      rms_norm_eps: 1e-6,
      rope_scaling: {
        ...{ rope_type: 'llama3', factor: 8, low_freq_factor: 1, high_freq_factor: 4 },
        original_max_position_embeddings: 64,
      },
    },
  ].map((json) => Buffer.from(JSON.stringify(json))),
  words: [...jsonWords, '"rope_scaling":', '"type":"dynamic"', '"head_dim":', '"sliding_window":'],
  isFile: false,
  read: (input) => {
    assertPlannable(parseHuggingFaceConfig(text(input), 'config.json'));
  },
};

const paramsJson: FuzzTarget = {
  seeds: [
    {
      ...{ dim: 4096, n_layers: 32, n_heads: 32, multiple_of: 256, norm_eps: 1e-5 },
      vocab_size: -1,
    },
    {
      ...{ dim: 8192, n_layers: 80, n_heads: 64, n_kv_heads: 8, multiple_of: 4096 },
      ...{ ffn_dim_multiplier: 1.3, norm_eps: 1e-5, vocab_size: 32_000, rope_theta: 1e6 },
    },
  ].map((json) => Buffer.from(JSON.stringify(json))),
  words: [...jsonWords, '"max_seq_len":', '"n_kv_heads":', '"use_scaled_rope":'],
  isFile: false,
  read: (input) => {
    assertPlannable(parseMetaParams(text(input), 'params.json', () => 32_000));
  },
};

const eosConfig = Buffer.from('{"bos_token_id": 0, "eos_token_id": 0}');
const tokenizerJson: FuzzTarget = {
  seeds: [
    fileOf(byteLevelTokenizer([{ content: '<|im_end|>', special: true }]).json),
    fileOf({
      version: '1.0',
      added_tokens: [{ id: 0, content: '<unk>', special: true }],
      normalizer: { type: 'Prepend', prepend: '▁' },
      decoder: { type: 'ByteFallback' },
      model: {
        ...{ type: 'BPE', unk_token: '<unk>', byte_fallback: true, fuse_unk: true },
        ...{ vocab: { '<unk>': 0, '▁': 1, a: 2, '▁a': 3 }, merges: ['▁ a'] },
      },
    }),
  ],
  words: [...jsonWords, '"type":"Unigram"', '"merges":', '"vocab":', '"id":', '"Split"', '(a+)+$'],
  isFile: false,
  read: (input) => {
    const files = { 'tokenizer.json': input, 'config.json': eosConfig };
    const tokenizer = openTokenizer(new Map(Object.entries(files)));
    assert.ok(tokenizer.vocabSize >= 0);
    const ids = tokenizer.encode('a llama, end');
    assert.ok(ids.every((id) => Number.isSafeInteger(id)));
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
  words: [...jsonWords, 'CRVNWGT1', '"rank":', '"arrays":', '["a",10,"', 'ffff'],
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

for (const [name, target] of Object.entries({
  pth,
  safetensors,
  gguf,
  'tokenizer.model': sentencePiece,
  'tokenizer.json': tokenizerJson,
  'config.json': configJson,
  'params.json': paramsJson,
  'kept weights': weightFile,
})) {
  void test(`${name}: ${COUNT} damaged inputs are taken or refused in one line`, (t) => {
    const report = fuzz(target, COUNT, 20_231);
    t.diagnostic(spellReport(report));
    // Damages that change nothing of importance, and many that do.
    assert.ok(report.accepted > COUNT / 100, String(report.accepted));
    assert.ok(report.refusals.size > 8, String(report.refusals.size));
  });
}
