/**
 * A cancellation takes effect within two steps, whoever asks for it and wherever the job stands. Real ranks, queue and
 * journal; the steps of the engine are counted.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { RankEngine } from '../coordinator/engine.js';
import { JobRunner } from '../coordinator/job-runner.js';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Request } from '../coordinator/request.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { RankPool } from './rank-pool.js';
import { startRedis } from './redis-server.js';

const LIMITS = { maxSeqLen: 512, maxBatchSize: 4, maxStepRows: 64 };
const VOCABULARY = 1024;
const TIMEOUT_MS = 60_000;
const MOST_STEPS = 2;
const ROUNDS = process.env['CARAVAN_LONG'] === '1' ? 10 : 2;
const MODEL = 'cancelled';
const quiet = { info: () => undefined, warn: () => undefined };

const redis = await startRedis();
after(() => redis.stop());
const pool = new RankPool();
after(() => pool.stop());
const journal = await Journal.open(redis.url, 'patient');
/** Whoever cancels has connections of his own. */
const stranger = await Journal.open(redis.url, 'impatient');
after(() => {
  journal.close();
  stranger.close();
});

let submitted = 0;

/** No two begin alike: nothing is to be taken over from a job before. */
async function submit(
  queue: JobQueue,
  promptTokens: number,
  more: Partial<Request> = {},
): Promise<string> {
  const id = newJobId();
  const first = 300 + submitted++;
  const request: Request = {
    version: 1,
    model: MODEL,
    promptTokenIds: Array.from({ length: promptTokens }, (_, i) => first + (i % 50)),
    sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    maxTokens: 500,
    stop: [],
    ignoreEos: true,
    isTextStart: false,
    ...more,
  };
  const terms = { priority: 100, deadlineMs: null };
  await journal.create(id, request, terms);
  await queue.submit(id, terms);
  return id;
}

async function endingOf(id: string): Promise<string> {
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
    if (entry.kind === 'end') return entry.ending.status;
  }
  return 'none';
}

void test('a cancellation takes effect within two steps, wherever the job stands', async (context) => {
  await pool.withGroup(embeddedModelPath(), { tp: 2, ...LIMITS }, async ({ ranks }) => {
    let steps = 0;
    let onStep: (() => void) | null = null;
    const engine = new RankEngine(ranks, fakeTokenizer(VOCABULARY), {
      ...LIMITS,
      maxChunkTokens: 8,
      isExact: true,
      onStep: () => {
        steps += 1;
        onStep?.();
      },
    });
    const afterSteps = (count: number): Promise<void> =>
      new Promise((resolve) => {
        const goal = steps + count;
        onStep = () => {
          if (steps >= goal) resolve();
        };
      });
    const queue = new JobQueue(redis.url, MODEL);
    const taker = new JobTaker(redis.url, MODEL, () => undefined);
    const [ended, over] = [new AbortController(), new AbortController()];
    const runner = new JobRunner(engine, journal, taker, 'e', quiet);

    let running: Promise<void> | null = null;
    let serving: Promise<void> | null = null;
    try {
      // Nobody has it: it ends at once, and never runs.
      const queued = await submit(queue, 4);
      assert.equal(await stranger.requestCancel(queued), 'cancelled');
      assert.equal((await journal.job(queued))?.status, 'cancelled');

      running = engine.run(ended.signal);
      serving = runner.run(over.signal, over.signal);
      const states: Readonly<Record<string, readonly [number, number, Partial<Request>]>> = {
        // The prompt takes 60 steps and more.
        'in its prompt': [490, 3, { maxTokens: 10 }],
        'in its answer': [4, 20, {}],
        'in several answers, some of which wait for a slot': [4, 20, { n: 7 }],
      };
      for (const [name, [promptTokens, begun, more]] of Object.entries(states)) {
        for (let round = 0; round < ROUNDS; round += 1) {
          const hasBegun = afterSteps(begun + round);
          const id = await submit(queue, promptTokens, more);
          await hasBegun;
          assert.equal(await stranger.requestCancel(id), 'requested');
          const before = steps;
          assert.equal(await endingOf(id), 'cancelled');
          while (engine.sequenceCount > 0) await turn();
          const late = steps - before;
          context.diagnostic(`${name}: ${late} steps`);
          assert.ok(late <= MOST_STEPS, `${name}: ${late} steps after the cancellation`);
          const tokens = (await journal.entries(id, 0, 0)).filter((each) => each.kind === 'tokens');
          assert.equal(tokens.length === 0, name === 'in its prompt');
        }
      }
      // Between two takes it ends at once, with the tokens that it has.
      const given = await submit(queue, 4);
      await afterSteps(20);
      over.abort();
      await serving;
      const job = await journal.job(given);
      assert.equal(job?.status, 'waiting');
      assert.equal(await stranger.requestCancel(given), 'cancelled');
      assert.equal(await endingOf(given), 'cancelled');
      assert.ok((await journal.entries(given, 0, 0)).length > 1);
    } finally {
      over.abort();
      await serving;
      ended.abort();
      await running;
      await taker.close();
      await queue.close();
    }
  });
});
