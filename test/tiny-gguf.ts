/** The smallest whole model in GGUF: two layers, four heads of two channels, five tokens. */
import { value, valueTypes, type GgufContents, type GgufTensor } from './gguf-writer.js';

const HIDDEN = 8;
const { text, float32, int32 } = valueTypes;

const tensor = (name: string, shape: readonly number[]): GgufTensor => {
  const elementCount = shape.reduce((product, n) => product * n, 1);
  const bytes = new Uint8Array(new Float32Array(elementCount).fill(0.5).buffer);
  return { name: `${name}.weight`, shape, format: 'F32', bytes };
};

const square = [HIDDEN, HIDDEN];
const layer = (i: number): GgufTensor[] => [
  tensor(`blk.${i}.attn_norm`, [HIDDEN]),
  ...['attn_q', 'attn_k', 'attn_v', 'attn_output'].map((name) =>
    tensor(`blk.${i}.${name}`, square),
  ),
  tensor(`blk.${i}.ffn_norm`, [HIDDEN]),
  ...['ffn_gate', 'ffn_up', 'ffn_down'].map((name) => tensor(`blk.${i}.${name}`, square)),
];

const tokens = ['<unk>', '<s>', '</s>', '<0x41>', 'B'];

export const tinyGguf: GgufContents = {
  metadata: [
    ['general.architecture', value.text('llama')],
    ['llama.context_length', value.uint32(64)],
    ['llama.embedding_length', value.uint32(HIDDEN)],
    ['llama.block_count', value.uint32(2)],
    ['llama.feed_forward_length', value.uint32(HIDDEN)],
    ['llama.attention.head_count', value.uint32(4)],
    ['llama.attention.head_count_kv', value.uint32(4)],
    ['llama.attention.layer_norm_rms_epsilon', value.float32(1e-5)],
    ['llama.vocab_size', value.uint32(tokens.length)],
    ['tokenizer.ggml.model', value.text('llama')],
    ['tokenizer.ggml.tokens', value.list(text, tokens.map(value.text))],
    ['tokenizer.ggml.scores', value.list(float32, [0, 0, 0, 0, -1].map(value.float32))],
    ['tokenizer.ggml.token_type', value.list(int32, [2, 3, 3, 6, 1].map(value.int32))],
    ['tokenizer.ggml.bos_token_id', value.uint32(1)],
    ['tokenizer.ggml.eos_token_id', value.uint32(2)],
  ],
  tensors: [
    tensor('token_embd', [tokens.length, HIDDEN]),
    ...[0, 1].flatMap(layer),
    tensor('output_norm', [HIDDEN]),
    tensor('output', [tokens.length, HIDDEN]),
  ],
};
