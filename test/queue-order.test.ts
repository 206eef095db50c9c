/** The order beside BullMQ: what is taken next when engines race, die, or when one of the two has lost a job. */
import assert from 'node:assert/strict';
import { after, test, type TestContext } from 'node:test';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { Journal, newJobId } from '../coordinator/journal.js';
import { queueName } from '../coordinator/queue-connection.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { TakenJob } from '../coordinator/taken-job.js';
import { QueueOrder } from '../coordinator/queue-order.js';
import type { JobTerms, Request } from '../coordinator/request.js';
import { startRedis } from './redis-server.js';

const redis = await startRedis();
after(() => redis.stop());
const raw = new Redis(redis.url);
after(() => {
  raw.disconnect();
});
const TIMEOUT_MS = 30_000;
const ignore = (): void => undefined;
const size = { tokens: 100, outputTokens: 50 };

function open(context: TestContext, model: string, agedAfterMs = Infinity) {
  const queue = new JobQueue(redis.url, model);
  const bull = new Queue(queueName(model), { connection: { port: redis.port } });
  context.after(async () => {
    await bull.close();
    await queue.close();
  });
  const startTaker = (): JobTaker => {
    const taker = new JobTaker(redis.url, model, ignore, { agedAfterMs });
    context.after(() => taker.close());
    return taker;
  };
  const add = (id: string, terms: Partial<JobTerms> = {}): Promise<void> =>
    queue.submit(id, { priority: 100, deadlineMs: null, ...terms }, size);
  return { queue, bull, startTaker, add, order: new QueueOrder(raw, queueName(model)) };
}

async function taken(taker: JobTaker): Promise<TakenJob> {
  const job = await taker.take(AbortSignal.timeout(TIMEOUT_MS));
  assert.ok(job, 'no job came');
  return job;
}

async function takeAll(taker: JobTaker, count: number): Promise<string[]> {
  const ids: string[] = [];
  for (let i = 0; i < count; i += 1) {
    const job = await taken(taker);
    ids.push(job.id);
    await job.finish(false);
  }
  return ids;
}

const sumOf = <K extends string>(all: readonly Readonly<Record<K, number>>[], key: K): number =>
  all.reduce((sum, each) => sum + each[key], 0);

/** Nothing is left of a model's jobs but what tenants were served. */
async function leavesNothing(model: string): Promise<void> {
  const keys = await raw.keys(`caravan:order:${queueName(model)}:*`);
  const parts = keys.map((key) => key.split(':').at(-1)).sort();
  assert.deepEqual(parts, ['served', 'state']);
  const state = await raw.hgetall(`caravan:order:${queueName(model)}:state`);
  assert.equal(state['jobs'], undefined);
  assert.equal(state['tokens'], undefined);
}

void test('class, then deadline, then the turn of the tenants decide', async (context) => {
  const { startTaker, add } = open(context, 'order');
  const soonMs = Date.now() + 3_600_000;
  await add('batch', { priority: 1000 });
  await add('a1', { tenant: 'a' });
  await add('a2', { tenant: 'a' });
  await add('a3', { tenant: 'a' });
  await add('b1', { tenant: 'b', weight: 2 });
  await add('b2', { tenant: 'b', weight: 2 });
  await add('a, later deadline', { tenant: 'a', deadlineMs: soonMs + 1000 });
  await add('a, deadline', { tenant: 'a', deadlineMs: soonMs });
  await add('urgent', { priority: 1 });
  const order = await takeAll(startTaker(), 9);
  assert.deepEqual(order, [
    ...['urgent', 'a, deadline', 'b1', 'b2', 'a, later deadline', 'a1', 'a2', 'a3', 'batch'],
  ]);
  await leavesNothing('order');
});

void test('engines that race swap at most what both have chosen', async (context) => {
  const { startTaker, add } = open(context, 'race');
  const priorities = [1, 10, 100, 1000];
  const waiting = new Map<string, number>();
  for (let i = 0; i < 60; i += 1) {
    const priority = priorities[(i * 7) % 4]!;
    waiting.set(`job-${i}`, priority);
    await add(`job-${i}`, { priority });
  }
  const takers = [startTaker(), startTaker(), startTaker()];
  const all = new AbortController();
  const over = AbortSignal.any([all.signal, AbortSignal.timeout(TIMEOUT_MS)]);
  await Promise.all(
    takers.map(async (taker) => {
      for (;;) {
        const job = await taker.take(over);
        if (job === null) return;
        const priority = waiting.get(job.id);
        assert.ok(priority !== undefined, `${job.id} was taken twice`);
        waiting.delete(job.id);
        // The others may have chosen one each that they do not have yet.
        const passedBy = [...waiting.values()].filter((other) => other < priority).length;
        assert.ok(passedBy < takers.length, `${passedBy} more urgent ones wait`);
        await job.finish(false);
        if (waiting.size === 0) all.abort();
      }
    }),
  );
  assert.equal(waiting.size, 0);
  await leavesNothing('race');
});

void test('a job that an engine chose and did not live to fetch is taken by another', async (context) => {
  const { startTaker, add } = open(context, 'chosen');
  await add('chosen', { priority: 1 });
  await add('other');
  const dead = startTaker();
  const choice = await dead.choose();
  assert.equal(choice?.job.id, 'chosen');
  assert.ok(await dead.claim(choice));
  await dead.close();
  assert.deepEqual((await takeAll(startTaker(), 2)).sort(), ['chosen', 'other']);
  await leavesNothing('chosen');
});

void test('what BullMQ would hand out unchosen waits for its turn', async (context) => {
  const { startTaker, add, bull } = open(context, 'strays');
  await add('returned', { priority: 1000 });
  await add('urgent', { priority: 1 });
  // Where BullMQ puts the job of an engine that died.
  await raw.zrem(bull.toKey('prioritized'), 'returned');
  await raw.rpush(bull.toKey('wait'), 'returned');
  await bull.add('generate', {}, { jobId: 'late', priority: 1, delay: 1 });
  await bull.add('generate', {}, { jobId: 'foreign' });
  const first = await takeAll(startTaker(), 4);
  assert.deepEqual([first[0], first[3]], ['urgent', 'returned']);
  await leavesNothing('strays');
});

const requestOf = (model: string): Request => ({
  version: 1,
  model,
  promptTokenIds: [1, 2, 3],
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 1 },
  maxTokens: 4,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
});

void test('an engine that starts brings the order and BullMQ together', async (context) => {
  const { startTaker, add, bull, order, queue } = open(context, 'apart');
  const journal = await Journal.open(redis.url, 'patient');
  context.after(() => {
    journal.close();
  });
  const request = requestOf('apart');
  // In BullMQ alone: the journal knows its terms.
  const ours = newJobId();
  await journal.create(ours, request, { priority: 5, deadlineMs: null, tenant: 'acme' });
  await bull.add('generate', {}, { jobId: ours, priority: 5 });
  // In the order alone: somebody took it out of BullMQ, long ago or just now.
  const longAgoMs = Date.now() - 60_000;
  await order.reserve('lost', { priority: 1, deadlineMs: null }, size, longAgoMs);
  await add('removed', { priority: 1 });
  await (await bull.getJob('removed'))!.remove();
  await add('both', { priority: 100 });
  const taker = startTaker();
  const job = await taken(taker);
  assert.equal(job.id, ours);
  assert.equal(job.held.tenant, 'acme');
  assert.equal(job.held.tokens, 7);
  await job.finish(false);
  assert.deepEqual(await takeAll(taker, 1), ['both']);
  assert.equal((await queue.counts()).waiting, 0);
  await leavesNothing('apart');
});

void test('what a death or a forgetful Redis leaves between the two is mended while an engine runs', async (context) => {
  const { startTaker, add, bull, order } = open(context, 'mended');
  const journal = await Journal.open(redis.url, 'patient');
  context.after(() => {
    journal.close();
  });
  const request = requestOf('mended');
  const terms = { priority: 100, deadlineMs: null };
  const addWritten = async (): Promise<string> => {
    const id = newJobId();
    await journal.create(id, request, terms);
    await add(id);
    return id;
  };
  const taker = startTaker();
  assert.equal(await taker.take(AbortSignal.timeout(600)), null);

  // BullMQ has lost one, and its record too.
  const removed = await addWritten();
  await (await bull.getJob(removed))!.remove();
  // Another stands nowhere, a third among those that failed: adding them anew would do nothing.
  const nowhere = await addWritten();
  await raw.zrem(bull.toKey('prioritized'), nowhere);
  const failed = await addWritten();
  await raw.zrem(bull.toKey('prioritized'), failed);
  await raw.zadd(bull.toKey('failed'), Date.now(), failed);
  // Redis lost a job that an engine runs, which wrote it down again and died.
  const restored = newJobId();
  await journal.create(restored, request, terms);
  const held = { id: restored, tenant: 'a', weight: 1, priority: 100, deadlineMs: null };
  const sizes = { ...size, queuedMs: 0, latestStartMs: null, preemptions: 0, sinceMs: 0 };
  await order.hold({ ...held, ...sizes }, 'dead');
  // As many jobs on both sides as before: BullMQ has some that the order has not.
  const strangers = ['x', 'y', 'z'];
  for (const jobId of strangers) await bull.add('generate', {}, { jobId, priority: 1000 });

  const ids = await takeAll(taker, 7);
  assert.deepEqual(ids.toSorted(), [removed, nowhere, failed, restored, ...strangers].toSorted());
  // An engine was so slow to say that it has the job that another was about to choose it.
  const slow = await addWritten();
  const choice = await taker.choose();
  assert.ok(await taker.claim(choice!));
  await raw.zrem(bull.toKey('prioritized'), slow);
  await raw.lpush(bull.toKey('active'), slow);
  assert.deepEqual(await order.mend([slow], Date.now(), 0), []);
  assert.equal((await order.confirm(slow, 'slow', Date.now()))?.id, slow);
  assert.equal((await order.confirm(slow, 'slow', Date.now()))?.id, slow);
  assert.equal(await order.confirm(slow, 'other', Date.now()), null);
  await raw.lrem(bull.toKey('active'), 0, slow);
  await order.forget(slow);
  await leavesNothing('mended');
});

void test('a paused queue hands out nothing until it goes on', async (context) => {
  const { startTaker, add, bull } = open(context, 'paused');
  await bull.pause();
  await add('job');
  const taker = startTaker();
  assert.equal(await taker.take(AbortSignal.timeout(1_500)), null);
  await bull.resume();
  assert.deepEqual(await takeAll(taker, 1), ['job']);
});

void test('an old job gets its turn among urgent ones', async (context) => {
  const { startTaker, add, order, bull } = open(context, 'aged', 60_000);
  const terms = { priority: 1000, deadlineMs: null };
  await order.reserve('old', terms, size, Date.now() - 120_000);
  await bull.add('generate', {}, { jobId: 'old', priority: 1000 });
  await order.enter('old');
  for (let i = 0; i < 30; i += 1) await add(`urgent-${i}`, { priority: 1 });
  const ids = await takeAll(startTaker(), 31);
  assert.equal(ids.indexOf('old'), 19);
});

void test('a tenant pays for what its jobs used, not for what they might have', async (context) => {
  const { startTaker, add } = open(context, 'paid');
  for (let i = 0; i < 4; i += 1) {
    await add(`short-${i}`, { tenant: 'short' });
    await add(`long-${i}`, { tenant: 'long' });
  }
  const taker = startTaker();
  const order: string[] = [];
  for (let i = 0; i < 6; i += 1) {
    const job = await taken(taker);
    order.push(job.id.split('-')[0]!);
    await job.finish(false, job.held.tenant === 'short' ? 75 : 0);
  }
  assert.equal(order.filter((tenant) => tenant === 'short').length, 4);
});

void test('what is promised and waits is known by when it must start, and gone when it is taken', async (context) => {
  const { startTaker, queue } = open(context, 'promised');
  const nowMs = Date.now();
  const deadlineMs = nowMs + 40 * 86_400_000;
  // From a minute ago to ten days: every kind of span.
  const startsIn = [-60, 0.3, 5, 200, 280, 290, 2_000, 2_100, 30_000, 864_000];
  let [tokens, outputTokens] = [0, 0];
  for (const [i, seconds] of startsIn.entries()) {
    const latestStartMs = nowMs + 1000 * seconds;
    const own = { tokens: 100 + 10 ** (i % 5), outputTokens: 50 + i };
    await queue.submit(`p${i}`, { priority: 100, deadlineMs, latestStartMs }, own);
    await queue.submit(`other${i}`, { priority: 1, deadlineMs }, own);
    tokens += own.tokens;
    outputTokens += own.outputTokens;
    const { promised } = await queue.stand();
    assert.equal(sumOf(promised, 'tokens'), tokens, `${seconds} s`);
    assert.equal(sumOf(promised, 'outputTokens'), outputTokens, `${seconds} s`);
    const isThere = promised.some(
      ({ firstStartMs, lastStartMs }) =>
        firstStartMs <= latestStartMs && latestStartMs < lastStartMs,
    );
    assert.ok(isThere, `${seconds} s`);
  }
  for (const [i, each] of (await queue.stand()).promised.entries()) {
    const before = (await queue.stand()).promised[i - 1];
    assert.ok(before === undefined || before.lastStartMs <= each.firstStartMs, 'in order');
  }
  const taker = startTaker();
  const first = await taken(taker);
  assert.equal(first.id, 'p0', 'it must start now');
  const { promised } = await queue.stand();
  assert.equal(promised.filter(({ sinceMs }) => sinceMs !== null).length, 1, 'it runs');
  assert.equal(sumOf(promised, 'tokens'), tokens);
  await first.giveBack({ tokens: 70, outputTokens: 7 }, true);
  assert.equal(sumOf((await queue.stand()).promised, 'tokens'), tokens - 101 + 70);
  await takeAll(taker, 2 * startsIn.length);
  await leavesNothing('promised');
});

void test('while promises need all the time, the promised job that must start next is taken first', async (context) => {
  const { startTaker, add, queue } = open(context, 'pressed');
  const startMs = Date.now() + 3_600_000;
  await add('urgent', { priority: 1 });
  const terms = { priority: 100, deadlineMs: startMs + 2000 };
  await queue.submit('later', { ...terms, latestStartMs: startMs + 1000 }, size);
  assert.equal((await startTaker().choose())?.job.id, 'urgent');
  const next = { priority: 100, deadlineMs: startMs + 5000, latestStartMs: startMs };
  await queue.enqueue('next', next, size, { pressedFromMs: Date.now() - 1 });
  assert.deepEqual(await takeAll(startTaker(), 3), ['next', 'later', 'urgent']);
});
