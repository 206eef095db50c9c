/** tokenizer.json, and what the files beside it say: BOS, EOS, control tokens, wishes for sampling. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { GrammarCache } from '../coordinator/grammar.js';
import type { ServedModel } from '../coordinator/openai.js';
import { parseChat, parseCompletion } from '../coordinator/openai.js';
import { encodePrompt } from '../coordinator/prompt.js';
import type { ModelCard } from '../coordinator/request.js';
import { openChatTemplate } from '../model/chat-template.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { readGenerationDefaults, type GenerationDefaults } from '../model/generation-config.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import { byteLevelTokenizer, byteLetters, fileOf } from './byte-level-tokenizer.js';
import { Random } from './random.js';

const controls = ['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>', '<|im_start|>'];
const { json, firstControlId } = byteLevelTokenizer([
  ...controls.map((content) => ({ content })),
  { content: 'two words', special: false },
  // As a chat that was tuned without care has it.
  { content: '<|im_end|>', special: false },
]);
const [begin, end, turn, , words, imEnd] = [0, 1, 2, 3, 4, 5].map((i) => firstControlId + i);

const open = (files: Readonly<Record<string, unknown>>): Tokenizer =>
  openTokenizer(
    new Map(Object.entries({ 'tokenizer.json': json, ...files }).map(([n, f]) => [n, fileOf(f)])),
  );

void test('byte-level BPE: any text comes back, byte for byte', () => {
  const tokenizer = open({});
  const random = new Random(5);
  for (let i = 0; i < 300; i += 1) {
    const text = random.text(random.below(40));
    const ids = tokenizer.encode(text);
    assert.equal(tokenizer.decode(ids), text);
    const bytes = Buffer.concat(ids.map((id) => tokenizer.tokenBytes(id)));
    assert.equal(bytes.toString('utf8'), text);
  }
  assert.equal(byteLetters.length, new Set(byteLetters).size);
});

void test('byte-level BPE: merges go by their order, within words', () => {
  const tokenizer = open({});
  const pieces = (text: string) => tokenizer.encode(text).map((id) => tokenizer.pieceOf(id));
  assert.deepEqual(pieces('hello the end'), ['hello', 'Ġth', 'e', 'Ġ', 'end']);
  assert.deepEqual(pieces('12'), ['1', '2']);
  // Numbers of any script stand alone, the space before them too.
  assert.deepEqual(pieces('a ¼²'), ['a', 'Ġ', 'Â', '¼', 'Â', '²']);
  assert.deepEqual(pieces('é'), ['Ã', '©']);
});

void test('spelled control tokens are text, in whichever way they are marked', () => {
  const tokenizer = open({});
  const text = '<|begin_of_text|>a<|eot_id|><|im_end|>\udc00300\udc01';
  const ids = tokenizer.encode(text);
  assert.ok(
    ids.every((id) => id < firstControlId),
    String(ids),
  );
  assert.equal(tokenizer.decode(ids), text.toWellFormed());
  assert.equal(tokenizer.controlTokens.get('<|im_end|>'), imEnd);
  assert.equal(tokenizer.controlTokens.has('two words'), false);
  assert.deepEqual(tokenizer.encode('x two words'), [...tokenizer.encode('x '), words]);
  assert.equal(tokenizer.decode([words!, imEnd!]), 'two words');
  assert.deepEqual(tokenizer.encodeParts(['a', turn!, 'b']), [
    ...tokenizer.encode('a'),
    turn,
    ...tokenizer.encode('b'),
  ]);
});

void test('EOS is what generation_config.json says, a list included, else config.json, else the tokenizer', () => {
  const config = { eos_token_id: end };
  const generation = { bos_token_id: begin, eos_token_id: [end, turn] };
  const all = open({ 'generation_config.json': generation, 'config.json': config });
  assert.deepEqual(all.eosTokenIds, [end, turn]);
  assert.equal(all.bosTokenId, begin);
  assert.deepEqual(open({ 'config.json': config }).eosTokenIds, [end]);
  const named = open({ 'tokenizer_config.json': { eos_token: { content: '<|eot_id|>' } } });
  assert.deepEqual(named.eosTokenIds, [turn]);
  assert.deepEqual(open({}).eosTokenIds, [end]);
  const none = { eos_token_id: [] };
  assert.deepEqual(open({ 'generation_config.json': none, 'config.json': config }).eosTokenIds, [
    end,
  ]);
  for (const wrong of [-1, 'two', 1.5, [end, -1], { id: 2 }]) {
    assert.throws(
      () => open({ 'generation_config.json': { eos_token_id: wrong }, 'config.json': config }),
      /^CaravanError: generation_config\.json: eos_token_id: must be the id of a token, or a list/,
    );
  }
});

void test('BOS stands before a text when the checkpoint says so', () => {
  const template = {
    type: 'TemplateProcessing',
    single: [
      { SpecialToken: { id: '<|begin_of_text|>', type_id: 0 } },
      { Sequence: { id: 'A', type_id: 0 } },
    ],
  };
  const bytes = { type: 'ByteLevel', add_prefix_space: true, trim_offsets: false };
  const llama3 = { ...json, post_processor: { type: 'Sequence', processors: [bytes, template] } };
  const prefix = (file: unknown, config: object): readonly number[] =>
    open({
      'tokenizer.json': file,
      'tokenizer_config.json': { bos_token: '<|begin_of_text|>', ...config },
    }).prefixTokenIds;
  assert.deepEqual(prefix(json, {}), []);
  assert.deepEqual(prefix(llama3, {}), [begin]);
  assert.deepEqual(prefix({ ...json, post_processor: template }, {}), [begin]);
  assert.deepEqual(prefix(llama3, { add_bos_token: false }), []);
  assert.deepEqual(prefix(json, { add_bos_token: true }), [begin]);
  assert.deepEqual(prefix(json, { tokenizer_class: 'LlamaTokenizerFast' }), [begin]);
  assert.deepEqual(prefix(json, { tokenizer_class: 'GPT2Tokenizer' }), []);
  const model = fs.readFileSync(path.join(embeddedModelPath(), 'tokenizer.model'));
  const sentencePiece = (config: object) =>
    openTokenizer(
      new Map([
        ['tokenizer.model', model],
        ['tokenizer_config.json', fileOf(config)],
      ]),
    );
  assert.deepEqual(sentencePiece({}).prefixTokenIds, [1]);
  assert.deepEqual(sentencePiece({ add_bos_token: false }).prefixTokenIds, []);
  // What is sent is never empty.
  const { ids } = encodePrompt('', sentencePiece({ add_bos_token: false }));
  assert.deepEqual(ids, [1]);
  assert.deepEqual(encodePrompt('', open({ 'tokenizer.json': llama3 })).ids, [begin]);
});

void test('tokenizer.json is taken before tokenizer.model where it adds tokens', () => {
  const model = fs.readFileSync(path.join(embeddedModelPath(), 'tokenizer.model'));
  const with_ = (added: readonly unknown[]) =>
    openTokenizer(
      new Map<string, Uint8Array>([
        ['tokenizer.model', model],
        ['tokenizer.json', fileOf({ ...json, added_tokens: added })],
      ]),
    );
  const count = with_([{ id: 2, content: '</s>', special: true }]).vocabSize;
  const added = { id: count, content: '<|im_end|>', special: true };
  const tuned = with_([{ id: 2, content: '</s>', special: true }, added]);
  assert.equal(tuned.vocabSize, count + 1);
  assert.equal(tuned.controlTokens.get('<|im_end|>'), count);
});

for (const [name, changes, says] of [
  ['a vocabulary that is none', { model: { type: 'BPE', vocab: [] } }, /model\.vocab/],
  ['another kind of model', { model: { ...json.model, type: 'Unigram' } }, /Unigram.*BPE/],
  ['an id beyond reason', { added_tokens: [{ id: 2 ** 40, content: 'x' }] }, /"x".*1099511627776/],
  ['merges that are none', { model: { ...json.model, merges: 3 } }, /^tokenizer\.json: /],
  ['a pre-tokenizer of the future', { pre_tokenizer: { type: 'Mind' } }, /Mind/],
] as const) {
  void test(`a tokenizer.json with ${name} is refused in one line`, () => {
    assert.throws(
      () => open({ 'tokenizer.json': { ...json, ...changes } }),
      (error) =>
        error instanceof CaravanError && says.test(error.message) && !error.message.includes('\n'),
    );
  });
}

// What requests leave out.

const defaultsOf = (generation: unknown): GenerationDefaults =>
  readGenerationDefaults(new Map([['generation_config.json', fileOf(generation)]]));

function served(generation: unknown): ServedModel {
  const tokenizer = open({});
  const files = new Map([['chat_template.jinja', Buffer.from('{{ messages[0].content }}')]]);
  const card: ModelCard = {
    ...{ version: 1, name: 'm', digest: '', createdS: 0, maxSeqLen: 100, maxBatchSize: 1 },
    ...{ vocabSize: tokenizer.vocabSize, bosTokenId: 1, eosTokenIds: [2], tokenizerFiles: {} },
    defaults: defaultsOf(generation),
    isExact: false,
  };
  const grammars = new GrammarCache(tokenizer);
  return { card, tokenizer, chat: openChatTemplate(files, tokenizer), grammars };
}

void test("what a request leaves out is the model's wish, and else OpenAI's default", () => {
  const wishes = { do_sample: true, temperature: 0.6, top_p: 0.9, top_k: 40, max_new_tokens: 30 };
  const bodies = { messages: [{ role: 'user', content: '12345' }], prompt: '12345' };
  for (const parse of [parseChat, parseCompletion]) {
    const ask = (generation: unknown, body: object) => {
      const { sampling, maxTokens } = parse({ ...bodies, ...body }, served(generation)).request;
      const { temperature, topP, topK } = sampling;
      return [temperature, topP, topK, maxTokens];
    };
    assert.deepEqual(ask({}, {}), [1, 1, 0, 95]);
    assert.deepEqual(ask(wishes, {}), [0.6, 0.9, 40, 30]);
    assert.deepEqual(
      ask(wishes, { temperature: null, top_p: null, max_tokens: null }),
      [0.6, 0.9, 40, 30],
    );
    const own = { temperature: 0, top_p: 0.5, top_k: 0, max_tokens: 50 };
    assert.deepEqual(ask(wishes, own), [0, 0.5, 0, 50]);
    assert.deepEqual(ask({ do_sample: false, temperature: 0.6 }, {}), [0, 1, 0, 95]);
    assert.deepEqual(ask({ max_new_tokens: 1000 }, {}), [1, 1, 0, 95]);
    assert.deepEqual(ask({ max_length: 60, top_k: -1 }, {}), [1, 1, 0, 55]);
    // A prompt of five tokens is as long as that: then the context is the limit.
    assert.deepEqual(ask({ max_length: 5 }, {}), [1, 1, 0, 95]);
  }
});

void test('a generation_config.json that is wrong is refused by its field', () => {
  assert.deepEqual(readGenerationDefaults(new Map()), {});
  assert.deepEqual(defaultsOf({ temperature: null, transformers_version: '4' }), {});
  for (const [field, value] of [
    ['temperature', -1],
    ['top_p', 0],
    ['top_k', 1.5],
    ['max_length', 0],
    ['do_sample', 'yes'],
  ] as const) {
    assert.throws(
      () => defaultsOf({ [field]: value }),
      (error) =>
        error instanceof CaravanError &&
        error.code === 'invalid_checkpoint' &&
        error.message.startsWith(`generation_config.json: ${field}: `),
    );
  }
});
