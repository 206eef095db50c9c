/**
 * Writes a GGUF file of random Q4_0 weights: the right shape, no meaning. For timing only.
 *
 *   node dist/test/bench/make-random-gguf.js FILE [HIDDEN LAYERS HEADS KV_HEADS FFN VOCAB]
 *
 * The default is the shape of TinyLlama-1.1B (620 MB). Llama 2 7B is 4096 32 32 32 11008 32000 (3.8 GB).
 */
import { writeRandomGguf } from '../random-gguf.js';

const [file, ...sizes] = process.argv.slice(2);
const numbers = sizes.map(Number);
if (file === undefined || ![0, 6].includes(sizes.length) || numbers.some((n) => !(n > 0))) {
  process.stderr.write('usage: make-random-gguf FILE [HIDDEN LAYERS HEADS KV_HEADS FFN VOCAB]\n');
  process.exit(2);
}
const [hidden, layers, heads, kvHeads, ffn, vocab] = numbers;
const byteCount = writeRandomGguf(
  file,
  hidden === undefined
    ? undefined
    : {
        ...{ hiddenSize: hidden, layerCount: layers!, headCount: heads!, kvHeadCount: kvHeads! },
        ...{ ffnSize: ffn!, vocabSize: vocab! },
      },
);
process.stdout.write(`${file}: ${(byteCount / 1e6).toFixed(0)} MB\n`);
