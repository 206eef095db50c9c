/** What config.json may say: which families and rotary embeddings are run, in which spellings, and what is refused. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { parseHuggingFaceConfig, type LlamaConfig } from '../model/config.js';
import { CaravanError, type ErrorCode } from '../proto/errors.js';

/** Llama 3.2 1B, as its config.json has it. */
const base = {
  model_type: 'llama',
  hidden_size: 2048,
  intermediate_size: 8192,
  num_hidden_layers: 16,
  num_attention_heads: 32,
  num_key_value_heads: 8,
  head_dim: 64,
  vocab_size: 128_256,
  max_position_embeddings: 131_072,
  rms_norm_eps: 1e-5,
  rope_theta: 500_000,
  hidden_act: 'silu',
  tie_word_embeddings: true,
};

const parse = (changes: Readonly<Record<string, unknown>>): LlamaConfig =>
  parseHuggingFaceConfig(JSON.stringify({ ...base, ...changes }), 'config.json');

const llama3 = {
  factor: 32,
  high_freq_factor: 4,
  low_freq_factor: 1,
  original_max_position_embeddings: 8192,
};
const readLlama3 = {
  ...{ kind: 'llama3', factor: 32, lowFrequencyFactor: 1, highFrequencyFactor: 4 },
  originalPositions: 8192,
};

void test('a Llama 3.2 is read whole', () => {
  assert.deepEqual(parse({ rope_scaling: { ...llama3, rope_type: 'llama3' } }), {
    ...{ hiddenSize: 2048, ffnSize: 8192, layerCount: 16, headCount: 32, kvHeadCount: 8 },
    ...{ headSize: 64, vocabSize: 128_256, maxPositions: 131_072, normEps: 1e-5 },
    ...{ ropeTheta: 500_000, isHeadTied: true, ropeScaling: readLlama3 },
  });
});

void test('rope_scaling is read in its old and new spellings, and as rope_parameters', () => {
  for (const kind of [{ type: 'linear' }, { rope_type: 'linear' }]) {
    const { ropeScaling, maxPositions } = parse({ rope_scaling: { ...kind, factor: 2.5 } });
    assert.deepEqual(ropeScaling, { kind: 'linear', factor: 2.5 });
    assert.equal(maxPositions, 131_072);
  }
  const rope = { ...llama3, rope_type: 'llama3', rope_theta: 250_000 };
  const v5 = parse({ rope_theta: undefined, rope_parameters: rope });
  assert.deepEqual(v5.ropeScaling, readLlama3);
  assert.equal(v5.ropeTheta, 250_000);
  for (const none of [null, undefined, { rope_type: 'default' }, { type: 'default' }]) {
    const { ropeScaling, ropeTheta } = parse({ rope_scaling: none });
    assert.equal(ropeScaling, undefined);
    assert.equal(ropeTheta, 500_000);
  }
});

void test('dynamic NTK stretches the context by its factor', () => {
  const dynamic = (scaling: object, max_position_embeddings: number) =>
    parse({ max_position_embeddings, rope_scaling: { type: 'dynamic', ...scaling } });
  const { ropeScaling, maxPositions } = dynamic({ factor: 4 }, 4096);
  assert.deepEqual(ropeScaling, { kind: 'dynamic', factor: 4, originalPositions: 4096 });
  assert.equal(maxPositions, 16_384);
  const named = dynamic({ factor: 4, original_max_position_embeddings: 2048 }, 8192);
  assert.equal(named.maxPositions, 8192);
  assert.deepEqual(named.ropeScaling, { kind: 'dynamic', factor: 4, originalPositions: 2048 });
});

void test("Vicuna's name for a stretched context is known", () => {
  const { maxPositions } = parse({
    max_position_embeddings: 4096,
    max_sequence_length: 16_384,
    rope_scaling: { type: 'linear', factor: 4 },
  });
  assert.equal(maxPositions, 16_384);
});

void test('Mistral is run without a sliding window, or up to its length', () => {
  const mistral = { model_type: 'mistral', max_position_embeddings: 32_768, head_dim: 128 };
  assert.equal(parse({ ...mistral, sliding_window: null }).maxPositions, 32_768);
  assert.equal(parse({ ...mistral, sliding_window: 65_536 }).maxPositions, 32_768);
  assert.equal(parse({ ...mistral, sliding_window: 4096 }).maxPositions, 4096);
});

for (const [name, changes, code, says] of [
  ['another family', { model_type: 'gemma2' }, 'unsupported_model', ['model_type', 'mistral']],
  ['biases of attention', { attention_bias: true }, 'unsupported_model', ['attention_bias']],
  ['biases of the FFN', { mlp_bias: true }, 'unsupported_model', ['mlp_bias']],
  ['another activation', { hidden_act: 'gelu' }, 'unsupported_model', ['hidden_act', 'silu']],
  [
    'weights of another quantization',
    { quantization_config: { quant_method: 'gptq', bits: 4 } },
    'unsupported_model',
    ['quantization_config.quant_method', 'gptq'],
  ],
  [
    'another scaling',
    { rope_scaling: { rope_type: 'yarn', factor: 4 } },
    'unsupported_model',
    ['rope_scaling.rope_type', 'yarn', 'linear', 'dynamic', 'llama3'],
  ],
  [
    'rotary embedding of a part of the head',
    { rope_parameters: { rope_type: 'default', partial_rotary_factor: 0.5 } },
    'unsupported_model',
    ['rope_parameters.partial_rotary_factor', '0.5'],
  ],
  [
    'a scaling without its factor',
    { rope_scaling: { type: 'linear' } },
    'invalid_checkpoint',
    ['rope_scaling.factor', 'linear'],
  ],
  [
    'a factor below 1',
    { rope_scaling: { type: 'linear', factor: 0 } },
    'invalid_checkpoint',
    ['rope_scaling.factor'],
  ],
  [
    'a slope that falls',
    { rope_scaling: { ...llama3, rope_type: 'llama3', low_freq_factor: 4 } },
    'invalid_checkpoint',
    ['rope_scaling.high_freq_factor', '4'],
  ],
  [
    'a scaling that is a number',
    { rope_scaling: 2 },
    'invalid_checkpoint',
    ['config.json: rope_scaling'],
  ],
] as const satisfies [string, object, ErrorCode, string[]][]) {
  void test(`${name} is refused in one line`, () => {
    assert.throws(
      () => parse(changes),
      (error) => {
        assert.ok(error instanceof CaravanError);
        assert.equal(error.code, code);
        assert.doesNotMatch(error.message, /\n/);
        for (const word of says) assert.ok(error.message.includes(word), error.message);
        return true;
      },
    );
  });
}
