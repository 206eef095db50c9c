/**
 * What is drawn has the distribution that the float64 oracle's logits give, for every setting of sampling: 20,000
 * draws from one row of real ranks, and 500 (in the long form) through the whole engine. Chi-square, with fixed seeds.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { coin, purpose } from '../coordinator/coin.js';
import { adjustmentOf } from '../coordinator/adjustment.js';
import { RankEngine } from '../coordinator/engine.js';
import type { Request, Sampling } from '../coordinator/request.js';
import {
  mergeCandidates,
  pickToken,
  SAMPLED_TOP_K,
  wholeRowCandidates,
  type Candidates,
} from '../coordinator/sampler.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { SampledRows } from '../proto/gen/cluster.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { Oracle } from './oracle.js';
import { RankPool } from './rank-pool.js';

const VOCABULARY = 1024;
const LIMITS = { maxSeqLen: 64, maxBatchSize: 64, maxStepRows: 512 };
const DRAWS = 20_000;
const ENGINE_DRAWS = process.env['CARAVAN_LONG'] === '1' ? 500 : 120;

const pool = new RankPool();
after(() => pool.stop());

const prompt = [1, 300, 301, 300, 17];
const answer = [300, 45, 45, 402];

const none = { repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, biases: [] };
const plain = { temperature: 1, topP: 1, topK: 0, seed: 1 };

const settings: Readonly<Record<string, Sampling>> = {
  'temperature 1': plain,
  'temperature 0.3': { ...plain, temperature: 0.3 },
  'temperature 2': { ...plain, temperature: 2 },
  'top_p 0.9': { ...plain, topP: 0.9, temperature: 1.5 },
  'top_p 0.999, wider than what ranks name': { ...plain, topP: 0.999, temperature: 2 },
  'top_k 12': { ...plain, topK: 12, temperature: 1.5 },
  'top_k 200, more than ranks name': { ...plain, topK: 200, temperature: 2 },
  'min_p 0.01': { ...plain, minP: 0.01, temperature: 1.5 },
  'top_k 60, min_p 0.001 and top_p 0.95': {
    ...{ ...plain, topK: 60, minP: 0.001, topP: 0.95, temperature: 1.7 },
  },
  'a repetition penalty': { ...plain, adjustment: { ...none, repetitionPenalty: 1.4 } },
  'presence and frequency penalties': {
    ...{ ...plain, temperature: 1.2 },
    adjustment: { ...none, presencePenalty: 1.2, frequencyPenalty: 0.7 },
  },
  biases: {
    ...{ ...plain, temperature: 1.3 },
    adjustment: {
      ...none,
      biases: [
        [45, 4],
        [300, -100],
        [7, 9],
      ],
    },
  },
};

/** (vocabulary) float64 logits after prompt and answer. */
const oracleLogits = (() => {
  const oracle = new Oracle(embeddedModelPath());
  const cache = oracle.start();
  let logits = new Float64Array();
  for (const token of [...prompt, ...answer]) logits = oracle.next(cache, token) as typeof logits;
  return logits;
})();

/** (vocabulary) probabilities, by the book. */
function distributionOf({ temperature, topP, topK, minP, adjustment = none }: Sampling): number[] {
  const logits = Array.from(oracleLogits, (raw, id) => {
    const { repetitionPenalty, presencePenalty, frequencyPenalty, biases } = adjustment;
    const isSeen = prompt.includes(id) || answer.includes(id);
    const repeated = !isSeen ? raw : raw > 0 ? raw / repetitionPenalty : raw * repetitionPenalty;
    const count = answer.filter((token) => token === id).length;
    const penalty = count > 0 ? presencePenalty + count * frequencyPenalty : 0;
    return repeated - penalty + (biases.find(([biased]) => biased === id)?.[1] ?? 0);
  });
  const max = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp((logit - max) / temperature));
  const falling = [...weights.keys()].sort((a, b) => weights[b]! - weights[a]!);
  let kept = topK > 0 ? falling.slice(0, topK) : falling;
  if (minP !== undefined) kept = kept.filter((id) => weights[id]! >= minP);
  const keptMass = kept.reduce((sum, id) => sum + weights[id]!, 0);
  let before = 0;
  kept = kept.filter((id) => {
    const isKept = before <= topP * keptMass;
    before += weights[id]!;
    return isKept;
  });
  const mass = kept.reduce((sum, id) => sum + weights[id]!, 0);
  const probabilities = Array<number>(logits.length).fill(0);
  for (const id of kept) probabilities[id] = weights[id]! / mass;
  return probabilities;
}

/**
 * Pearson's chi-square; tokens of fewer than 5 expected draws count together. Refused when so much comes by chance once
 * in 10,000 times (E. Wilson, M. Hilferty, "The distribution of chi-square", 1931).
 */
function checkDraws(tokens: readonly number[], probabilities: readonly number[], name: string) {
  const counts = Array<number>(probabilities.length).fill(0);
  for (const token of tokens) counts[token]! += 1;
  const bins: { seen: number; expected: number }[] = [];
  const rest = { seen: 0, expected: 0 };
  probabilities.forEach((probability, id) => {
    const expected = probability * tokens.length;
    assert.ok(probability > 0 || counts[id] === 0, `${name}: token ${id} was cut off`);
    if (expected >= 5) bins.push({ seen: counts[id]!, expected });
    else {
      rest.seen += counts[id]!;
      rest.expected += expected;
    }
  });
  if (rest.expected >= 5) bins.push(rest);
  else {
    bins[0]!.seen += rest.seen;
    bins[0]!.expected += rest.expected;
  }
  if (bins.length === 1) return `${name}: one token`;
  const chiSquare = bins.reduce(
    (sum, { seen, expected }) => sum + (seen - expected) ** 2 / expected,
    0,
  );
  const freedom = bins.length - 1;
  const limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * Math.sqrt(2 / (9 * freedom))) ** 3;
  assert.ok(chiSquare <= limit, `${name}: ${chiSquare} is over ${limit}, ${freedom} degrees`);
  return `${name}: chi-square ${chiSquare.toFixed(1)} of ${freedom} degrees, limit ${limit.toFixed(1)}`;
}

const requestOf = (sampling: Sampling): Request => ({
  ...{ version: 1, model: 'caravan-tiny', promptTokenIds: prompt, sampling },
  ...{ maxTokens: answer.length + 1, stop: [], ignoreEos: true, isTextStart: false },
});

void test('a chi-square that is wrong is seen', () => {
  const half = settings['temperature 1']!;
  const draws = Array.from({ length: DRAWS }, (_, i) => (i % 100 === 0 ? 5 : 3));
  assert.throws(() => checkDraws(draws, distributionOf(half), 'never drawn'), /is over/);
});

for (const tp of [1, 4]) {
  void test(`20,000 draws a setting from a row of ${tp} ranks are distributed as the oracle's`, async (context) => {
    await pool.withGroup(embeddedModelPath(), { tp, ...LIMITS }, async ({ ranks }) => {
      let number = 0;
      for (const [name, sampling] of Object.entries(settings)) {
        number += 1;
        const results = await ranks.forward({
          ...{ number, decodeSlots: [], decodeTokens: [], topK: SAMPLED_TOP_K },
          joins: [
            {
              ...{ slot: 0, temperature: sampling.temperature },
              adjustment: adjustmentOf(requestOf(sampling)),
            },
          ],
          chunks: [
            {
              ...{ slot: 0, tokens: [...prompt, ...answer], targets: [] },
              sampledRows: SampledRows.SAMPLED_ROWS_LAST,
            },
          ],
        });
        const candidates = mergeCandidates(results, ranks.vocabCounts, 0);
        let whole: Candidates | null = null;
        let fetched = 0;
        const draws: number[] = [];
        for (let position = 0; position < DRAWS; position += 1) {
          const drawn = coin(sampling.seed, 0, position, purpose.sample);
          let token = pickToken(candidates, sampling, drawn);
          if (token === null) {
            fetched += 1;
            whole ??= wholeRowCandidates(
              await ranks.fetchRow(number, 0, 'adjusted'),
              candidates.lse,
            );
            token = pickToken(whole, sampling, drawn);
          }
          assert.ok(token !== null);
          draws.push(token);
        }
        const told = checkDraws(draws, distributionOf(sampling), name);
        context.diagnostic(`${told}; whole rows ${((100 * fetched) / DRAWS).toFixed(2)} %`);
      }
    });
  });
}

void test(`${ENGINE_DRAWS} draws a setting through the whole engine are distributed as the oracle says`, async () => {
  await pool.withGroup(embeddedModelPath(), { tp: 4, ...LIMITS }, async ({ ranks }) => {
    const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), { ...LIMITS, isExact: false });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const draw = (sampling: Sampling, seed: number): Promise<number> =>
      new Promise((resolve, reject) => {
        let token = -1;
        engine.add(
          {
            ...{ id: 'draw', index: 0, resumeTokenIds: answer },
            request: requestOf({ ...sampling, seed }),
          },
          {
            token: (id) => (token = id),
            end: () => {
              resolve(token);
            },
            fail: reject,
          },
        );
      });
    for (const [name, sampling] of Object.entries(settings)) {
      const draws: number[] = [];
      while (draws.length < ENGINE_DRAWS) {
        const count = Math.min(LIMITS.maxBatchSize, ENGINE_DRAWS - draws.length);
        const seeds = Array.from({ length: count }, (_, i) => draws.length + i);
        draws.push(...(await Promise.all(seeds.map((seed) => draw(sampling, seed)))));
      }
      checkDraws(draws, distributionOf(sampling), name);
    }
    stop.abort();
    await running;
  });
});
