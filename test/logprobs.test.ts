/**
 * Logprobs are those of the float64 oracle's raw logits, of tokens and of prompts, whatever penalties and temperature
 * do, in whatever company a sequence runs, and wherever it was cut.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { RankEngine, type SequenceSpec } from '../coordinator/engine.js';
import type { Sampling, TokenLogprobs } from '../coordinator/request.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { Oracle } from './oracle.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const VOCABULARY = 1024;
const LIMITS = { maxSeqLen: 128, maxBatchSize: 6, maxStepRows: 64 };
const TOLERANCE = 1e-4;

const pool = new RankPool();
after(() => pool.stop());
const oracle = new Oracle(embeddedModelPath());

interface Generated {
  readonly tokenIds: number[];
  readonly logprobs: TokenLogprobs[];
  readonly prompt: TokenLogprobs[];
}

function generate(engine: RankEngine, spec: SequenceSpec): Promise<Generated> {
  const seen: Generated = { tokenIds: [], logprobs: [], prompt: [] };
  return new Promise((resolve, reject) => {
    engine.add(spec, {
      token: (tokenId, _text, logprobs) => {
        seen.tokenIds.push(tokenId);
        if (logprobs !== undefined) seen.logprobs.push(logprobs);
      },
      prompt: (logprobs) => {
        assert.equal(seen.tokenIds.length, 0, 'the prompt comes before the first token');
        seen.prompt.push(...logprobs);
      },
      end: () => {
        resolve(seen);
      },
      fail: reject,
    });
  });
}

/** (tokens - 1) rows of log-softmax: what the oracle says of each token but the first, and of those not chosen. */
function oracleRows(tokens: readonly number[]): Float64Array[] {
  const cache = oracle.start();
  return tokens.slice(0, -1).map((token) => {
    const logits = oracle.next(cache, token);
    const max = Math.max(...logits);
    const lse = max + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - max), 0));
    return logits.map((logit) => logit - lse);
  });
}

/** @returns the largest error. */
function check(row: Float64Array, token: number, seen: TokenLogprobs, count: number): number {
  let worst = Math.abs(seen.logprob - row[token]!);
  assert.equal(seen.top.length, count);
  const falling = [...row].sort((a, b) => b - a);
  seen.top.forEach(([id, logprob], i) => {
    // Nearly equal ones may stand in either order.
    worst = Math.max(worst, Math.abs(logprob - row[id]!), Math.abs(logprob - falling[i]!));
  });
  assert.equal(new Set(seen.top.map(([id]) => id)).size, count);
  assert.ok(worst <= TOLERANCE, `${worst} at token ${token}`);
  return worst;
}

const settings: readonly Sampling[] = [
  { temperature: 0, topP: 1, topK: 0, seed: 0 },
  // A high temperature draws tokens that no rank names: their rows are fetched.
  { temperature: 2, topP: 1, topK: 0, seed: 3 },
  { temperature: 0.7, topP: 0.9, topK: 40, seed: 4 },
  {
    ...{ temperature: 1.5, topP: 1, topK: 0, seed: 5 },
    adjustment: {
      ...{ repetitionPenalty: 1.3, presencePenalty: 0.8, frequencyPenalty: 0.5 },
      // One that is likely is forbidden, one that is unlikely nearly forced.
      biases: [
        [3, 9],
        [300, -100],
        [900, 12],
      ],
    },
  },
];

for (const tp of [1, 4]) {
  void test(`logprobs of tokens and prompts are the oracle's at tp ${tp}`, async (context) => {
    const random = new Random(40 + tp);
    const tokens = (count: number) => Array.from({ length: count }, () => random.below(VOCABULARY));
    const specs = settings.map((sampling, i): SequenceSpec => ({
      id: `sequence ${i}`,
      index: i,
      resumeTokenIds: [],
      reportsLogprobs: true,
      reportsPrompt: i !== 1,
      request: {
        // Longer than a step: the prompt is told in pieces.
        ...{ version: 1, model: 'caravan-tiny', promptTokenIds: tokens([5, 3, 90, 30][i]!) },
        ...{ sampling, maxTokens: 30, stop: [], ignoreEos: true, isTextStart: false },
        logprobs: [5, 0, 20, 3][i]!,
      },
    }));
    await pool.withGroup(embeddedModelPath(), { tp, ...LIMITS }, async ({ ranks }) => {
      let fetched = 0;
      const fetchRow = ranks.fetchRow.bind(ranks);
      ranks.fetchRow = (...args) => {
        fetched += 1;
        return fetchRow(...args);
      };
      const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), { ...LIMITS, isExact: true });
      const stop = new AbortController();
      const running = engine.run(stop.signal);
      const stranger = { ...specs[2]!, reportsLogprobs: false, reportsPrompt: false };
      const [whole, company] = await Promise.all([
        Promise.all(specs.map((spec) => generate(engine, spec))),
        generate(engine, stranger),
      ]);
      assert.deepEqual(company.logprobs, []);
      assert.deepEqual(company.prompt, []);
      assert.deepEqual(company.tokenIds.length, 30);
      let worst = 0;
      whole.forEach(({ tokenIds, logprobs, prompt }, i) => {
        const { request, reportsPrompt } = specs[i]!;
        const { promptTokenIds } = request;
        const rows = oracleRows([...promptTokenIds, ...tokenIds]);
        const count = request.logprobs!;
        assert.equal(logprobs.length, 30);
        assert.equal(prompt.length, reportsPrompt === true ? promptTokenIds.length - 1 : 0);
        prompt.forEach((seen, at) => {
          worst = Math.max(worst, check(rows[at]!, promptTokenIds[at + 1]!, seen, count));
        });
        logprobs.forEach((seen, at) => {
          const row = rows[promptTokenIds.length - 1 + at]!;
          worst = Math.max(worst, check(row, tokenIds[at]!, seen, count));
        });
      });
      context.diagnostic(`largest error ${worst.toExponential(1)}, ${fetched} rows fetched`);
      assert.ok(fetched > 0, 'some tokens were beyond what the ranks name');
      // Cut anywhere, the rest is the same to the last bit.
      for (const cut of [1, 12]) {
        const resumed = await Promise.all(
          specs.map((spec, i) =>
            generate(engine, { ...spec, resumeTokenIds: whole[i]!.tokenIds.slice(0, cut) }),
          ),
        );
        resumed.forEach((rest, i) => {
          assert.deepEqual(rest.tokenIds, whole[i]!.tokenIds.slice(cut));
          assert.deepEqual(rest.logprobs, whole[i]!.logprobs.slice(cut));
          assert.deepEqual(rest.prompt, whole[i]!.prompt);
        });
      }
      stop.abort();
      await running;
    });
  });
}

void test('a request of no tokens looks at its prompt only', async () => {
  const promptTokenIds = [1, 300, 301, 17];
  await pool.withGroup(embeddedModelPath(), { tp: 2, ...LIMITS }, async ({ ranks }) => {
    const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), { ...LIMITS, isExact: true });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const request = {
      ...{ version: 1 as const, model: 'caravan-tiny', promptTokenIds, maxTokens: 0 },
      ...{ sampling: settings[0]!, stop: [], ignoreEos: false, isTextStart: false, logprobs: 1 },
    };
    const spec = { id: 'a', index: 0, resumeTokenIds: [], request, reportsLogprobs: true };
    const seen = await generate(engine, { ...spec, reportsPrompt: true });
    assert.deepEqual(seen.tokenIds, []);
    oracleRows(promptTokenIds).forEach((row, at) => {
      check(row, promptTokenIds[at + 1]!, seen.prompt[at]!, 1);
    });
    assert.deepEqual(await generate(engine, spec), { tokenIds: [], logprobs: [], prompt: [] });
    assert.equal(engine.freeSlotCount, LIMITS.maxBatchSize);
    stop.abort();
    await running;
  });
});
