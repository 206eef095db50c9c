/**
 * Writes a checkpoint of random weights in Hugging Face layout, in constant memory.
 *
 *   node dist/test/bench/make-random-checkpoint.js FOLDER [GIGABYTES [FORMAT [SHARDS]]]
 *
 * GIGABYTES is counted in float32 (default 1.05); FORMAT is F32 (default), F16 or BF16. There is no tokenizer: `eval` and
 * `inspect` need none.
 */
import { largeConfig } from '../large-config.js';
import { writeRandomCheckpoint, type RandomCheckpoint } from '../random-checkpoint.js';

const [folder, gigabytes = '1.05', format = 'F32', shards = '1'] = process.argv.slice(2);
const formats: readonly string[] = ['F32', 'F16', 'BF16'];
if (
  folder === undefined ||
  !(Number(gigabytes) > 0) ||
  !formats.includes(format) ||
  !(Number(shards) >= 1)
) {
  process.stderr.write(
    'usage: make-random-checkpoint FOLDER [GIGABYTES [F32|F16|BF16 [SHARDS]]]\n',
  );
  process.exit(2);
}
const startMs = performance.now();
const config = largeConfig(Number(gigabytes));
const byteCount = writeRandomCheckpoint(folder, {
  config,
  seed: 1,
  format: format as RandomCheckpoint['format'],
  shardCount: Number(shards),
});
const peak = process.resourceUsage().maxRSS / 1024;
process.stdout.write(
  `${folder}: ${(byteCount / 1e9).toFixed(3)} GB, ${config.layerCount} layers of ${config.hiddenSize}, ` +
    `in ${((performance.now() - startMs) / 1000).toFixed(1)} s, peak memory ${peak.toFixed(0)} MB\n`,
);
