import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { RankEngine, type SequenceSink } from '../coordinator/engine.js';
import type { Request } from '../coordinator/request.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { tinyTokenizer } from './real-engine.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const LIMITS = { maxSeqLen: 256, maxBatchSize: 4, maxStepRows: 64 };
const pool = new RankPool();
const tokenizer = tinyTokenizer();

after(() => pool.stop());

interface Answer {
  readonly tokenIds: number[];
  readonly logprobs: number[];
  readonly cachedTokens: number;
}

/** Runs an engine on `tp` ranks of its own group: nothing is in its slots. */
async function withEngine<T>(
  tp: number,
  isExact: boolean,
  use: (engine: RankEngine) => Promise<T>,
): Promise<T> {
  return pool.withGroup(
    embeddedModelPath(),
    { tp, ...LIMITS, exact: isExact },
    async ({ ranks }) => {
      const engine = new RankEngine(ranks, tokenizer, { ...LIMITS, isExact });
      const stop = new AbortController();
      const running = engine.run(stop.signal);
      try {
        return await use(engine);
      } finally {
        stop.abort();
        await running;
      }
    },
  );
}

const requestOf = (promptTokenIds: readonly number[], maxTokens: number, seed = 7): Request => ({
  ...{ version: 1, model: 'tiny', promptTokenIds, maxTokens, stop: [] },
  ...{ ignoreEos: true, isTextStart: false, logprobs: 0 },
  sampling: {
    ...{ temperature: 0.9, topP: 0.95, topK: 0, seed },
    adjustment: { repetitionPenalty: 1.3, presencePenalty: 0.2, frequencyPenalty: 0.1, biases: [] },
  },
});

function answer(
  engine: RankEngine,
  request: Request,
  { tenant = 'one', resumeTokenIds = [] as readonly number[] } = {},
): { done: Promise<Answer>; cancel: () => void } {
  let cancel = (): void => undefined;
  const done = new Promise<Answer>((resolve, reject) => {
    const tokenIds: number[] = [];
    const logprobs: number[] = [];
    let cachedTokens = -1;
    const sink: SequenceSink = {
      begin: (count) => (cachedTokens = count),
      token: (id, _, told) => {
        tokenIds.push(id);
        logprobs.push(told!.logprob);
      },
      end: () => {
        resolve({ tokenIds, logprobs, cachedTokens });
      },
      fail: reject,
    };
    const spec = { id: 'a', request, index: 0, resumeTokenIds, reportsLogprobs: true, tenant };
    const handle = engine.add(spec, sink);
    cancel = () => {
      handle.cancel();
    };
  });
  return { done, cancel };
}

const random = new Random(11);
const words = (count: number): number[] =>
  Array.from({ length: count }, () => 300 + random.below(tokenizer.vocabSize - 300));

for (const [tp, rounds] of [
  [1, 8],
  [2, 4],
] as const) {
  void test(`with --exact at tp ${tp} a warm answer is the cold one bit for bit, whatever came between`, async () => {
    const system = words(40);
    const prompts = Array.from({ length: 6 }, (_, i) => [
      ...system.slice(0, 40 - i),
      ...words(15 + i),
    ]);
    const cold: Answer[] = [];
    for (const prompt of prompts) {
      cold.push(await withEngine(tp, true, (engine) => answer(engine, requestOf(prompt, 12)).done));
    }
    await withEngine(tp, true, async (engine) => {
      let cached = 0;
      for (let round = 0; round < rounds; round += 1) {
        const chosen = [random.below(6), random.below(6), random.below(6)];
        const others = [
          // Goes on from an answer: its positions were decoded, and may not be shared.
          answer(engine, requestOf([...prompts[0]!, ...cold[0]!.tokenIds, ...words(9)], 3, round)),
        ];
        const warm = chosen.map((i) => answer(engine, requestOf(prompts[i]!, 12)));
        // Somebody leaves in the middle of his prompt or answer.
        if (round % 3 === 0) others[0]!.cancel();
        for (const [at, { done }] of warm.entries()) {
          const { cachedTokens, ...told } = await done;
          const { cachedTokens: none, ...expected } = cold[chosen[at]!]!;
          assert.equal(none, 0);
          assert.deepEqual(told, expected, `round ${round}, prompt ${chosen[at]!}`);
          cached += cachedTokens;
        }
        if (round % 3 !== 0) await others[0]!.done;
      }
      assert.ok(cached > rounds * 3 * 20, `${cached} tokens were cached`);
    });
  });
}

void test('an answer that is taken over begins where its prompt is known', async () => {
  const prompt = words(50);
  await withEngine(2, true, async (engine) => {
    const whole = await answer(engine, requestOf(prompt, 12)).done;
    const resumeTokenIds = whole.tokenIds.slice(0, 5);
    const rest = await answer(engine, requestOf(prompt, 12), { resumeTokenIds }).done;
    assert.deepEqual(rest.tokenIds, whole.tokenIds.slice(5));
    assert.deepEqual(rest.logprobs, whole.logprobs.slice(5));
    assert.equal(rest.cachedTokens, 48);
  });
});

void test('a conversation goes on from its answer; tenants see nothing of each other', async () => {
  const prompt = words(50);
  await withEngine(2, false, async (engine) => {
    const first = await answer(engine, requestOf(prompt, 20)).done;
    const next = [...prompt, ...first.tokenIds, ...words(10)];
    const stranger = await answer(engine, requestOf(next, 3), { tenant: 'two' }).done;
    assert.equal(stranger.cachedTokens, 0);
    const own = await answer(engine, requestOf(next, 3)).done;
    // The last token was never fed.
    assert.equal(own.cachedTokens, 69);
    assert.deepEqual(own.tokenIds, stranger.tokenIds);
  });
});

void test('sequences that begin alike compute their beginning once', async () => {
  const system = words(120);
  await withEngine(1, false, async (engine) => {
    const answers = Array.from({ length: 4 }, () =>
      answer(engine, requestOf([...system, ...words(6)], 4)),
    );
    const cached = (await Promise.all(answers.map(({ done }) => done))).map(
      ({ cachedTokens }) => cachedTokens,
    );
    // Waiting for the last few would cost more than computing them.
    assert.equal(cached[0], 0);
    for (const count of cached.slice(1))
      assert.ok(count > 120 - 32 && count <= 120, String(cached));
  });
});
