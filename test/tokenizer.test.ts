import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { embeddedModelPath } from '../model/checkpoint.js';
import { parseSentencePieceModel } from '../model/sentencepiece.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import { Random } from './random.js';
import { sharedPath, skipWithout } from './shared.js';

const tinyModel = path.join(embeddedModelPath(), 'tokenizer.model');

const open = (file: string): Tokenizer =>
  openTokenizer(new Map([['tokenizer.model', fs.readFileSync(file)]]));

const readJson = (name: string): unknown => JSON.parse(fs.readFileSync(sharedPath(name), 'utf8'));

const llama2 = 'models/llama2-tokenizer/tokenizer.model';

void test(
  'the Llama 2 tokenizer gives the ids of llama.cpp and llama2.c',
  {
    skip: skipWithout(llama2),
  },
  () => {
    const tokenizer = open(sharedPath(llama2));
    const spm = readJson('data/tokenizer/llama_spm_llamacpp.json') as {
      text: string;
      ids: number[];
    }[];
    for (const { text, ids } of spm) {
      assert.deepEqual(tokenizer.encode(text), ids, JSON.stringify(text));
      assert.equal(tokenizer.decode(ids), text);
    }
    const { cases } = readJson('data/tokenizer/llama2c_test_c.json') as {
      cases: [string, number[]][];
    };
    for (const [text, ids] of cases) {
      assert.deepEqual([tokenizer.bosTokenId, ...tokenizer.encode(text)], ids, text);
    }
    assert.ok(spm.length + cases.length >= 50);
  },
);

void test('any text comes back from its tokens', () => {
  const tokenizer = open(tinyModel);
  const random = new Random(1);
  for (let i = 0; i < 500; i += 1) {
    const text = random.text(random.below(60));
    assert.equal(tokenizer.decode(tokenizer.encode(text)), text);
  }
});

void test('a long text is tokenized in less than quadratic time', () => {
  const tokenizer = open(tinyModel);
  const text = 'the caravan crossed the desert at night. '.repeat(5000);
  assert.ok(tokenizer.encode(text).length > 10_000);
});

void test('special tokens in a text are plain text', () => {
  const tokenizer = open(tinyModel);
  const ids = tokenizer.encode('<s></s><unk><0x41>');
  assert.ok(!ids.includes(1) && !ids.includes(2) && !ids.includes(0));
  assert.equal(tokenizer.decode(ids), '<s></s><unk><0x41>');
});

void test('a lone surrogate becomes the replacement character', () => {
  const tokenizer = open(tinyModel);
  assert.equal(tokenizer.decode(tokenizer.encode('a\ud800b')), 'a\ufffdb');
});

void test('a damaged tokenizer.model is refused with its name', () => {
  const bytes = fs.readFileSync(tinyModel);
  const random = new Random(3);
  for (let i = 0; i < 300; i += 1) {
    const damaged = Buffer.from(bytes.subarray(0, 1 + random.below(bytes.length)));
    for (let j = 0; j < 4; j += 1) damaged[random.below(damaged.length)] = random.below(256);
    try {
      parseSentencePieceModel(damaged, 'tokenizer.model');
    } catch (error) {
      assert.ok(error instanceof CaravanError, String(error));
      assert.match(error.message, /^tokenizer\.model: /);
    }
  }
});

void test('tokenizer.json gives the ids of the tokenizer.model that it was made from', () => {
  const { pieces } = parseSentencePieceModel(fs.readFileSync(tinyModel), 'tokenizer.model');
  const vocab = Object.fromEntries(pieces.map(({ text }, id) => [text, id]));
  // Hugging Face's conversion: every split of a piece into two pieces, in the order of the pieces' scores.
  const merges = pieces
    .map((piece, id) => ({ ...piece, id }))
    .filter(({ type, text }) => type === 1 && Array.from(text).length > 1)
    .sort((a, b) => b.score - a.score)
    .flatMap(({ text }) => {
      const characters = Array.from(text);
      return characters
        .slice(1)
        .map((_, i) => [characters.slice(0, i + 1).join(''), characters.slice(i + 1).join('')])
        .filter(([left, right]) => left! in vocab && right! in vocab);
    });
  const special = ['<unk>', '<s>', '</s>'].map((content, id) => ({
    id,
    content,
    special: true,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
  }));
  const json = {
    version: '1.0',
    added_tokens: special,
    normalizer: {
      type: 'Sequence',
      normalizers: [
        { type: 'Prepend', prepend: '\u2581' },
        { type: 'Replace', pattern: { String: ' ' }, content: '\u2581' },
      ],
    },
    pre_tokenizer: null,
    post_processor: null,
    decoder: { type: 'ByteFallback' },
    model: { type: 'BPE', unk_token: '<unk>', fuse_unk: true, byte_fallback: true, vocab, merges },
  };
  const fromJson = openTokenizer(new Map([['tokenizer.json', Buffer.from(JSON.stringify(json))]]));
  const fromModel = open(tinyModel);
  const random = new Random(4);
  for (let i = 0; i < 300; i += 1) {
    const text = random.text(1 + random.below(40));
    assert.deepEqual(fromJson.encode(text), fromModel.encode(text), JSON.stringify(text));
    assert.equal(fromJson.decode(fromModel.encode(text)), text);
  }
});
