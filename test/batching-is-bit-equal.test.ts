/**
 * Exactness rests on this: a sequence's logits are the same bits alone and in any batch, however its prompt is
 * chunked, as long as a chunk has two tokens or more. CARAVAN_LONG=1 tries more rounds, and every length of a prompt.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import type { Ranks } from '../coordinator/ranks.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import type { LlamaConfig } from '../model/config.js';
import { SampledRows, type Chunk } from '../proto/gen/cluster.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const LIMITS = { maxSeqLen: 96, maxBatchSize: 8, maxStepRows: 128 };

/** Unlike caravan-tiny: heads of size 8 and 64, widths that no vector register divides. */
const odd = (headSize: number): LlamaConfig => ({
  hiddenSize: 72,
  ffnSize: 101,
  layerCount: 2,
  headCount: 6,
  kvHeadCount: 3,
  headSize,
  vocabSize: 173,
  maxPositions: 96,
  normEps: 1e-5,
  ropeTheta: 10_000,
  isHeadTied: false,
});

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-bits-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

const random = (headSize: number, config: LlamaConfig, weights: 'fp32' | 'int8' | 'int4') => {
  const name = `head size ${headSize}, ${weights}`;
  const folder = path.join(scratch, name);
  writeRandomCheckpoint(folder, { config, seed: headSize, format: 'BF16', shardCount: 1 });
  return { name, folder, vocabSize: config.vocabSize, headSize, weights };
};

const models = [
  {
    ...{ name: 'caravan-tiny', folder: embeddedModelPath(), vocabSize: 1024, headSize: 16 },
    weights: 'fp32' as const,
  },
  random(8, odd(8), 'fp32'),
  random(64, odd(64), 'fp32'),
  random(64, odd(64), 'int8'),
  // Blocks of four bits need widths that they divide.
  random(32, { ...odd(32), hiddenSize: 192, ffnSize: 320 }, 'int4'),
];

/** One sequence that is fed by hand: its prompt in chunks of these sizes, then tokens one by one. */
interface Fed {
  readonly slot: number;
  readonly prompt: readonly number[];
  readonly chunks: readonly number[];
  readonly decodes: readonly number[];
  /** Step in which it joins. */
  readonly joinsAt: number;
}

/**
 * Feeds sequences side by side until all are done.
 *
 * @returns the logits of the first of them after its prompt and after every decode: (1 + decodes, vocabulary).
 */
async function run(ranks: Ranks, fed: readonly Fed[], firstStep: number) {
  const progress = fed.map(() => ({ chunk: 0, at: 0, decoded: 0 }));
  const rows: Float32Array[] = [];
  let number = firstStep;
  for (let tick = 0; ; tick += 1) {
    const decoding: { slot: number; token: number; index: number }[] = [];
    const chunks: { chunk: Chunk; index: number }[] = [];
    const joins: { slot: number; temperature: number }[] = [];
    fed.forEach(({ slot, prompt, chunks: sizes, decodes, joinsAt }, index) => {
      const state = progress[index]!;
      if (tick < joinsAt) return;
      if (state.chunk < sizes.length) {
        if (state.chunk === 0) joins.push({ slot, temperature: 0 });
        const tokens = prompt.slice(state.at, state.at + sizes[state.chunk]!);
        state.at += tokens.length;
        state.chunk += 1;
        const isLast = state.chunk === sizes.length;
        const sampledRows = isLast ? SampledRows.SAMPLED_ROWS_LAST : SampledRows.SAMPLED_ROWS_NONE;
        chunks.push({ chunk: { slot, tokens, sampledRows, targets: [] }, index });
      } else if (state.decoded < decodes.length) {
        decoding.push({ slot, token: decodes[state.decoded]!, index });
        state.decoded += 1;
      }
    });
    const isDone = fed.every(
      ({ chunks: sizes, decodes }, index) =>
        progress[index]!.chunk === sizes.length && progress[index]!.decoded === decodes.length,
    );
    if (decoding.length + chunks.length === 0) {
      if (isDone) return { rows, nextStep: number };
      continue;
    }
    decoding.sort((a, b) => a.slot - b.slot);
    await ranks.forward({
      number,
      joins,
      decodeSlots: decoding.map(({ slot }) => slot),
      decodeTokens: decoding.map(({ token }) => token),
      chunks: chunks.map(({ chunk }) => chunk),
      topK: 1,
    });
    const sampled = [
      ...decoding,
      ...chunks.filter(({ chunk }) => chunk.sampledRows !== SampledRows.SAMPLED_ROWS_NONE),
    ].findIndex(({ index }) => index === 0);
    if (sampled !== -1) rows.push(await ranks.fetchRow(number, sampled));
    number += 1;
  }
}

/** Random sizes of 2 to 9 that add up. */
function randomChunks(random: Random, total: number): number[] {
  const sizes: number[] = [];
  for (let left = total; left > 0;) {
    const size = Math.min(left, 2 + random.below(8));
    const taken = left - size === 1 ? size + 1 : size;
    sizes.push(taken);
    left -= taken;
  }
  return sizes;
}

for (const { name, folder, vocabSize, weights } of models) {
  for (const tp of [1, 2]) {
    void test(`${name} at tp ${tp}: the same bits alone and in a ragged batch`, async () => {
      const random = new Random(tp + vocabSize);
      const tokens = (count: number) =>
        Array.from({ length: count }, () => random.below(vocabSize));
      await pool.withGroup(folder, { tp, weights, ...LIMITS }, async ({ ranks }) => {
        let nextStep = 1;
        for (let round = 0; round < (isLong ? 4 : 2); round += 1) {
          const prompt = tokens(20 + random.below(30));
          const decodes = tokens(8);
          const whole: Fed = { slot: 0, prompt, chunks: [prompt.length], decodes, joinsAt: 0 };
          const alone = await run(ranks, [whole], nextStep);
          assert.equal(alone.rows.length, 1 + decodes.length);
          const slots = Array.from({ length: LIMITS.maxBatchSize }, (_, slot) => slot);
          slots.sort(() => random.next() - 0.5);
          const others = slots.slice(1).map((slot): Fed => {
            const length = 2 + random.below(40);
            return {
              slot,
              prompt: tokens(length),
              chunks: randomChunks(random, length),
              decodes: tokens(random.below(20)),
              joinsAt: random.below(6),
            };
          });
          const again: Fed = {
            ...whole,
            slot: slots[0]!,
            chunks: randomChunks(random, prompt.length),
            joinsAt: random.below(4),
          };
          const together = await run(ranks, [again, ...others], alone.nextStep);
          nextStep = together.nextStep;
          assert.equal(together.rows.length, alone.rows.length);
          alone.rows.forEach((row, i) => {
            assert.ok(isSameBits(row, together.rows[i]!), `round ${round}, row ${i}`);
          });
        }
      });
    });
  }
}

// ONNX Runtime attends over blocks of query rows, and a block of one row takes another kernel: 2 × headSize + 1
// rows leave one, unless the rank cuts them otherwise.
const lengths = Array.from({ length: LIMITS.maxSeqLen - 1 }, (_, i) => 2 + i).filter(
  // Around the ends of blocks, whatever the head size.
  (length) => isLong || length < 8 || length % 16 <= 2,
);

for (const { name, folder, vocabSize, headSize, weights } of models) {
  void test(`${name}: the same bits whatever is left over of the last block`, async () => {
    const random = new Random(headSize);
    await pool.withGroup(folder, { tp: 1, weights, ...LIMITS }, async ({ ranks }) => {
      let nextStep = 1;
      for (const length of lengths) {
        const prompt = Array.from({ length }, () => random.below(vocabSize));
        const fed = { slot: 0, prompt, decodes: [], joinsAt: 0 };
        const whole = await run(ranks, [{ ...fed, chunks: [length] }], nextStep);
        const cut = await run(ranks, [{ ...fed, chunks: threes(length) }], whole.nextStep);
        nextStep = cut.nextStep;
        assert.ok(isSameBits(whole.rows[0]!, cut.rows[0]!), `a prompt of ${length} tokens`);
      }
    });
  });
}

/** Chunks of three, and at the end two twos where it must be. */
const threes = (total: number): number[] =>
  Array.from({ length: Math.ceil(total / 3) }, (_, i) => i * 3).flatMap((start) => {
    const left = total - start;
    if (left === 4) return [2, 2];
    return left === 1 ? [] : [Math.min(3, left)];
  });

void test('a step may have more rows than a slot has positions', async () => {
  const { folder, vocabSize } = models[1]!;
  const random = new Random(3);
  const tokens = (length: number) => Array.from({ length }, () => random.below(vocabSize));
  const feed = (slot: number, length: number): Fed => ({
    ...{ slot, prompt: tokens(length), chunks: [length], decodes: [], joinsAt: 0 },
  });
  await pool.withGroup(folder, { tp: 2, ...LIMITS }, async ({ ranks }) => {
    const first = feed(0, 64);
    const alone = await run(ranks, [first], 1);
    const together = await run(ranks, [first, feed(1, 60)], alone.nextStep);
    assert.ok(isSameBits(alone.rows[0]!, together.rows[0]!));
  });
});

const isSameBits = (a: Float32Array, b: Float32Array): boolean =>
  Buffer.from(a.buffer, a.byteOffset, a.byteLength).equals(
    Buffer.from(b.buffer, b.byteOffset, b.byteLength),
  );
