/**
 * The graphs of GPUs, through IoBinding, in host memory: only the memory's name differs from a GPU's. Logits are the
 * oracle's, and of what lies on the device only partials and the largest logits are copied.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { fullestBytes, planGroup } from '../coordinator/group-spec.js';
import { openCheckpoint } from '../model/checkpoint.js';
import { CaravanError } from '../proto/errors.js';
import { SampledRows, type Step } from '../proto/gen/cluster.js';
import type { Capturer } from '../worker/device-launch.js';
import { withHostMemoryDevices } from './device-ranks.js';
import { Oracle, prefill } from './oracle.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';

const LIMITS = { maxSeqLen: 64, maxBatchSize: 3, maxStepRows: 64 };

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-bound-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

const cases = [
  // Largest difference: of float32; of attention in 16 bits; of 16 bits throughout.
  { kind: 'webgpu', weights: 'fp32', tp: 1, headSize: 8, isHeadTied: true, tolerance: 2e-4 },
  { kind: 'webgpu', weights: 'fp32', tp: 2, headSize: 16, isHeadTied: false, tolerance: 2e-4 },
  { kind: 'cuda', weights: 'fp32', tp: 3, headSize: 16, isHeadTied: true, tolerance: 2e-2 },
  { kind: 'cuda', weights: 'fp16', tp: 1, headSize: 32, isHeadTied: true, tolerance: 5e-2 },
  { kind: 'cuda', weights: 'fp16', tp: 2, headSize: 64, isHeadTied: false, tolerance: 5e-2 },
  // Weights that 4 bits say exactly, and others in 8.
  { kind: 'webgpu', weights: 'int4', tp: 1, headSize: 32, isHeadTied: false, tolerance: 2e-4 },
  { kind: 'cuda', weights: 'int4', tp: 2, headSize: 64, isHeadTied: true, tolerance: 5e-2 },
  // Attention's output in 16 bits, since heads of 32 are on no grid of 64.
  { kind: 'cuda', weights: 'int4', tp: 1, headSize: 32, isHeadTied: false, tolerance: 5e-2 },
  { kind: 'cuda', weights: 'int8', tp: 1, headSize: 64, isHeadTied: false, tolerance: 0.2 },
  { kind: 'cuda', weights: 'int8', tp: 3, headSize: 64, isHeadTied: true, tolerance: 0.2 },
] as const;

const noStep: Omit<Step, 'number'> = {
  joins: [],
  decodeSlots: [],
  decodeTokens: [],
  chunks: [],
  topK: 4,
};

/** The largest absolute difference. */
const distance = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.from(a, (x, i) => Math.abs(x - b[i]!)).reduce((most, x) => Math.max(most, x), 0);

for (const { kind, weights, tp, tolerance, ...settings } of cases) {
  void test(`${kind}, ${weights}, tp ${tp}, heads of ${settings.headSize}: chunks, batches and lone rows give the oracle's logits`, async (t) => {
    const folder = path.join(scratch, `${kind}-${weights}-${tp}-${settings.headSize}`);
    const isOnGrid = kind === 'cuda' && (weights === 'int4' || weights === 'int8');
    const config = {
      // CUDA's 4 and 8 bits want multiples of 64, for each rank: of 21 blocks one has 11, the other 10.
      ...(isOnGrid
        ? { hiddenSize: 128, ffnSize: tp === 2 ? 1344 : 192 }
        : { hiddenSize: 96, ffnSize: 192 }),
      ...{ layerCount: 2, headCount: 6, kvHeadCount: 3 },
      ...{ vocabSize: 173, maxPositions: 64, normEps: 1e-5, ropeTheta: 10_000, ...settings },
    };
    const isFourBit = weights === 'int4';
    writeRandomCheckpoint(folder, { config, seed: tp, format: 'F16', shardCount: 1, isFourBit });
    const random = new Random(tp);
    const draw = (count: number) => Array.from({ length: count }, () => random.below(173));
    const prompts = [draw(21), draw(9), draw(14)];
    const next = draw(3);
    const oracle = new Oracle(folder);
    const expected = prompts.map((prompt, i) => prefill(oracle, [...prompt, next[i]!]).logits);
    // The longest chunks are of 14 rows: a device that takes fewer at once has several runs for them.
    const attentionRows = kind === 'webgpu' ? 5 : undefined;
    const limits = { ...LIMITS, tp, weights, attentionRows };
    await withHostMemoryDevices(folder, kind, limits, async (ranks) => {
      const { SAMPLED_ROWS_NONE: none, SAMPLED_ROWS_LAST: last } = SampledRows;
      const chunk = (slot: number, tokens: number[], sampledRows: SampledRows) => ({
        ...{ slot, tokens, sampledRows },
        targets: [],
      });
      const joins = [0, 1, 2].map((slot) => ({ slot, temperature: 0.7 }));
      const [a, b, c] = prompts as [number[], number[], number[]];
      // A prompt in two chunks, beside another one; then a chunk beside a decode; then all decode.
      const chunks = [chunk(0, a.slice(0, 12), none), chunk(1, b, last)];
      await ranks.forward({ ...noStep, number: 1, joins, chunks });
      await ranks.forward({
        ...noStep,
        number: 2,
        decodeSlots: [1],
        decodeTokens: [next[1]!],
        chunks: [chunk(0, a.slice(12), none), chunk(2, c, none)],
      });
      const beside = await ranks.fetchRow(2, 0);
      await ranks.forward({ ...noStep, number: 3, decodeSlots: [0], decodeTokens: [next[0]!] });
      const alone = await ranks.fetchRow(3, 0);
      const decodeSlots = [0, 1, 2];
      const decodeTokens = [5, 6, next[2]!];
      const results = await ranks.forward({ ...noStep, number: 4, decodeSlots, decodeTokens });
      const batched = await ranks.fetchRow(4, 2);
      for (const [name, row, i] of [
        ['beside chunks', beside, 1],
        ['alone', alone, 0],
        ['in a batch', batched, 2],
      ] as const) {
        const most = distance(row, expected[i]!);
        t.diagnostic(`${name}: largest difference ${most.toExponential(1)}`);
        assert.ok(most < tolerance, `${name}: ${most}`);
      }
      // What the ranks report of the last row is what its logits say.
      const top = results.flatMap((result) =>
        Array.from({ length: 4 }, (_, i) => [result.topIds[8 + i]!, result.topLogits[8 + i]!]),
      );
      for (const [id, logit] of top) assert.ok(Math.abs(batched[id!]! - logit!) < 1e-6);
      const best = Math.max(...batched);
      assert.equal(Math.max(...top.map(([, logit]) => logit!)), best);
      const sum = (temperature: number, rows: Iterable<number>) =>
        [...rows].reduce((total, x) => total + Math.exp(x / temperature), 0);
      const reported = results.reduce((total, r) => total + Math.exp(r.lseAdjusted[2]!), 0);
      assert.ok(Math.abs(Math.log(reported) - Math.log(sum(0.7, batched))) < 1e-4);
    });
  });
}

void test('a slot that begins with a copy of another one goes on as that one does', async () => {
  const folder = path.join(scratch, 'begun');
  const config = {
    ...{ hiddenSize: 64, ffnSize: 96, layerCount: 3, headCount: 4, kvHeadCount: 2, headSize: 16 },
    ...{ vocabSize: 101, maxPositions: 64, normEps: 1e-5, ropeTheta: 10_000, isHeadTied: false },
  };
  writeRandomCheckpoint(folder, { config, seed: 2, format: 'F32', shardCount: 1 });
  const tokens = Array.from({ length: 30 }, (_, i) => (7 * i) % 101);
  const { logits: expected } = prefill(new Oracle(folder), tokens);
  for (const [kind, weights, tolerance] of [
    ['webgpu', 'fp32', 2e-4],
    ['cuda', 'fp16', 5e-2],
  ] as const) {
    await withHostMemoryDevices(folder, kind, { ...LIMITS, tp: 2, weights }, async (ranks) => {
      assert.ok(ranks.loaded.every(({ copiesSlots }) => copiesSlots));
      const { SAMPLED_ROWS_LAST: sampledRows } = SampledRows;
      const chunk = (slot: number, own: number[]) => ({
        slot,
        tokens: own,
        sampledRows,
        targets: [],
      });
      const joins = [{ slot: 0, temperature: 0 }];
      await ranks.forward({ ...noStep, number: 1, joins, chunks: [chunk(0, tokens.slice(0, 24))] });
      const kept = { length: 20, copiedFrom: 0, tokens: tokens.slice(0, 20) };
      await ranks.forward({
        ...{ ...noStep, number: 2, joins: [{ slot: 2, temperature: 0, kept }] },
        chunks: [chunk(2, tokens.slice(20))],
      });
      const most = distance(await ranks.fetchRow(2, 0), expected);
      assert.ok(most < tolerance, `${kind}: ${most}`);
    });
  }
});

void test("a step of many groups is cut and joined in several cuts, with the oracle's logits", async () => {
  const folder = path.join(scratch, 'cut');
  const config = {
    ...{ hiddenSize: 32, ffnSize: 64, layerCount: 2, headCount: 2, kvHeadCount: 1, headSize: 16 },
    ...{ vocabSize: 61, maxPositions: 96, normEps: 1e-5, ropeTheta: 10_000, isHeadTied: false },
  };
  writeRandomCheckpoint(folder, { config, seed: 6, format: 'F32', shardCount: 1 });
  const tokens = Array.from({ length: 80 }, (_, i) => (5 * i) % 61);
  const { logits: expected } = prefill(new Oracle(folder), tokens);
  // 79 rows, 4 at once, are 20 groups; 2 at once 40, and 1 at once 79, which is more than 64.
  for (const attentionRows of [4, 2, 1]) {
    const limits = {
      maxSeqLen: 96,
      maxBatchSize: 1,
      maxStepRows: 80,
      tp: 1,
      weights: 'fp32',
    } as const;
    await withHostMemoryDevices(folder, 'webgpu', { ...limits, attentionRows }, async (ranks) => {
      const { SAMPLED_ROWS_LAST: sampledRows } = SampledRows;
      const joins = [{ slot: 0, temperature: 0 }];
      const chunks = [{ slot: 0, tokens: tokens.slice(0, 79), sampledRows, targets: [] }];
      await ranks.forward({ ...noStep, number: 1, joins, chunks });
      const decode = { decodeSlots: [0], decodeTokens: [tokens[79]!] };
      await ranks.forward({ ...noStep, ...decode, number: 2 });
      const most = distance(await ranks.fetchRow(2, 0), expected);
      assert.ok(most < 2e-4, `${attentionRows} at once: ${most}`);
    });
  }
});

void test('decodes that come again are launched as one, and give the same logits, bit for bit', async () => {
  const folder = path.join(scratch, 'captured');
  const config = {
    ...{ hiddenSize: 64, ffnSize: 128, layerCount: 3, headCount: 4, kvHeadCount: 2, headSize: 16 },
    ...{ vocabSize: 101, maxPositions: 640, normEps: 1e-5, ropeTheta: 10_000, isHeadTied: false },
  };
  writeRandomCheckpoint(folder, { config, seed: 4, format: 'F32', shardCount: 1 });
  const tokens = Array.from({ length: 252 }, (_, i) => (11 * i) % 101);
  const decodesOf = async (
    tp: number,
    weights: 'fp16' | 'int4',
    capturer?: Capturer,
  ): Promise<Float32Array[]> => {
    const limits = { maxSeqLen: 640, maxBatchSize: 2, maxStepRows: 256, tp, weights } as const;
    const own = capturer === undefined ? limits : { ...limits, capturer };
    return withHostMemoryDevices(folder, 'cuda', own, async (ranks) => {
      const { SAMPLED_ROWS_LAST: sampledRows } = SampledRows;
      const joins = [0, 1].map((slot) => ({ slot, temperature: 0 }));
      const chunks = [{ slot: 0, tokens, sampledRows, targets: [] }];
      await ranks.forward({ ...noStep, number: 1, joins, chunks });
      const rows: Float32Array[] = [];
      // Alone, past a length of 256, beside another one from its first token on, and alone again.
      const slots = [...Array<number[]>(8).fill([0]), ...Array<number[]>(5).fill([0, 1]), [0]];
      for (const [i, decodeSlots] of slots.entries()) {
        const decodeTokens = decodeSlots.map((slot) => (3 * i + slot) % 101);
        await ranks.forward({ ...noStep, number: i + 2, decodeSlots, decodeTokens });
        rows.push(await ranks.fetchRow(i + 2, decodeSlots.length - 1));
      }
      return rows;
    });
  };
  for (const [tp, weights] of [
    [1, 'fp16'],
    [2, 'fp16'],
    // With graphs of each layer's own.
    [1, 'int4'],
    [2, 'int4'],
  ] as const) {
    const counts = { captured: 0, launched: 0, released: 0 };
    const capturer: Capturer = {
      capture: (issue) => {
        counts.captured += 1;
        issue();
        return {
          launch: () => {
            counts.launched += 1;
            issue();
          },
          release: () => void (counts.released += 1),
        };
      },
    };
    assert.deepEqual(await decodesOf(tp, weights, capturer), await decodesOf(tp, weights));
    // All of a step, or what lies between two exchanges; and its head.
    const segments = tp === 1 ? 1 : 2 * (2 * config.layerCount + 1);
    assert.ok(counts.captured >= 3 * segments, `${counts.captured} captured`);
    assert.ok(counts.launched >= 6 * segments, `${counts.launched} launched`);
    assert.equal(counts.released, counts.captured);
  }
});

void test('what does not fit is loaded with fewer bits, as few as it takes, where the weights were left to the device', async () => {
  const folder = path.join(scratch, 'fitted');
  const config = {
    ...{ hiddenSize: 128, ffnSize: 256, layerCount: 2, headCount: 4, kvHeadCount: 4, headSize: 32 },
    ...{ vocabSize: 64, maxPositions: 64, normEps: 1e-5, ropeTheta: 10_000, isHeadTied: false },
  };
  writeRandomCheckpoint(folder, { config, seed: 3, format: 'F16', shardCount: 1, isFourBit: true });
  const plan = (weights: 'fp32' | 'fp16' | 'int4') => {
    const limits = { ...LIMITS, weights, exact: false, device: 'webgpu' };
    return planGroup(openCheckpoint(folder), 1, limits);
  };
  const [whole, half, four] = [plan('fp32'), plan('fp16'), plan('int4')];
  const tokens = Array.from({ length: 12 }, (_, i) => i + 3);
  const { logits: expected } = prefill(new Oracle(folder), tokens);
  const limits = { ...LIMITS, tp: 1, weights: 'fp32', smaller: ['fp16', 'int4'] } as const;
  for (const [memoryLimit, taken, refusals] of [
    [fullestBytes(whole), whole, 0],
    [fullestBytes(whole) - 1, half, 1],
    [fullestBytes(half), half, 1],
    [fullestBytes(half) - 1, four, 2],
    [fullestBytes(four), four, 2],
  ] as const) {
    const own = { ...limits, memoryLimit };
    await withHostMemoryDevices(folder, 'webgpu', own, async (first, again) => {
      assert.ok(first.loaded[0]!.bytesRead > 0);
      const ranks = await again();
      // What fitted is still there, though more was asked for first.
      assert.equal(ranks.loaded[0]!.bytesRead, 0);
      for (const { loaded, warnings } of [first, ranks]) {
        assert.equal(loaded[0]!.weightBytes, taken.ranks[0]!.weightBytes);
        assert.equal(warnings.length, refusals);
        for (const warning of warnings) assert.match(warning, /^fewer bits: .* are free/);
      }
      const { SAMPLED_ROWS_LAST: sampledRows } = SampledRows;
      const joins = [{ slot: 0, temperature: 0 }];
      const chunks = [{ slot: 0, tokens, sampledRows, targets: [] }];
      await ranks.forward({ ...noStep, number: 1, joins, chunks });
      assert.ok(distance(await ranks.fetchRow(1, 0), expected) < 5e-2);
    });
  }
  const tooLittle = { ...limits, memoryLimit: fullestBytes(four) - 1 };
  await assert.rejects(
    withHostMemoryDevices(folder, 'webgpu', tooLittle, () => Promise.resolve()),
    (error) =>
      error instanceof CaravanError &&
      error.code === 'out_of_memory' &&
      /needs 0\.81 GB \(weights .*KV .*GB are free/.test(error.message),
  );
});

void test('of a decode only partials, places and the largest logits are copied', async () => {
  const folder = path.join(scratch, 'copied');
  const config = {
    ...{ hiddenSize: 64, ffnSize: 96, layerCount: 3, headCount: 4, kvHeadCount: 2, headSize: 16 },
    ...{ vocabSize: 101, maxPositions: 64, normEps: 1e-5, ropeTheta: 10_000, isHeadTied: false },
  };
  writeRandomCheckpoint(folder, { config, seed: 1, format: 'F32', shardCount: 1 });
  for (const tp of [1, 2]) {
    const limits = { ...LIMITS, tp, weights: 'fp32' } as const;
    await withHostMemoryDevices(folder, 'webgpu', limits, async (ranks) => {
      const tokens = Array.from({ length: 40 }, (_, i) => i);
      const { SAMPLED_ROWS_LAST: sampledRows } = SampledRows;
      const joins = [{ slot: 0, temperature: 0 }];
      const chunks = [{ slot: 0, tokens, sampledRows, targets: [] }];
      await ranks.forward({ ...noStep, number: 1, joins, chunks });
      const step = { ...noStep, number: 2, decodeSlots: [0], decodeTokens: [7] };
      for (const { bytesToDevice, bytesToHost } of await ranks.forward(step)) {
        const partial = 4 * config.hiddenSize;
        const exchanges = 2 * config.layerCount + 1;
        // Token (8), position (8), last position (4), sampled row (8), inverse temperature (4).
        assert.equal(bytesToDevice, partial * exchanges * (tp - 1) + 32);
        // Four logits and their places, two sums.
        assert.equal(bytesToHost, (tp > 1 ? exchanges * partial : 0) + 4 * (4 + 8) + 2 * 4);
      }
    });
  }
});
