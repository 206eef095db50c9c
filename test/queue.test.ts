/** The queue keeps order and locks, and says within seconds that Redis is dead. */
import assert from 'node:assert/strict';
import { after, test, type TestContext } from 'node:test';
import { Redis } from 'ioredis';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { TakenJob } from '../coordinator/taken-job.js';
import { freePort, startRedis } from './redis-server.js';

/** Longer than a lock and two checks for jobs whose lock ran out. */
const LONGER_THAN_LOCK_MS = 10_000;
const CALL_LIMIT_MS = 3_500;
const ignore = (): void => undefined;

const redis = await startRedis();
after(() => redis.stop());

const submit = (queue: JobQueue, id: string, priority = 100): Promise<void> =>
  queue.submit(id, { priority, deadlineMs: null });

function open(context: TestContext, model: string) {
  const queue = new JobQueue(redis.url, model);
  context.after(() => queue.close());
  const startTaker = (): JobTaker => {
    const taker = new JobTaker(redis.url, model, ignore);
    context.after(() => taker.close());
    return taker;
  };
  return { queue, startTaker };
}

async function taken(taker: JobTaker): Promise<TakenJob> {
  const job = await taker.take(AbortSignal.timeout(30_000));
  assert.ok(job, 'no job came');
  return job;
}

void test('a job that was given back keeps its priority', async (context) => {
  const { queue, startTaker } = open(context, 'priority');
  const taker = startTaker();
  await submit(queue, 'urgent', 1);
  const urgent = await taken(taker);
  await submit(queue, 'usual');
  await submit(queue, 'slow', 1000);
  await urgent.giveBack();
  const order: string[] = [];
  for (let i = 0; i < 3; i += 1) {
    const job = await taken(taker);
    order.push(job.id);
    await job.finish(false);
  }
  assert.deepEqual(order, ['urgent', 'usual', 'slow']);
  assert.deepEqual(await queue.counts(), { waiting: 0, active: 0, completed: 3, failed: 0 });
});

void test('a held job is renewed; one that was dropped goes to another engine', async (context) => {
  const { queue, startTaker } = open(context, 'renewed');
  await submit(queue, 'held');
  const held = await taken(startTaker());
  const other = startTaker();
  assert.equal(await other.take(AbortSignal.timeout(LONGER_THAN_LOCK_MS)), null);
  assert.equal(await queue.remove('held'), false);
  held.drop();
  const again = await taken(other);
  assert.equal(again.id, 'held');
  // The first one's word counts no more.
  await held.finish(true);
  await again.finish(false);
  await again.finish(false);
  assert.deepEqual(await queue.counts(), { waiting: 0, active: 0, completed: 1, failed: 0 });
});

void test('one job of two takers is taken by one', async (context) => {
  const { queue, startTaker } = open(context, 'once');
  const takers = [startTaker(), startTaker()];
  const ids = Array.from({ length: 40 }, (_, i) => `job-${i}`);
  for (const id of ids) await submit(queue, id);
  const seen: string[] = [];
  const all = new AbortController();
  const over = AbortSignal.any([all.signal, AbortSignal.timeout(60_000)]);
  await Promise.all(
    takers.map(async (taker) => {
      for (;;) {
        const job = await taker.take(over);
        if (job === null) break;
        seen.push(job.id);
        await job.finish(false);
        if (seen.length >= ids.length) all.abort();
      }
    }),
  );
  assert.deepEqual(seen.sort(), ids.sort());
});

void test('scripts are sent to Redis once, and again when it has forgotten them', async (context) => {
  const { queue, startTaker } = open(context, 'scripts');
  const taker = startTaker();
  const raw = new Redis(redis.url);
  context.after(() => {
    raw.disconnect();
  });
  const run = async (id: string): Promise<void> => {
    await submit(queue, id);
    const job = await taken(taker);
    assert.equal(job.id, id);
    await job.finish(false);
  };
  const texts = async (): Promise<number> =>
    Number(/^cmdstat_eval:calls=(\d+)/m.exec(await raw.info('commandstats'))?.[1] ?? 0);
  await run('first');
  const known = await texts();
  for (let i = 0; i < 5; i += 1) await run(`more-${i}`);
  assert.equal(await texts(), known);
  await raw.script('FLUSH');
  await run('last');
  assert.ok((await texts()) > known);
  assert.deepEqual(await queue.counts(), { waiting: 0, active: 0, completed: 7, failed: 0 });
});

void test('every call on a dead Redis fails in time, and works again when it is back', async (context) => {
  const { queue } = open(context, 'dead');
  await submit(queue, 'before');
  await redis.kill();
  const never = new JobQueue(`redis://127.0.0.1:${await freePort()}`, 'never');
  const calls = [
    () => submit(queue, 'lost'),
    () => queue.counts(),
    () => queue.ids(10),
    () => queue.remove('before'),
    () => submit(never, 'never'),
  ];
  for (const call of calls) {
    const startMs = performance.now();
    await assert.rejects(call, { code: 'redis_unavailable' });
    const tookMs = performance.now() - startMs;
    assert.ok(tookMs < CALL_LIMIT_MS, `it took ${tookMs.toFixed(0)} ms`);
  }
  await never.close();
  await redis.restart();
  const giveUpMs = performance.now() + 30_000;
  for (;;) {
    try {
      await submit(queue, 'after');
      break;
    } catch (error) {
      assert.ok(performance.now() < giveUpMs, String(error));
    }
  }
  assert.ok((await queue.ids(10)).includes('after'));
});
