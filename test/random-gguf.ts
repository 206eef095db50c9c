/** A GGUF file of random Q4_0 weights, with a vocabulary of bytes and made-up words: for timing only. */
import fs from 'node:fs';
import { ggufPieces, value, valueTypes, type GgufTensor } from './gguf-writer.js';
import { Random } from './random.js';

export interface GgufShape {
  readonly hiddenSize: number;
  readonly layerCount: number;
  readonly headCount: number;
  readonly kvHeadCount: number;
  readonly ffnSize: number;
  /** At least 259: the bytes come first. */
  readonly vocabSize: number;
}

/** TinyLlama-1.1B's. */
export const TINY_LLAMA: GgufShape = {
  ...{ hiddenSize: 2048, layerCount: 22, headCount: 32, kvHeadCount: 4 },
  ...{ ffnSize: 5632, vocabSize: 32_000 },
};

const CONTEXT = 4096;
/** Weights of a block, and its bytes: a float16 and two weights a byte. */
const BLOCK = 32;
const BLOCK_BYTES = 18;

/** @returns bytes of the file. */
export function writeRandomGguf(file: string, shape: GgufShape = TINY_LLAMA, seed = 1): number {
  const { hiddenSize: hidden, ffnSize: ffn, vocabSize: vocab, kvHeadCount, headCount } = shape;
  const keyValue = (hidden / headCount) * kvHeadCount;
  const random = randomBlocks((Math.max(vocab, ffn, hidden) * Math.max(hidden, ffn)) / BLOCK, seed);
  const ones = new Uint8Array(new Float32Array(hidden).fill(1).buffer);
  // All matrices are the beginning of the same blocks: memory holds them once.
  const matrix = (name: string, rows: number, columns: number): GgufTensor => ({
    ...{ name: `${name}.weight`, shape: [rows, columns], format: 'Q4_0' },
    bytes: random.subarray(0, ((rows * columns) / BLOCK) * BLOCK_BYTES),
  });
  const norm = (name: string): GgufTensor => ({
    ...{ name: `${name}.weight`, shape: [hidden], format: 'F32', bytes: ones },
  });
  const tensors = [
    matrix('token_embd', vocab, hidden),
    ...Array.from({ length: shape.layerCount }, (_, i) => [
      norm(`blk.${i}.attn_norm`),
      matrix(`blk.${i}.attn_q`, hidden, hidden),
      matrix(`blk.${i}.attn_k`, keyValue, hidden),
      matrix(`blk.${i}.attn_v`, keyValue, hidden),
      matrix(`blk.${i}.attn_output`, hidden, hidden),
      norm(`blk.${i}.ffn_norm`),
      matrix(`blk.${i}.ffn_gate`, ffn, hidden),
      matrix(`blk.${i}.ffn_up`, ffn, hidden),
      matrix(`blk.${i}.ffn_down`, hidden, ffn),
    ]).flat(),
    norm('output_norm'),
    matrix('output', vocab, hidden),
  ];
  const descriptor = fs.openSync(file, 'w');
  let byteCount = 0;
  try {
    for (const piece of ggufPieces({ metadata: metadataOf(shape), tensors })) {
      for (let done = 0; done < piece.length;) done += fs.writeSync(descriptor, piece, done);
      byteCount += piece.length;
    }
  } finally {
    fs.closeSync(descriptor);
  }
  return byteCount;
}

/** Scales of 2^-8: a row of 2,048 weights has about the size that trained ones have. */
function randomBlocks(count: number, seed: number): Uint8Array {
  const bytes = new Uint8Array(Math.ceil(count) * BLOCK_BYTES);
  const random = new Random(seed);
  const words = new Uint32Array(bytes.buffer, 0, bytes.length >> 2);
  for (let i = 0; i < words.length; i += 1) words[i] = random.below(2 ** 32);
  for (let at = 0; at < bytes.length; at += BLOCK_BYTES) {
    bytes[at] = 0;
    bytes[at + 1] = 0x1c;
  }
  return bytes;
}

function metadataOf(shape: GgufShape) {
  const { text, float32, int32 } = valueTypes;
  const { hiddenSize, headCount, vocabSize } = shape;
  const byteNames = Array.from(
    { length: 256 },
    (_, byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`,
  );
  const special = ['<unk>', '<s>', '</s>'];
  const wordCount = vocabSize - special.length - byteNames.length;
  const words = Array.from({ length: wordCount }, (_, i) => `\u2581t${i}`);
  const tokens = [...special, ...byteNames, ...words];
  const [normal, unknown, control, byte] = [1, 2, 3, 6];
  const types = [
    unknown,
    control,
    control,
    ...byteNames.map(() => byte),
    ...words.map(() => normal),
  ];
  const sizes = {
    ...{ context_length: CONTEXT, embedding_length: hiddenSize, block_count: shape.layerCount },
    ...{ feed_forward_length: shape.ffnSize, 'attention.head_count': headCount },
    'attention.head_count_kv': shape.kvHeadCount,
    'rope.dimension_count': hiddenSize / headCount,
  };
  return [
    ['general.architecture', value.text('llama')],
    ['general.name', value.text('Random weights')],
    ...Object.entries(sizes).map(([key, size]) => [`llama.${key}`, value.uint32(size)] as const),
    ['llama.attention.layer_norm_rms_epsilon', value.float32(1e-5)],
    ['tokenizer.ggml.model', value.text('llama')],
    ['tokenizer.ggml.tokens', value.list(text, tokens.map(value.text))],
    [
      'tokenizer.ggml.scores',
      value.list(
        float32,
        tokens.map((_, i) => value.float32(-i)),
      ),
    ],
    [
      'tokenizer.ggml.token_type',
      value.list(
        int32,
        types.map((type) => value.int32(type)),
      ),
    ],
    ['tokenizer.ggml.bos_token_id', value.uint32(1)],
    ['tokenizer.ggml.eos_token_id', value.uint32(2)],
  ] as const;
}
