/**
 * Two real engines of one queue: an urgent job does not wait for those that are not, the job that makes room goes on
 * where it stood on either engine, and kill -9 of one leaves nothing behind.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import { Journal, newJobId } from '../coordinator/journal.js';
import { MAX_PREEMPTIONS } from '../coordinator/order.js';
import { queueName } from '../coordinator/queue-connection.js';
import { JobQueue } from '../coordinator/queue.js';
import { jobSizeOf } from '../coordinator/queue-order.js';
import type { JobTerms, Request } from '../coordinator/request.js';
import { startEngine, tinyTokenizer } from './real-engine.js';
import { startRedis } from './redis-server.js';

const TIMEOUT_MS = 120_000;
/** With the engines' slow steps long enough for a job to be held as long as one must be before it makes room. */
const LONG_TOKENS = 240;
const SLOW_STEPS = { tp: 2, args: ['--transport', 'grpc'] };
const BATCH = 1000;

const redis = await startRedis();
after(() => redis.stop());
const engines = await Promise.all(
  [1, 2].map(() => startEngine(redis.url, { ...SLOW_STEPS, maxBatchSize: 2 })),
);
after(() => Promise.all(engines.map((engine) => engine.stop())));
const journal = await Journal.open(redis.url, 'patient');
const { model } = engines[0]!;
const queue = new JobQueue(redis.url, model);
const raw = new Redis(redis.url);
after(async () => {
  raw.disconnect();
  journal.close();
  await queue.close();
});
const tokenizer = tinyTokenizer();

const requestOf = (seed: number, maxTokens: number): Request => ({
  version: 1,
  model,
  promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
  sampling: { temperature: 0.8, topP: 1, topK: 0, seed },
  maxTokens,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
});

async function submit(request: Request, terms: Partial<JobTerms> = {}): Promise<string> {
  const id = newJobId();
  const all = { priority: 100, deadlineMs: null, ...terms };
  await journal.create(id, request, all);
  await queue.submit(id, all, jobSizeOf(request));
  return id;
}

/** The tokens of a completed job. */
async function tokensOf(id: string): Promise<number[]> {
  const tokenIds: number[] = [];
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
    if (entry.kind === 'end') assert.equal(entry.ending.status, 'completed');
    else tokenIds.push(...entry.tokenIds);
  }
  return tokenIds;
}

const firstToken = async (id: string): Promise<void> => {
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
    if (entry.kind === 'tokens') return;
  }
};

const recordOf = async (id: string): Promise<{ preemptions: number } | null> => {
  const keys = ['waiting', 'running'].map((part) => `caravan:order:${queueName(model)}:${part}`);
  for (const key of keys) {
    const text = await raw.hget(key, id);
    if (text !== null) return JSON.parse(text) as { preemptions: number };
  }
  return null;
};

void test('urgent jobs take the slots of batch ones, which resume to the same tokens', async () => {
  const seeds = Array.from({ length: 5 }, (_, i) => i);
  const undisturbed = await Promise.all(
    seeds.map(async (seed) => tokensOf(await submit(requestOf(seed, LONG_TOKENS)))),
  );

  const batch: string[] = [];
  for (const seed of seeds) {
    batch.push(await submit(requestOf(seed, LONG_TOKENS), { priority: BATCH }));
  }
  await Promise.all(batch.slice(0, 4).map(firstToken));
  let moves = 0;
  let isOver = false;
  const done = Promise.all(batch.map(tokensOf)).finally(() => (isOver = true));
  const hasEnded = (): boolean => isOver;
  for (let seed = 100; !hasEnded(); seed += 1) {
    const urgent = await submit(requestOf(seed, 12), { priority: 1 });
    assert.equal((await tokensOf(urgent)).length, 12);
    const records = await Promise.all(batch.map(recordOf));
    const preemptions = records.map((record) => record?.preemptions ?? 0);
    moves = Math.max(moves, ...preemptions);
    if (moves > 0 && seed > 103) break;
  }
  assert.ok(moves > 0, 'no job made room');
  assert.ok(moves <= MAX_PREEMPTIONS, `a job made room ${moves} times`);

  // One engine dies with its jobs; the other one ends them all.
  await engines[0]!.kill();
  assert.deepEqual(await done, undisturbed);
  await engines[0]!.restart();
  const after = await submit(requestOf(1, LONG_TOKENS));
  assert.deepEqual(await tokensOf(after), undisturbed[1]);
  const giveUpMs = performance.now() + TIMEOUT_MS;
  for (;;) {
    const { active, waiting } = await queue.counts();
    const left = await raw.exists(
      ...['waiting', 'running', 'lanes', 'ages', 'loads', 'tenants', 'promoted'].map(
        (part) => `caravan:order:${queueName(model)}:${part}`,
      ),
    );
    if (active + waiting + left === 0) break;
    assert.ok(performance.now() < giveUpMs, `${active} run, ${waiting} wait, ${left} keys stay`);
  }
});
