/**
 * Jobs end without an engine: those whose deadline passes while they wait, those whose engine is dead, and those that are
 * cancelled then. The gateway is real; engines are the test.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { queueName } from '../coordinator/queue-connection.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import { startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const queue = new JobQueue(gateway.redis.url, gateway.card.name);
after(() => queue.close());
const raw = new Redis(gateway.redis.url);
after(() => {
  raw.disconnect();
});
const SOON_MS = 30_000;

interface JobBody {
  readonly status: string;
}

const body = { prompt: [1, 5, 6], max_tokens: 3, stream: true };
const job = async (id: string): Promise<JobBody> =>
  (await (await fetch(`${gateway.url}/v1/jobs/${id}`)).json()) as JobBody;
const cancel = async (id: string): Promise<JobBody> => {
  const response = await fetch(`${gateway.url}/v1/jobs/${id}/cancel`, { method: 'POST' });
  return (await response.json()) as JobBody;
};

/** An engine that takes the next job, as far as the journal, and is gone. */
async function takeAndDie(id: string): Promise<void> {
  const taker = new JobTaker(gateway.redis.url, gateway.card.name);
  const taken = await taker.take(AbortSignal.timeout(SOON_MS));
  assert.equal(taken?.id, id);
  await gateway.take(id);
  await taker.close();
  assert.ok(await queue.isHeld(id));
  // The time that its lock would need to run out.
  await raw.del(`bull:${queueName(gateway.card.name)}:${id}:lock`);
}

const timely = { timeout: SOON_MS };

void test(
  'a job whose deadline passes while it waits is expired, though there is no engine',
  timely,
  async () => {
    const response = await gateway.post('/v1/completions', { ...body, deadline: 1 });
    const id = response.headers.get('x-caravan-job')!;
    assert.equal((await job(id)).status, 'waiting');
    const text = await response.text();
    assert.match(text, /"code":"expired"/);
    assert.equal((await job(id)).status, 'expired');
    const ends = (await gateway.journal.entries(id, 0, 0)).filter(({ kind }) => kind === 'end');
    assert.equal(ends.length, 1);
    // The answer ends with the journal; the queue forgets the job in the same sweep's next calls.
    while ((await queue.stand()).waitingJobs > 0) await delay(5);
    assert.equal((await queue.counts()).waiting, 0);
  },
);

void test('a job is cancelled though the engine that had it is dead', async () => {
  const response = await gateway.post('/v1/completions', body);
  const id = response.headers.get('x-caravan-job')!;
  await takeAndDie(id);
  assert.equal((await job(id)).status, 'active');
  assert.equal((await cancel(id)).status, 'cancelled');
  assert.match(await response.text(), /"code":"cancelled"/);
  assert.equal((await queue.counts()).active, 0);
});
