/**
 * Readers of the texts beside a checkpoint's tensors, against damaged input. CARAVAN_LONG=1 tries 100,000 inputs a reader.
 */
import assert from 'node:assert/strict';
import { openChatTemplate } from '../model/chat-template.js';
import { parseHuggingFaceConfig, type LlamaConfig } from '../model/config.js';
import { readGenerationDefaults } from '../model/generation-config.js';
import { parseMetaParams } from '../model/meta-params.js';
import { planRanks } from '../model/plan.js';
import { openTokenizer } from '../model/tokenizer.js';
import { parseChecklist } from '../coordinator/meta-download.js';
import { byteLevelTokenizer, fileOf } from './byte-level-tokenizer.js';
import { fuzzAll, JSON_WORDS, type FuzzTarget } from './fuzz.js';

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
  words: [...JSON_WORDS, '"rope_scaling":', '"type":"dynamic"', '"head_dim":', '"sliding_window":'],
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
  words: [...JSON_WORDS, '"max_seq_len":', '"n_kv_heads":', '"use_scaled_rope":'],
  isFile: false,
  read: (input) => {
    assertPlannable(parseMetaParams(text(input), 'params.json', () => 32_000));
  },
};

const tokenizerFile = fileOf(byteLevelTokenizer([{ content: '<|im_end|>', special: true }]).json);
const eosConfig = Buffer.from('{"bos_token_id": 0, "eos_token_id": 0}');
const tokenizerJson: FuzzTarget = {
  seeds: [
    tokenizerFile,
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
  words: [...JSON_WORDS, '"type":"Unigram"', '"merges":', '"vocab":', '"id":', '"Split"', '(a+)+$'],
  isFile: false,
  read: (input) => {
    const files = { 'tokenizer.json': input, 'config.json': eosConfig };
    const tokenizer = openTokenizer(new Map(Object.entries(files)));
    assert.ok(tokenizer.vocabSize >= 0);
    const ids = tokenizer.encode('a llama, end');
    assert.ok(ids.every((id) => Number.isSafeInteger(id)));
  },
};

const generationConfig: FuzzTarget = {
  seeds: [
    { do_sample: true, temperature: 0.6, top_p: 0.9, max_length: 4096, eos_token_id: [1, 2] },
    { top_k: 50, max_new_tokens: 100, bos_token_id: 1, eos_token_id: 2, pad_token_id: null },
  ].map((json) => Buffer.from(JSON.stringify(json))),
  words: [...JSON_WORDS, '"do_sample":', '"top_k":', '"eos_token_id":', '-1'],
  isFile: false,
  leastRefusals: 3,
  read: (input) => {
    const found = readGenerationDefaults(new Map([['generation_config.json', input]]));
    const { temperature = 0, topP = 1, topK = 0, maxNewTokens = 1 } = found;
    assert.ok(temperature >= 0 && temperature <= 2 && topP > 0 && topP <= 1, text(input));
    assert.ok(Number.isSafeInteger(topK) && topK >= 0 && maxNewTokens > 0, text(input));
    // The list of EOS is the tokenizer's to read.
    const files = { 'tokenizer.json': tokenizerFile, 'generation_config.json': input };
    const { eosTokenIds } = openTokenizer(new Map(Object.entries(files)));
    assert.ok(eosTokenIds.every((id) => Number.isSafeInteger(id) && id >= 0));
  },
};

const tokenizerFiles = { 'tokenizer.json': tokenizerFile, 'config.json': eosConfig };

const tokenizerConfig: FuzzTarget = {
  seeds: [
    {
      ...{ add_bos_token: true, bos_token: '<|im_end|>', tokenizer_class: 'LlamaTokenizer' },
      ...{ eos_token: { content: '<|im_end|>' }, chat_template: '{{ messages[0].content }}' },
    },
    { add_eos_token: false, chat_template: [{ name: 'default', template: 'x' }] },
  ].map((json) => Buffer.from(JSON.stringify(json))),
  words: [...JSON_WORDS, '"content":', '"name":', '"template":', '{{', '}}', '{%'],
  isFile: false,
  leastRefusals: 2,
  read: (input) => {
    const files = new Map(Object.entries({ ...tokenizerFiles, 'tokenizer_config.json': input }));
    openChatTemplate(files, openTokenizer(files)).render([{ role: 'user', content: 'Hi' }]);
  },
};

const templateTokenizer = openTokenizer(new Map(Object.entries(tokenizerFiles)));

const chatTemplate: FuzzTarget = {
  seeds: [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] " +
      "+ '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}" +
      "{{ '<|im_start|>assistant\n' }}{% endif %}",
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}" +
      "{% else %}{% set system = '' %}{% endif %}{{ bos_token }}" +
      "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}" +
      "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m.content | trim }} " +
      '[/INST]{% endfor %}',
    '{%- macro show(t) -%}{{ t | tojson(indent=2) }}{%- endmacro -%}' +
      "{%- for i in range(3) -%}{{ show({'a': [i, messages | length]}) }}{%- endfor -%}",
  ].map((template) => Buffer.from(template)),
  words: [
    ...['{{', '}}', '{%', '%}', '{#', '-%}', '|', '(', ')', '[', ']', '.', '~', '+', '*', "'", ','],
    ...['for', 'endfor', 'if', 'endif', 'else', 'set', 'macro', 'endmacro', 'in', 'not', 'loop'],
    ...['range(1000000000)', 'range(1,9,0)', '|join', '|tojson', '|replace', '* 100000000'],
    ...['messages', '__proto__', 'constructor', 'split', 'namespace()', '[-1]', '[::0]', '\u2028'],
  ],
  isFile: false,
  // A template has a second, each of the two times that it is rendered, and when it is compared with Llama 2's.
  mostMs: 5_000,
  read: (input) => {
    const files = new Map(Object.entries({ ...tokenizerFiles, 'chat_template.jinja': input }));
    const chat = openChatTemplate(files, templateTokenizer);
    const messages = [
      { role: 'system', content: 'Be <|im_end|> brief.' },
      { role: 'user', content: 'Hi' },
    ];
    assert.ok(chat.render(messages).every((id) => Number.isSafeInteger(id)));
  },
};

const checklist: FuzzTarget = {
  seeds: [
    `${'0a'.repeat(16)}  params.json\n${'9f'.repeat(16)} *consolidated.00.pth\n`,
    `${'c4'.repeat(16)}  tokenizer.model\r\n\n`,
  ].map((lines) => Buffer.from(lines)),
  words: ['\n', ' ', '../', '/etc/passwd', '*', '\u0000', '\u2028', 'a'.repeat(32), '-'],
  isFile: false,
  leastRefusals: 0,
  read: (input) => {
    for (const [name, { hex }] of parseChecklist(input, 'checklist.chk')) {
      assert.match(name, /^[\w-][\w.-]*$/);
      assert.match(hex, /^[0-9a-f]{32}$/);
    }
  },
};

fuzzAll({
  'tokenizer.json': tokenizerJson,
  'config.json': configJson,
  'params.json': paramsJson,
  'generation_config.json': generationConfig,
  'tokenizer_config.json': tokenizerConfig,
  'chat_template.jinja': chatTemplate,
  'checklist.chk': checklist,
});
