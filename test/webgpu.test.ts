/**
 * Ranks on WebGPU give the golden logits and the golden texts, and nothing but partials, places and the largest logits
 * is copied. Without a GPU it runs on the software Vulkan driver of Debian's chromium, so slowly that all of it is in
 * the long form: CARAVAN_LONG=1.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import { after, test } from 'node:test';
import { evaluate } from '../coordinator/evaluation.js';
import type { Ranks } from '../coordinator/ranks.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { CaravanError } from '../proto/errors.js';
import { SampledRows, type StepResult } from '../proto/gen/cluster.js';
import { runCli } from './cli.js';
import { withHostMemoryDevices } from './device-ranks.js';
import { readTinyGolden, sharedGolden } from './golden.js';
import { RankPool } from './rank-pool.js';
import { sharedPath, skipWithout } from './shared.js';

const TOLERANCE = 5e-4;
const SOFTWARE_DRIVER = '/usr/lib/chromium/vk_swiftshader_icd.json';

if (process.env['VK_ICD_FILENAMES'] === undefined && fs.existsSync(SOFTWARE_DRIVER)) {
  // Ranks inherit it.
  process.env['VK_ICD_FILENAMES'] = SOFTWARE_DRIVER;
}
const isDriverHere = process.env['VK_ICD_FILENAMES'] !== undefined || process.env['CI'] === 'true';

const skip = (file?: string): string | false => {
  if (process.env['CARAVAN_LONG'] !== '1') return 'a software GPU is slow: only in the long form';
  if (!isDriverHere) return 'no Vulkan driver is here: apt-get install chromium libvulkan1';
  return file === undefined ? false : skipWithout(file);
};

const pool = new RankPool('webgpu');
after(() => pool.stop());

const limits = { maxSeqLen: 256, maxBatchSize: 2, maxStepRows: 64, exact: false };

/** The most likely token of the only sampled row. */
const bestOf = (results: readonly StepResult[]): number =>
  results.reduce((a, b) => (b.topLogits[0]! > a.topLogits[0]! ? b : a)).topIds[0]!;

/** Greedy decoding after a prompt, step by step. */
async function decode(ranks: Ranks, prompt: readonly number[], count: number, first: number) {
  const ids: number[] = [];
  let results: StepResult[] = [];
  for (let i = 0; i < count; i += 1) {
    const isPrompt = i === 0;
    results = await ranks.forward({
      number: first + i,
      joins: isPrompt ? [{ slot: 1, temperature: 0 }] : [],
      decodeSlots: isPrompt ? [] : [1],
      decodeTokens: isPrompt ? [] : [ids.at(-1)!],
      chunks: isPrompt
        ? [
            {
              ...{ slot: 1, tokens: [...prompt], targets: [] },
              sampledRows: SampledRows.SAMPLED_ROWS_LAST,
            },
          ]
        : [],
      topK: 2,
    });
    ids.push(bestOf(results));
  }
  return { ids, last: results };
}

const distance = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.from(a, (x, i) => Math.abs(x - b[i]!)).reduce((most, x) => Math.max(most, x), 0);

const CHUNK = 40;

for (const tp of [1, 2]) {
  void test(
    `caravan-tiny at tp ${tp}: the oracle's logits and the golden text`,
    { skip: skip() },
    async (t) => {
      const golden = readTinyGolden()[0]!;
      const { config } = openCheckpoint(embeddedModelPath());
      const ids = [...golden.promptIds, ...golden.ids];
      const last = golden.promptIds.length - 1;
      await pool.withGroup(embeddedModelPath(), { ...limits, tp }, async ({ ranks }) => {
        const evaluation = await evaluate(ranks, ids, CHUNK, [last], limits.maxSeqLen);
        assert.deepEqual(evaluation.argmax.slice(last, -1), golden.ids);
        const most = distance(evaluation.logits.get(last)!, golden.firstLogits);
        t.diagnostic(`largest difference ${most.toExponential(1)}`);
        assert.ok(most < TOLERANCE, String(most));
        const after = Math.ceil(ids.length / CHUNK);
        const decoded = await decode(ranks, golden.promptIds, golden.ids.length, after + 1);
        assert.deepEqual(decoded.ids, golden.ids);
        // A slot that begins with a copy of that one's prompt goes on alike.
        const tokens = golden.promptIds.slice(0, -1);
        const kept = { length: tokens.length, copiedFrom: 1, tokens };
        const sampledRows = SampledRows.SAMPLED_ROWS_LAST;
        const copied = await ranks.forward({
          ...{ number: after + 1 + golden.ids.length, decodeSlots: [], decodeTokens: [], topK: 1 },
          joins: [{ slot: 0, temperature: 0, kept }],
          chunks: [{ slot: 0, tokens: golden.promptIds.slice(-1), sampledRows, targets: [] }],
        });
        assert.equal(bestOf(copied), golden.ids[0]);
        for (const { bytesToDevice, bytesToHost } of decoded.last) {
          const exchanges = 2 * config.layerCount + 1;
          const partial = 4 * config.hiddenSize;
          // Token, position, last position, sampled row, inverse temperature; two logits and their places, two sums.
          assert.equal(bytesToDevice, partial * exchanges * (tp - 1) + 32);
          assert.equal(bytesToHost, (tp > 1 ? exchanges * partial : 0) + 2 * (4 + 8) + 2 * 4);
        }
      });
    },
  );

  void test(
    `stories260K, heads of 8, at tp ${tp}: golden logits and the golden text's beginning`,
    { skip: skip(sharedGolden.file) },
    async (t) => {
      const golden = sharedGolden.read()[0]!;
      const positions = [...golden.logits.keys()];
      const model = sharedPath(sharedGolden.model);
      await pool.withGroup(model, { ...limits, tp }, async ({ ranks }) => {
        const { ids } = golden;
        const evaluation = await evaluate(ranks, ids, CHUNK, positions, limits.maxSeqLen);
        assert.deepEqual(evaluation.argmax, golden.argmax);
        let most = 0;
        for (const [position, expected] of golden.logits) {
          most = Math.max(most, distance(evaluation.logits.get(position)!, expected));
        }
        t.diagnostic(`largest difference ${most.toExponential(1)}`);
        assert.ok(most < TOLERANCE, String(most));
        const after = Math.ceil(ids.length / CHUNK);
        const from = Math.min(8, ids.length - 1);
        const decoded = await decode(ranks, ids.slice(0, from), 32, after + 1);
        const expected = ids.slice(from, from + 32);
        assert.deepEqual(decoded.ids.slice(0, expected.length), expected);
      });
    },
  );
}

void test(
  'stories260K: the whole golden text, from the command line',
  { skip: skip(sharedGolden.text) },
  async () => {
    const model = sharedPath(sharedGolden.model);
    const words = ['generate', '--model', model, '--device', 'webgpu', '--tp', '1', '--json'];
    const how = ['--weights', 'fp32', '--temperature', '0', '--ignore-eos', '--max-tokens', '200'];
    const driver = { VK_ICD_FILENAMES: process.env['VK_ICD_FILENAMES'] };
    // No wall clock decides it: a software GPU of a busy machine takes as long as it takes.
    const { code, stdout, stderr } = await runCli([...words, ...how], 600_000, driver);
    assert.equal(code, 0, stderr);
    const { text } = JSON.parse(stdout) as { text: string };
    const golden = fs.readFileSync(sharedPath(sharedGolden.text), 'utf8');
    assert.equal(text.trimEnd(), golden.trimEnd());
  },
);

// Largest difference to the same graphs in host memory, whose logits are held to the oracle's (bound-device).
for (const [weights, tolerance] of [
  ['fp16', 5e-2],
  ['int4', 5e-3],
] as const) {
  void test(
    `caravan-tiny, ${weights}: the logits of the same graphs on the CPU`,
    { skip: skip() },
    async (t) => {
      const { promptIds, ids } = readTinyGolden()[0]!;
      const tokens = [...promptIds, ...ids].slice(0, CHUNK + 10);
      const positions = [0, 1, CHUNK - 1, tokens.length - 1];
      const logitsOf = async (ranks: Ranks) => {
        const found = await evaluate(ranks, tokens, CHUNK, positions, limits.maxSeqLen);
        return positions.map((position) => found.logits.get(position)!);
      };
      const folder = embeddedModelPath();
      const own = { ...limits, tp: 1, weights };
      const computing = pool.withGroup(folder, own, ({ ranks }) => logitsOf(ranks));
      const onGpu = await computing.catch((error: unknown) => {
        // The software driver has no 16-bit floats: then it is said, with what to take instead.
        assert.equal(weights, 'fp16');
        assert.ok(error instanceof CaravanError);
        assert.match(error.message, /webgpu has no 16-bit floats: take --weights fp32 or int4$/);
        t.diagnostic(error.message);
        return null;
      });
      if (onGpu === null) return;
      const onCpu = await withHostMemoryDevices(folder, 'webgpu', own, logitsOf);
      const most = Math.max(...onGpu.map((row, i) => distance(row, onCpu[i]!)));
      t.diagnostic(`largest difference ${most.toExponential(1)}`);
      assert.ok(most < tolerance, String(most));
    },
  );
}
