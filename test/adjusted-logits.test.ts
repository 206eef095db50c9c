/**
 * Penalties and biases: what a rank does to its slice of the logits, and that a request which asks for them gets the
 * tokens that the book gives, alone or taken over by another engine.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { RankEngine, type SequenceSpec } from '../coordinator/engine.js';
import type { LogitAdjustment, Sampling } from '../coordinator/request.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { cut } from '../model/plan.js';
import { SampledRows } from '../proto/gen/cluster.js';
import { AdjustedLogits } from '../worker/adjusted-logits.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { Oracle } from './oracle.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const VOCABULARY = 1024;
const LIMITS = { maxSeqLen: 128, maxBatchSize: 4, maxStepRows: 64 };

const pool = new RankPool();
after(() => pool.stop());

/** Logits after `tokens`, by the book: (vocabulary). */
function adjusted(
  raw: ArrayLike<number>,
  promptLength: number,
  tokens: readonly number[],
  { repetitionPenalty, presencePenalty, frequencyPenalty, biases }: LogitAdjustment,
): number[] {
  const answer = tokens.slice(promptLength);
  return Array.from(raw, (logit, id) => {
    let changed = logit;
    if (tokens.includes(id)) changed *= logit > 0 ? 1 / repetitionPenalty : repetitionPenalty;
    const count = answer.filter((token) => token === id).length;
    changed -= count * frequencyPenalty + (count > 0 ? presencePenalty : 0);
    return changed + (biases.find(([biased]) => biased === id)?.[1] ?? 0);
  });
}

const adjustments: readonly LogitAdjustment[] = [
  { repetitionPenalty: 1.3, presencePenalty: 0, frequencyPenalty: 0, biases: [] },
  { repetitionPenalty: 1, presencePenalty: 1.5, frequencyPenalty: 0, biases: [] },
  { repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: -0.7, biases: [] },
  { repetitionPenalty: 0.8, presencePenalty: -1, frequencyPenalty: 0.4, biases: [[7, 3]] },
  {
    ...{ repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0 },
    biases: Array.from({ length: 40 }, (_, i) => [25 * i, i % 2 === 0 ? 100 : -100] as const),
  },
];

const toJoin = (slot: number, promptLength: number, { biases, ...penalties }: LogitAdjustment) => ({
  slot,
  temperature: 1,
  adjustment: {
    ...penalties,
    promptLength,
    biasIds: biases.map(([id]) => id),
    biases: biases.map(([, bias]) => bias),
  },
});

void test('ranks adjust their slices as one would the whole row, and leave the raw one alone', () => {
  const random = new Random(21);
  for (let run = 0; run < 300; run += 1) {
    const size = 30 + random.below(40);
    const tp = 1 + random.below(8);
    const raw = Float32Array.from({ length: size }, () => 4 * random.normal());
    const adjustment: LogitAdjustment = {
      repetitionPenalty: random.pick([1, 0.5, 1.7]),
      presencePenalty: random.pick([0, -2, 1.1]),
      frequencyPenalty: random.pick([0, -0.3, 2]),
      biases: Array.from({ length: random.below(9) }, (_, i) => [3 * i, 9 * random.normal()]),
    };
    const tokens = Array.from({ length: 1 + random.below(60) }, () => random.below(size));
    const promptLength = 1 + random.below(tokens.length);
    const row: number[] = [];
    for (let rank = 0; rank < tp; rank += 1) {
      const slice = cut(size, tp, rank);
      const logits = new AdjustedLogits(slice);
      // What was in the slot before leaves no trace, and neighbours do not mix.
      logits.join(toJoin(3, 0, adjustments[3]!));
      for (let id = 0; id < size; id += 1) logits.feed(3, id);
      logits.join(toJoin(3, promptLength, adjustment));
      logits.join({ slot: 2, temperature: 1 });
      for (const token of tokens) {
        logits.feed(3, token);
        logits.feed(2, token);
      }
      // Guesses that did not hold, and those of which nothing is known yet.
      const guesses = Array.from({ length: random.below(6) }, () => random.below(size));
      for (const token of guesses) logits.feed(3, token);
      logits.rewind(3, guesses.length);
      const later = Array.from({ length: random.below(6) }, () => random.below(size));
      for (const token of later) logits.feed(3, token);
      const own = raw.slice(slice.start, slice.start + slice.count);
      const before = own.slice();
      row.push(...logits.of(3, 0, own, later));
      assert.equal(logits.of(2, 1, own, []), own);
      assert.deepEqual(own, before);
    }
    adjusted(raw, promptLength, tokens, adjustment).forEach((logit, id) => {
      assert.ok(Math.abs(row[id]! - logit) <= 1e-5 * Math.max(1, Math.abs(logit)), `id ${id}`);
    });
  }
});

const specOf = (
  promptTokenIds: readonly number[],
  sampling: Sampling,
  resumeTokenIds: readonly number[] = [],
): SequenceSpec => ({
  id: 'sequence',
  index: 0,
  resumeTokenIds,
  request: {
    ...{ version: 1, model: 'caravan-tiny', promptTokenIds, sampling, maxTokens: 40 },
    ...{ stop: [], ignoreEos: true, isTextStart: false },
  },
});

function generate(engine: RankEngine, spec: SequenceSpec): Promise<number[]> {
  const tokenIds: number[] = [];
  return new Promise((resolve, reject) => {
    engine.add(spec, {
      token: (tokenId) => {
        tokenIds.push(tokenId);
      },
      end: () => {
        resolve(tokenIds);
      },
      fail: reject,
    });
  });
}

for (const tp of [1, 4]) {
  void test(`greedy answers under penalties and biases are the oracle's at tp ${tp}`, async () => {
    const oracle = new Oracle(embeddedModelPath());
    const prompt = [1, 300, 301, 300, 17];
    await pool.withGroup(embeddedModelPath(), { tp, ...LIMITS }, async ({ ranks }) => {
      const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), { ...LIMITS, isExact: true });
      const stop = new AbortController();
      const running = engine.run(stop.signal);
      const answers = await Promise.all(
        adjustments.slice(0, 4).map((adjustment) => {
          const sampling = { temperature: 0, topP: 1, topK: 0, seed: 0, adjustment };
          return generate(engine, specOf(prompt, sampling));
        }),
      );
      for (const [i, answer] of answers.entries()) {
        const cache = oracle.start();
        let logits = new Float64Array();
        for (const token of prompt) logits = oracle.next(cache, token) as typeof logits;
        const tokens = [...prompt];
        for (const token of answer) {
          const row = adjusted(logits, prompt.length, tokens, adjustments[i]!);
          const best = Math.max(...row);
          assert.ok(best - row[token]! < 1e-4, `token ${tokens.length} of adjustment ${i}`);
          tokens.push(token);
          logits = oracle.next(cache, token) as typeof logits;
        }
        assert.equal(answer.length, 40);
      }
      stop.abort();
      await running;
    });
  });
}

void test('an adjusted sequence goes on exactly where it was cut', async () => {
  const prompt = [1, 300, 301, 300, 17];
  await pool.withGroup(embeddedModelPath(), { tp: 2, ...LIMITS }, async ({ ranks }) => {
    const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), { ...LIMITS, isExact: true });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const seen = new Set<string>();
    for (const [i, adjustment] of adjustments.entries()) {
      const sampling = { temperature: 2, topP: 1, topK: 0, minP: 0.001, seed: 40, adjustment };
      const whole = await generate(engine, specOf(prompt, sampling));
      const cuts = [1, 13, 39];
      const resumed = await Promise.all(
        cuts.map((at) => generate(engine, specOf(prompt, sampling, whole.slice(0, at)))),
      );
      resumed.forEach((tokens, j) => {
        assert.deepEqual(tokens, whole.slice(cuts[j]), `adjustment ${i}`);
      });
      seen.add(whole.join());
    }
    // The same coins: what differs is the adjustment's doing.
    assert.equal(seen.size, adjustments.length);
    stop.abort();
    await running;
  });
});

void test('a fetched row is raw or adjusted, as it is asked for', async () => {
  const prompt = [1, 300, 301, 300, 17];
  const adjustment = adjustments[3]!;
  await pool.withGroup(embeddedModelPath(), { tp: 2, ...LIMITS }, async ({ ranks }) => {
    await ranks.forward({
      ...{ number: 1, decodeSlots: [], decodeTokens: [], topK: 1 },
      joins: [toJoin(0, 2, adjustment)],
      chunks: [
        { slot: 0, tokens: prompt, sampledRows: SampledRows.SAMPLED_ROWS_LAST, targets: [] },
      ],
    });
    const raw = await ranks.fetchRow(1, 0);
    const row = await ranks.fetchRow(1, 0, 'adjusted');
    const expected = adjusted(raw, 2, prompt, adjustment);
    assert.ok(row.some((logit, id) => logit !== raw[id]));
    for (const [id, logit] of expected.entries()) assert.ok(Math.abs(row[id]! - logit) < 1e-5);
    assert.deepEqual(await ranks.fetchRow(1, 0), raw);
  });
});
