/**
 * Redis forgets or is gone: engines restore what they know, nothing waits without an end, and no two engines write
 * one journal.
 */
import assert from 'node:assert/strict';
import { once, EventEmitter } from 'node:events';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import type { Engine, SequenceSink, SequenceSpec } from '../coordinator/engine.js';
import { JobRunner } from '../coordinator/job-runner.js';
import { JournalWriter } from '../coordinator/journal-writer.js';
import { Journal, newJobId, type JournalEntry, type Take } from '../coordinator/journal.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Ending, Request } from '../coordinator/request.js';
import { startRedis } from './redis-server.js';

const terms = { priority: 100, deadlineMs: null };
const ending: Ending = {
  status: 'completed',
  finishReason: 'length',
  usage: { promptTokens: 1, completionTokens: 4 },
};
const quiet = { info: () => undefined, warn: () => undefined };
const ignore = (): void => undefined;
const unexpected = (): never => assert.fail('it was refused');

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

const requestOf = (model: string): Request => ({
  version: 1,
  model,
  promptTokenIds: [1],
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
  maxTokens: 4,
  stop: [],
  ignoreEos: false,
  isTextStart: true,
});

async function takenJob(): Promise<Take> {
  const id = newJobId();
  await journal.create(id, requestOf('lost'), terms);
  const take = await journal.take(id, 'a');
  assert.ok(take.kind === 'taken');
  return take;
}

/** As a kill -9 within the job's first second leaves it. */
const forget = (id: string): Promise<number> =>
  raw.del(`caravan:{${id}}:job`, `caravan:{${id}}:journal:0`);

async function readAll(id: string): Promise<{ tokenIds: number[]; end: JournalEntry | undefined }> {
  const tokenIds: number[] = [];
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(30_000))) {
    if (entry.kind === 'end') return { tokenIds, end: entry };
    tokenIds.push(...entry.tokenIds);
  }
  return { tokenIds, end: undefined };
}

void test('an engine writes down anew a job that Redis forgot, and its reader misses nothing', async () => {
  const take = await takenJob();
  const reading = readAll(take.id);
  const writer = new JournalWriter(journal, take, unexpected, unexpected);
  writer.sequences[0]!.token(10, 'a');
  writer.sequences[0]!.token(11, 'b');
  while ((await journal.entries(take.id, 0, 0)).at(-1)?.endOffset !== 2);
  await forget(take.id);
  writer.sequences[0]!.token(12, 'c');
  while ((await journal.entries(take.id, 0, 0)).at(-1)?.endOffset !== 3);
  await forget(take.id);
  assert.equal(await writer.end(ending, '.'), true);
  assert.deepEqual((await reading).tokenIds, [10, 11, 12]);
  assert.deepEqual((await readAll(take.id)).tokenIds, [10, 11, 12]);
  const job = await journal.job(take.id);
  assert.equal(job?.status, 'completed');
  assert.deepEqual(job.request, take.request);
});

void test('a reader of a job that nobody restores is told so', async () => {
  const { id } = await takenJob();
  const reading = readAll(id);
  await forget(id);
  await assert.rejects(reading, { code: 'redis_unavailable', message: /Redis lost job/ });
});

void test('an engine whose take Redis lost does not write behind the tokens of another', async () => {
  const earlier = await takenJob();
  const later = await journal.take(earlier.id, 'b');
  assert.ok(later.kind === 'taken');
  await raw.hset(`caravan:{${earlier.id}}:job`, 'fence', String(earlier.fence));
  assert.equal((await journal.append(earlier, 0, [10], ['a'])).kind, 'written');
  assert.equal((await journal.append(later, 0, [20, 21], ['x', 'y'])).kind, 'stale');
  assert.equal((await journal.append(earlier, 1, [11], ['b'])).kind, 'stale');
  const entries = await journal.entries(earlier.id, 0, 0);
  assert.deepEqual(
    entries.map(({ endOffset }) => endOffset),
    [1],
  );
});

/** Holds what it is given; emits `added` with the job's id. */
class HoldingEngine extends EventEmitter implements Engine {
  readonly freeSlotCount = 4;
  readonly hasEnded = false;
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

void test('an engine stops in time while its endings wait for a dead Redis, which loses no job', async () => {
  const model = 'stopped';
  const ids = [newJobId(), newJobId()];
  const queue = new JobQueue(redis.url, model);
  for (const id of ids) {
    await journal.create(id, requestOf(model), terms);
    await queue.submit(id, terms);
  }
  await queue.close();
  const [drained, stopped] = [new AbortController(), new AbortController()];
  const own = await Journal.open(redis.url, 'patient');
  const engine = new HoldingEngine();
  const taker = new JobTaker(redis.url, model, ignore);
  const runner = new JobRunner(engine, own, taker, 'e', quiet);
  const running = runner.run(drained.signal, stopped.signal);
  while (engine.sinks.size < 2) {
    await once(engine, 'added', { signal: AbortSignal.timeout(20_000) });
  }
  // Both takes are on the disk before the kill: this test is about what waits, not about what is lost.
  await raw.config('SET', 'appendfsync', 'always');
  for (const id of ids) engine.sinks.get(id)!.token(5, 'five');
  for (const id of ids) while ((await journal.entries(id, 0, 0)).length === 0);
  await redis.kill();
  engine.sinks.get(ids[0]!)!.end('length', '.');
  drained.abort();
  const startMs = performance.now();
  stopped.abort();
  await running;
  await taker.close();
  own.close();
  const tookMs = performance.now() - startMs;
  assert.ok(tookMs < 8_000, `it took ${tookMs.toFixed(0)} ms`);

  await redis.restart();
  const next = new HoldingEngine();
  const over = new AbortController();
  const nextTaker = new JobTaker(redis.url, model, ignore);
  const nextRunner = new JobRunner(next, journal, nextTaker, 'f', quiet);
  const again = nextRunner.run(over.signal, over.signal);
  while (next.sinks.size < 2) {
    await once(next, 'added', { signal: AbortSignal.timeout(30_000) });
  }
  for (const id of ids) {
    const sink = next.sinks.get(id)!;
    sink.token(6, 'six');
    sink.end('length', '.');
    assert.deepEqual((await readAll(id)).tokenIds, [5, 6]);
  }
  over.abort();
  await again;
  await nextTaker.close();
});

void test('an ending that Redis forgot is written again, with what came before it', async () => {
  const model = 'forgotten';
  const id = newJobId();
  await journal.create(id, requestOf(model), terms);
  const queue = new JobQueue(redis.url, model);
  await queue.submit(id, terms);
  const over = new AbortController();
  const engine = new HoldingEngine();
  const taker = new JobTaker(redis.url, model, ignore);
  const runner = new JobRunner(engine, journal, taker, 'e', quiet);
  const running = runner.run(over.signal, over.signal);
  await once(engine, 'added', { signal: AbortSignal.timeout(20_000) });
  const sink = engine.sinks.get(id)!;
  for (const token of [5, 6, 7]) sink.token(token, `${token}`);
  sink.end('length', '.');
  const { tokenIds, end } = await readAll(id);
  assert.deepEqual(tokenIds, [5, 6, 7]);
  while (runner.runningCount > 0) await new Promise((resolve) => setImmediate(resolve));
  // As when the last second is lost: the end, and a token before it.
  const stream = `caravan:{${id}}:journal:0`;
  await raw.del(stream);
  await raw.xadd(stream, '1-0', 'tokens', '5', 'texts', '["5"]');
  await raw.hdel(`caravan:{${id}}:job`, 'ending');
  await raw.hset(`caravan:{${id}}:job`, 'status', 'active');
  await redis.kill('SIGTERM');
  await redis.restart();
  const again = await readAll(id);
  assert.deepEqual(again.tokenIds, [5, 6, 7]);
  assert.deepEqual(again.end, end);
  assert.equal((await journal.job(id))?.status, 'completed');
  over.abort();
  await running;
  await taker.close();
  await queue.close();
});

void test('an engine that lost its job renews its lock no more', async () => {
  const model = 'dropped';
  const id = newJobId();
  await journal.create(id, requestOf(model), terms);
  const queue = new JobQueue(redis.url, model);
  await queue.submit(id, terms);
  const over = new AbortController();
  const engine = new HoldingEngine();
  const taker = new JobTaker(redis.url, model, ignore, { agedAfterMs: Infinity, lockMs: 2_000 });
  const runner = new JobRunner(engine, journal, taker, 'e', quiet);
  const running = runner.run(over.signal, over.signal);
  await once(engine, 'added', { signal: AbortSignal.timeout(20_000) });
  const first = engine.sinks.get(id)!;
  const other = await journal.take(id, 'other');
  assert.ok(other.kind === 'taken');
  // The other one dies: the job has to come back although this engine still held BullMQ's lock.
  const again = once(engine, 'added', { signal: AbortSignal.timeout(20_000) });
  first.token(5, 'five');
  assert.deepEqual(await again, [id]);
  assert.notEqual(engine.sinks.get(id), first);
  engine.sinks.get(id)!.end('length', '');
  assert.equal((await readAll(id)).end?.kind, 'end');
  over.abort();
  await running;
  await taker.close();
  await queue.close();
});
