/** GGUF files that mean harm, or are damaged: each is refused in one line that says why. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openCheckpoint, rankBytes } from '../model/checkpoint.js';
import { readGgufFile } from '../model/gguf-file.js';
import { planRanks, slicesOf } from '../model/plan.js';
import { runCli } from './cli.js';
import {
  ggufBytes,
  textBytes,
  uint32,
  uint64,
  value,
  valueTypes,
  type GgufContents,
  type GgufTensor,
  type GgufValue,
} from './gguf-writer.js';
import { assertRefused } from './refusal.js';
import { tinyGguf } from './tiny-gguf.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-hostile-gguf-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});
const file = path.join(scratch, 'model.gguf');

type Metadata = GgufContents['metadata'];

const good = {
  metadata: [['general.name', value.text('A model')]] as Metadata,
  tensors: [
    { name: 'a.weight', shape: [2, 8], format: 'F32', bytes: new Uint8Array(64) },
    { name: 'b.weight', shape: [2, 32], format: 'Q8_0', bytes: new Uint8Array(68) },
    { name: 'c.weight', shape: [8], format: 'F32', bytes: new Uint8Array(32) },
  ] as const satisfies readonly GgufTensor[],
};
const plain = ggufBytes(good);

function refuseHeader(bytes: Uint8Array, says: RegExp): void {
  fs.writeFileSync(file, bytes);
  assertRefused(() => readGgufFile(file), says);
}

const patched = (at: number, bytes: Uint8Array): Buffer => {
  const copy = Buffer.from(plain);
  copy.set(bytes, at);
  return copy;
};
const withEntries = (...entries: Metadata): Buffer =>
  ggufBytes({ ...good, metadata: [...good.metadata, ...entries] });
const withValue = (bytes: GgufValue): Buffer => withEntries(['a.key', bytes]);
/** A list whose header says `count` values. */
const listOf = (type: number, count: number | bigint, ...values: Uint8Array[]): GgufValue => ({
  type: valueTypes.list,
  bytes: Buffer.concat([uint32(type), uint64(count), ...values]),
});
const nested = (depth: number): GgufValue =>
  depth === 0
    ? value.list(valueTypes.uint8, [])
    : value.list(valueTypes.list, [{ ...nested(depth - 1) }]);
const withTensor = (change: Partial<GgufTensor>): Buffer =>
  ggufBytes({ ...good, tensors: [good.tensors[0], { ...good.tensors[1], ...change }] });
/** Where the numbers of the first tensor's sizes begin: after its name and the count of them. */
const firstSizes = plain.indexOf('a.weight') + 8 + 4;

const refusedHeaders: readonly [name: string, bytes: Uint8Array, says: RegExp][] = [
  ['an empty file', Buffer.alloc(0), /the first 24 bytes: needs 4 bytes at 0/],
  ['100 KB of zeros', Buffer.alloc(100_000), /does not begin with "GGUF"/],
  ['a file of the format before', patched(0, Buffer.from('tjgg')), /does not begin with "GGUF"/],
  ['version 1', ggufBytes({ ...good, version: 1 }), /version 1; Caravan reads GGUF 2 and 3/],
  ['version 4', ggufBytes({ ...good, version: 4 }), /version 4; Caravan reads GGUF 2 and 3/],
  ['a big-endian file', patched(4, Uint8Array.of(0, 0, 0, 3)), /is a big-endian file/],
  ['10^9 tensors', ggufBytes({ ...good, tensorCount: 10n ** 9n }), /tensors: 1000000000 do not/],
  ['2^64 - 1 tensors', ggufBytes({ ...good, tensorCount: 2n ** 64n - 1n }), /tensors: 18446744/],
  ['10^9 entries', ggufBytes({ ...good, entryCount: 10n ** 9n }), /metadata: 1000000000 do not/],
  ['2^63 entries', ggufBytes({ ...good, entryCount: 2n ** 63n }), /metadata: 9223372036854775808/],
  [
    'one entry more than there is',
    ggufBytes({ ...good, entryCount: 2n }),
    /tensor 0: bytes of a text: \d+ do not fit/,
  ],
  [
    'one tensor more than there is',
    ggufBytes({ ...good, tensorCount: 4n }),
    /tensor 3 has no name/,
  ],
  ['a key of 2^63 bytes', patched(24, uint64(2n ** 63n)), /entry 0 .*9223372036854775808 do not/],
  ['a key of 70,000 bytes', withEntries(['k'.repeat(70_000), value.uint32(1)]), /70000 bytes; at/],
  ['a key of no bytes', withEntries(['', value.uint32(1)]), /entry 1 of the metadata has no key/],
  [
    'a key that is there twice',
    withEntries(['a.key', value.uint32(1)], ['a.key', value.uint32(1)]),
    /a\.key: is there twice/,
  ],
  [
    'a key of line ends and a bell',
    withEntries(['a\n\u0007\u2028b', value.uint32(1)], ['a\n\u0007\u2028b', value.uint32(1)]),
    /is there twice/,
  ],
  ['a value of type 13', withValue({ type: 13, bytes: uint32(1) }), /a\.key: .*unknown type 13/],
  ['a truth value of 2', withValue({ type: valueTypes.flag, bytes: uint32(2) }), /value is 2/],
  [
    'a text of 2^40 bytes',
    withValue({ type: valueTypes.text, bytes: uint64(2n ** 40n) }),
    /a\.key: bytes of a text: 1099511627776 do not fit into the \d+ bytes/,
  ],
  ['a list of 10^9 bytes', withValue(listOf(0, 1e9)), /a\.key: values: 1000000000 do not fit/],
  ['a list of 10^9 texts', withValue(listOf(8, 1e9)), /a\.key: values: 1000000000 do not fit/],
  ['a list of 10^9 lists', withValue(listOf(9, 1e9)), /a\.key: values: 1000000000 do not fit/],
  ['a list of 2^61 numbers', withValue(listOf(10, 2n ** 61n)), /values: 2305843009213693952/],
  ['a list of type 13', withValue(listOf(13, 1, uint32(1))), /values of the unknown type 13/],
  ['lists within lists', withValue(nested(1_000)), /a\.key: lists within 4 lists/],
  [
    'lists of more values than any model has',
    withValue(
      listOf(valueTypes.list, 3, ...[1, 2, 3].map(() => listOf(8, 2e6, Buffer.alloc(16e6)).bytes)),
    ),
    /a\.key: 2000000 values; at most 1048576/,
  ],
  ['an alignment of 0', withEntries(['general.alignment', value.uint32(0)]), /0 is not a power/],
  ['an alignment of 48', withEntries(['general.alignment', value.uint32(48)]), /48 is not a power/],
  [
    'an alignment of 2^31',
    withEntries(['general.alignment', value.uint32(2 ** 31)]),
    /general\.alignment: 2147483648 is not a power of two up to 2\^20/,
  ],
  [
    'an alignment of 2^64 - 1',
    withEntries(['general.alignment', value.uint64(2n ** 64n - 1n)]),
    /general\.alignment: must be a whole number/,
  ],
  [
    'an alignment in words',
    withEntries(['general.alignment', value.text('32')]),
    /general\.alignment: must be a whole number/,
  ],
  [
    'an alignment that puts the data after the end',
    withEntries(['general.alignment', value.uint32(1 << 20)]),
    /ends before its data/,
  ],
  ['a tensor of no dimension', withTensor({ shape: [] }), /b\.weight: has 0 dimensions/],
  ['five dimensions', withTensor({ shape: [1, 1, 1, 1, 32] }), /b\.weight: has 5 dimensions/],
  [
    '2^32 - 1 dimensions',
    patched(firstSizes - 4, uint32(2 ** 32 - 1)),
    /has 4294967295 dimensions/,
  ],
  ['a tensor of no elements', withTensor({ shape: [0, 32] }), /\[0, 32\] has 0 elements/],
  ['2^96 elements', withTensor({ shape: [2 ** 32, 2 ** 32, 2 ** 32] }), /7922816251426433759/],
  ['2^64 elements, which are 0 in 64 bits', withTensor({ shape: [2 ** 32, 2 ** 32] }), /elements/],
  ['2^52 elements', withTensor({ shape: [2 ** 47, 32] }), /4785074604081152 bytes from .* outside/],
  ['rows of half a block', withTensor({ shape: [4, 16] }), /rows of 16 are not whole Q8_0 blocks/],
  ['format 99', withTensor({ format: 99 }), /b\.weight: has the unknown format 99/],
  ['a format that was taken back', withTensor({ format: 4 }), /has the unknown format 4/],
  ['a format that is not read', withTensor({ format: 20 }), /is IQ4_NL; Caravan reads F32,.*Q6_K/],
  ['an offset between blocks', withTensor({ offset: 65 }), /offset 65 is not a multiple of the/],
  [
    'an offset after the end',
    withTensor({ offset: 2n ** 40n }),
    /b\.weight: its 68 bytes from 10995/,
  ],
  ['an offset of 2^64 - 32', withTensor({ offset: 2n ** 64n - 32n }), /lie outside the file's/],
  ['two tensors at one place', withTensor({ offset: 0 }), /: overlaps /],
  [
    'a tensor that reaches into the next',
    withTensor({ offset: 32 }),
    /b\.weight: overlaps a\.weight/,
  ],
  ['a name that is there twice', withTensor({ name: 'a.weight' }), /a\.weight: is there twice/],
  ['no name', withTensor({ name: '' }), /tensor 1 has no name/],
  [
    'a name of 60,000 letters with a line end',
    withTensor({ name: `b\n${'x'.repeat(60_000)}`, format: 99 }),
    /unknown format 99/,
  ],
];

for (const [name, bytes, says] of refusedHeaders) {
  void test(`a header is refused: ${name}`, () => {
    refuseHeader(bytes, says);
  });
}

void test('a file that ends early is refused, wherever it ends', () => {
  for (let length = 0; length < plain.length; length += 1) {
    refuseHeader(plain.subarray(0, length), /^model\.gguf: /);
  }
  fs.writeFileSync(file, plain);
  assert.deepEqual([...readGgufFile(file).tensors.keys()], ['a.weight', 'b.weight', 'c.weight']);
});

void test('a header of more than 128 MB is not read', () => {
  const text = 2 ** 28;
  const head = withEntries(['a.key', { type: valueTypes.text, bytes: uint64(text) }]);
  fs.writeFileSync(file, head);
  fs.truncateSync(file, head.length + text);
  const before = process.memoryUsage.rss();
  assertRefused(() => readGgufFile(file), /a\.key: .*268435456 do not fit into/);
  assert.ok(process.memoryUsage.rss() - before < 32 << 20);
});

/** What a good model's metadata becomes: an entry changed, or removed. */
function changed(key: string, to: GgufValue | null): GgufContents {
  const { metadata, tensors } = tinyGguf;
  const rest = metadata.filter(([name]) => name !== key);
  return { tensors, metadata: to === null ? rest : [...rest, [key, to]] };
}
/** As a rank opens it. */
function openWhole(model: string): void {
  const checkpoint = openCheckpoint(model);
  rankBytes(checkpoint, slicesOf(checkpoint.config, planRanks(checkpoint.config, 1)[0]!));
}

const refusedModels: readonly [key: string, to: GgufValue | null, says: RegExp][] = [
  ['general.architecture', null, /general\.architecture: is missing/],
  ['general.architecture', value.uint32(7), /general\.architecture: must be a text/],
  ['general.architecture', value.text('qwen2'), /is "qwen2"; Caravan runs "llama"/],
  ['general.architecture', value.text('a\u2028\n\u009b'.repeat(1e5)), /Caravan runs "llama"/],
  ['llama.block_count', null, /llama\.block_count: is missing/],
  ['llama.block_count', value.text('2'), /llama\.block_count: must be a whole number/],
  ['llama.block_count', value.uint32(0), /llama\.block_count: must be above 0/],
  ['llama.block_count', value.uint32(3), /model\.layers\.2\..*: the tensor is missing/],
  ['llama.block_count', value.uint32(1), /blk\.1\.attn_norm\.weight is .*no tensor of a Llama/],
  ['llama.block_count', value.uint32(2 ** 32 - 1), /layerCount is 4294967295; at most 4096/],
  ['llama.block_count', value.uint64(2n ** 53n), /llama\.block_count: must be a whole number/],
  ['llama.attention.head_count', value.uint32(2 ** 32 - 1), /headCount is 4294967295; at most/],
  ['llama.attention.head_count', value.uint32(3), /8 is not a multiple of num_attention_heads 3/],
  [
    'llama.attention.head_count_kv',
    value.uint32(3),
    /4 is not a multiple of num_key_value_heads 3/,
  ],
  ['llama.attention.key_length', value.uint32(3), /the head size 3 is odd/],
  ['llama.feed_forward_length', value.uint32(2 ** 32 - 1), /ffnSize is 4294967295; at most/],
  ['llama.feed_forward_length', value.uint32(16), /the configuration needs \[16, 8\]/],
  ['llama.attention.layer_norm_rms_epsilon', value.float32(NaN), /must be a finite number/],
  ['llama.attention.layer_norm_rms_epsilon', value.float32(0), /must be above 0/],
  ['llama.rope.freq_base', value.float32(-1), /llama\.rope\.freq_base: must be above 0/],
  ['llama.rope.scaling.type', value.text('yarn'), /is "yarn"; Caravan runs "none" and "linear"/],
  ['llama.rope.scaling.factor', value.float32(0.5), /is 0\.5; the least is 1/],
  ['llama.expert_count', value.uint32(8), /llama\.expert_count is 8; Caravan runs 0/],
  ['split.count', value.uint32(3), /the file's name must end in -0000K-of-00003\.gguf/],
  ['split.count', value.uint32(2 ** 32 - 1), /the file's name must end in/],
];

for (const [key, to, says] of refusedModels) {
  const what = to === null ? 'nothing' : Buffer.from(to.bytes).subarray(0, 16).toString('hex');
  void test(`a model is refused: ${key} is ${what}`, () => {
    fs.writeFileSync(file, ggufBytes(changed(key, to)));
    assertRefused(() => {
      openWhole(file);
    }, says);
  });
}

const list = (type: number, count: number, one: GgufValue): GgufValue =>
  value.list(
    type,
    Array.from({ length: count }, () => one),
  );
const refusedTokenizers: readonly [key: string, to: GgufValue | null, says: RegExp][] = [
  ['tokenizer.ggml.model', value.text('bert'), /is "bert"; Caravan runs "llama" and "gpt2"/],
  ['tokenizer.ggml.model', value.text('gpt2'), /tokenizer\.ggml\.merges: is missing/],
  ['tokenizer.ggml.tokens', null, /tokenizer\.ggml\.tokens: is missing/],
  ['tokenizer.ggml.tokens', listOf(0, 2, Uint8Array.of(1, 2)), /must be a list of texts/],
  ['tokenizer.ggml.scores', null, /tokenizer\.ggml\.scores: is missing/],
  ['tokenizer.ggml.scores', list(6, 4, value.float32(0)), /has 4 values for 5 tokens/],
  [
    'tokenizer.ggml.scores',
    listOf(12, 5, Buffer.alloc(40, 0x7e)),
    /scores: token 0 has .*; scores are finite/,
  ],
  [
    'tokenizer.ggml.scores',
    list(6, 5, value.float32(Infinity)),
    /scores: token 0 has .*; scores are finite/,
  ],
  ['tokenizer.ggml.token_type', list(5, 9, value.int32(1)), /has 9 values for 5 tokens/],
  [
    'tokenizer.ggml.token_type',
    list(4, 5, value.uint32(2 ** 32 - 1)),
    /token_type: token 0 is of kind 4294967295/,
  ],
  [
    'tokenizer.ggml.token_type',
    list(6, 5, value.float32(1.5)),
    /token_type: token 0 is of kind 1\.5/,
  ],
  ['tokenizer.ggml.bos_token_id', value.uint32(5), /is 5; there are 5 tokens/],
  ['tokenizer.ggml.eos_token_id', value.int32(-1), /must be a whole number/],
  ['tokenizer.chat_template', value.uint32(1), /tokenizer\.chat_template: must be a text/],
  [
    'tokenizer.chat_templates',
    list(8, 1, value.text('x\u2028\n'.repeat(1e4))),
    /tokenizer\.chat_templates: ".*" is no name/,
  ],
];

for (const [key, to, says] of refusedTokenizers) {
  const what = to === null ? 'nothing' : Buffer.from(to.bytes).subarray(0, 16).toString('hex');
  void test(`a tokenizer is refused: ${key} is ${what}`, () => {
    fs.writeFileSync(file, ggufBytes(changed(key, to)));
    assertRefused(() => openCheckpoint(file).readTokenizerFiles(), says);
  });
}

void test('a splitting of bytes that is not known, and merges of no pair, are refused', () => {
  const { text } = valueTypes;
  const gpt2 = (pre: string, merge: string): GgufContents => ({
    ...tinyGguf,
    metadata: [
      ...changed('tokenizer.ggml.model', value.text('gpt2')).metadata,
      ['tokenizer.ggml.pre', value.text(pre)],
      ['tokenizer.ggml.merges', value.list(text, [value.text(merge)])],
    ],
  });
  for (const [contents, says] of [
    [gpt2('deepseek-llm', 'a b'), /tokenizer\.ggml\.pre is "deepseek-llm"; Caravan runs "default"/],
    [gpt2('gpt-2', 'a\u2028b'.repeat(1000)), /is not two pieces and a space/],
  ] as const) {
    fs.writeFileSync(file, ggufBytes(contents));
    assertRefused(() => openCheckpoint(file).readTokenizerFiles(), says);
  }
});

void test('tensors that no Llama has are refused by name', () => {
  const [first, ...rest] = tinyGguf.tensors;
  for (const name of ['blk.0.attn_q.bias', 'blk.0.ffn_gate_inp.weight', 'blk.00.attn_q.weight']) {
    const tensors = [{ ...first!, name }, ...rest];
    fs.writeFileSync(file, ggufBytes({ ...tinyGguf, tensors }));
    assertRefused(
      () => {
        openWhole(file);
      },
      new RegExp(`${name.replaceAll('.', '\\.')} is .*no tensor of a Llama`),
    );
  }
});

void test('the command line refuses a hostile file in one line', async () => {
  fs.writeFileSync(file, ggufBytes({ ...tinyGguf, tensorCount: 10n ** 9n }));
  for (const args of [['inspect'], ['tokenize', 'A'], ['generate', '--tp', '2', '--prompt', 'A']]) {
    const { code, stdout, stderr } = await runCli([...args, '--model', file]);
    assert.equal(code, 1);
    assert.equal(stdout, '');
    assert.match(stderr, /^caravan: model\.gguf: tensors: 1000000000 do not fit [^\n]*\n$/);
  }
});

void test('what is good is taken', () => {
  fs.writeFileSync(file, ggufBytes(tinyGguf));
  openWhole(file);
  assert.equal(openCheckpoint(file).readTokenizerFiles().size, 3);
  fs.writeFileSync(
    file,
    withEntries(['lists', nested(3)], [`t${textBytes('x').length}`, value.flag(true)]),
  );
  assert.ok(readGgufFile(file).metadata.has('lists'));
});

void test('a folder with a GGUF file in it is not the file, and it says so', () => {
  const folder = fs.mkdtempSync(path.join(scratch, 'folder-'));
  assertRefused(() => openCheckpoint(folder), /has neither config\.json.* nor params\.json.*'s$/);
  fs.writeFileSync(path.join(folder, 'model.gguf'), '');
  assertRefused(() => openCheckpoint(folder), /to open "model\.gguf", name the file itself$/);
});
