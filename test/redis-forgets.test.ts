/**
 * Redis loses its last second, or refuses a write: an engine neither writes over another, nor keeps a job from the
 * others.
 */
import assert from 'node:assert/strict';
import { once, EventEmitter } from 'node:events';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import type { Engine, SequenceSink, SequenceSpec } from '../coordinator/engine.js';
import { JobRunner } from '../coordinator/job-runner.js';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Request } from '../coordinator/request.js';
import { startRedis } from './redis-server.js';

const terms = { priority: 100, deadlineMs: null };
const quiet = { info: () => undefined, warn: () => undefined };
const ignore = (): void => undefined;

const redis = await startRedis();
after(() => redis.stop());
const raw = new Redis(redis.url);
raw.on('error', ignore);
after(() => {
  raw.disconnect();
});
const journal = await Journal.open(redis.url, 'patient');
after(() => {
  journal.close();
});

async function newJob(model: string): Promise<string> {
  const id = newJobId();
  const request: Request = {
    version: 1,
    model,
    promptTokenIds: [1],
    sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    maxTokens: 10,
    stop: [],
    ignoreEos: false,
    isTextStart: true,
  };
  await journal.create(id, request, terms);
  return id;
}

async function queuedJob(model: string): Promise<string> {
  const id = await newJob(model);
  const queue = new JobQueue(redis.url, model);
  await queue.submit(id, terms);
  await queue.close();
  return id;
}

/** Holds what it is given; emits `added` with the job's id. */
class HoldingEngine extends EventEmitter implements Engine {
  readonly hasEnded = false;
  readonly freeSlotCount = 4;
  readonly sinks = new Map<string, SequenceSink>();

  add({ id }: SequenceSpec, sink: SequenceSink) {
    this.sinks.set(id, sink);
    this.emit('added', id);
    return { cancel: () => this.sinks.delete(id) };
  }

  run(): Promise<void> {
    return Promise.resolve();
  }
}

void test('no two takes have one fence, even when Redis forgot the first', async () => {
  const id = await newJob('fence');
  const first = await journal.take(id, 'a');
  assert.ok(first.kind === 'taken');
  // As after a kill -9 within the second: the take never reached the disk.
  await raw.hset(`caravan:{${id}}:job`, 'fence', '0', 'status', 'waiting');
  const second = await journal.take(id, 'b');
  assert.ok(second.kind === 'taken');
  assert.equal((await journal.append(first, 0, [66], ['no'])).kind, 'stale');
  assert.equal((await journal.append(second, 0, [10], ['yes'])).kind, 'written');
  assert.equal((await journal.end(first, 1, { status: 'cancelled' }, '')).kind, 'stale');
});

void test('a job whose take Redis refused goes back, and is taken later', async () => {
  const model = 'refused';
  const id = await queuedJob(model);
  const engine = new HoldingEngine();
  const taker = new JobTaker(redis.url, model, ignore);
  const stopped = new AbortController();
  const take = journal.take.bind(journal);
  let refusals = 0;
  const refusing = Object.assign(Object.create(journal) as Journal, {
    onCancel: journal.onCancel.bind(journal),
    release: journal.release.bind(journal),
    take: (...args: Parameters<Journal['take']>) => {
      if (refusals === 2) return take(...args);
      refusals += 1;
      return Promise.reject(new Error('OOM command not allowed'));
    },
  });
  const runner = new JobRunner(engine, refusing, taker, 'e', quiet);
  const added = once(engine, 'added', { signal: AbortSignal.timeout(20_000) });
  const running = runner.run(stopped.signal, stopped.signal);
  assert.deepEqual(await added, [id]);
  assert.equal(refusals, 2);
  stopped.abort();
  await running;
  await taker.close();
});
