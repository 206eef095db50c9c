/**
 * A generation that another engine takes over goes on as if nothing had happened: the same coins, and, in exact mode, the
 * same bits, wherever it was cut and whatever else is in the batch.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { RankEngine, type SequenceSpec } from '../coordinator/engine.js';
import type { FinishReason, Sampling } from '../coordinator/request.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import type { CaravanError } from '../proto/errors.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const LIMITS = { maxSeqLen: 128, maxBatchSize: 6, maxStepRows: 64 };
const VOCABULARY = 1024;
const TOKENS = 40;

const pool = new RankPool();
after(() => pool.stop());

interface Generated {
  readonly tokenIds: number[];
  readonly reason: FinishReason;
}

function generate(engine: RankEngine, spec: SequenceSpec): Promise<Generated> {
  const tokenIds: number[] = [];
  return new Promise((resolve, reject) => {
    engine.add(spec, {
      token: (tokenId) => {
        tokenIds.push(tokenId);
      },
      end: (reason) => {
        resolve({ tokenIds, reason });
      },
      fail: (error: CaravanError) => {
        reject(error);
      },
    });
  });
}

const settings: Record<string, Sampling> = {
  greedily: { temperature: 0, topP: 1, topK: 0, seed: 0 },
  'by seed': { temperature: 0.8, topP: 1, topK: 0, seed: 1234567 },
  'by seed, top_p and top_k': { temperature: 1.2, topP: 0.9, topK: 50, seed: -3 },
};

for (const [name, sampling] of Object.entries(settings)) {
  void test(`a sequence drawn ${name} goes on exactly where it was cut`, async () => {
    const random = new Random(5);
    const tokens = (count: number) => Array.from({ length: count }, () => random.below(VOCABULARY));
    const specOf = (promptTokenIds: readonly number[], resumeTokenIds: readonly number[]) => ({
      id: 'sequence',
      index: 1,
      resumeTokenIds,
      request: {
        version: 1 as const,
        model: 'caravan-tiny',
        promptTokenIds,
        sampling,
        maxTokens: TOKENS,
        stop: [],
        ignoreEos: true,
        isTextStart: false,
      },
    });
    await pool.withGroup(embeddedModelPath(), { tp: 2, ...LIMITS }, async ({ ranks }) => {
      const options = { ...LIMITS, isExact: true };
      const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), options);
      const stop = new AbortController();
      const running = engine.run(stop.signal);
      for (const promptLength of [1, 20, 33]) {
        const prompt = tokens(promptLength);
        const whole = await generate(engine, specOf(prompt, []));
        assert.equal(whole.tokenIds.length, TOKENS);
        // Cut after each of these, resumed side by side with each other and with strangers.
        const cuts = [1, 2, 17, TOKENS - 1];
        const strangers = [tokens(9), tokens(30)].map((other) =>
          generate(engine, specOf(other, [])),
        );
        const resumed = await Promise.all(
          cuts.map((cut) => generate(engine, specOf(prompt, whole.tokenIds.slice(0, cut)))),
        );
        resumed.forEach(({ tokenIds, reason }, i) => {
          assert.deepEqual(tokenIds, whole.tokenIds.slice(cuts[i]));
          assert.equal(reason, 'length');
        });
        await Promise.all(strangers);
        // All of it was generated: only the ending is missing.
        const over = await generate(engine, specOf(prompt, whole.tokenIds));
        assert.deepEqual(over, { tokenIds: [], reason: 'length' });
      }
      stop.abort();
      await running;
    });
  });
}
