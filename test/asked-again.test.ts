/**
 * Requests that are sent again are the same job, and jobs that Redis has forgotten while their clients wait are submitted
 * again. The test itself takes the jobs and writes their journals.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import type { Take } from '../coordinator/journal.js';
import { sseEvents, startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const raw = new Redis(gateway.redis.url);
raw.on('error', () => undefined);
after(() => {
  raw.disconnect();
});

const ask = (key: string, body: object, signal?: AbortSignal): Promise<Response> =>
  fetch(`${gateway.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'idempotency-key': key },
    body: JSON.stringify({ prompt: [1, 5, 6], max_tokens: 3, ...body }),
    ...(signal === undefined ? {} : { signal }),
  });

async function write(take: Take, from: number): Promise<void> {
  const texts = ['one ', 'two ', 'three'];
  for (let i = from; i < texts.length; i += 1) {
    await gateway.journal.append(take, i, [300 + i], [texts[i]!]);
  }
  const usage = { promptTokens: 3, completionTokens: texts.length };
  const ending = { status: 'completed', finishReason: 'length', usage } as const;
  await gateway.journal.end(take, texts.length, ending, '');
}

interface Body {
  readonly choices: readonly { readonly text: string }[];
  readonly error?: { readonly code: string; readonly param: string };
}

void test('a request that is sent again is the same job, even when its client had left', async () => {
  const jobs = new Set(await gateway.jobIds());
  const leaving = new AbortController();
  const first = ask('left', {}, leaving.signal);
  const id = await gateway.nextJob(jobs);
  leaving.abort();
  await assert.rejects(first);
  const second = ask('left', {});
  await write(await gateway.take(id), 0);
  const answer = await second;
  assert.equal(answer.headers.get('x-caravan-job'), id);
  const body = (await answer.json()) as Body;
  assert.equal(body.choices[0]!.text, 'one two three');
  // It has ended: still the same one.
  assert.deepEqual(await (await ask('left', {})).json(), body);
  assert.equal((await gateway.jobIds()).filter((each) => !jobs.has(each)).length, 1);
});

void test('two that come at once are one job, and another body with the same key is refused', async () => {
  const jobs = new Set(await gateway.jobIds());
  const both = [ask('twice', { seed: 1 }), ask('twice', { seed: 1 })];
  const id = await gateway.nextJob(jobs);
  await write(await gateway.take(id), 0);
  for (const response of await Promise.all(both)) {
    assert.equal(response.headers.get('x-caravan-job'), id);
    assert.equal(((await response.json()) as Body).choices[0]!.text, 'one two three');
  }
  const other = await ask('twice', { seed: 2 });
  assert.equal(other.status, 400);
  assert.equal(((await other.json()) as Body).error?.param, 'idempotency-key');
  const long = await ask('k'.repeat(256), {});
  assert.equal(long.status, 400);
});

void test('a job that Redis forgot before anybody took it is submitted again', async () => {
  const response = await ask('forgotten', { stream: true });
  const id = response.headers.get('x-caravan-job')!;
  const card = await raw.hgetall('caravan:cards');
  await raw.flushall();
  await raw.hset('caravan:cards', card);
  assert.deepEqual(await gateway.jobIds(), []);
  await gateway.redis.kill('SIGTERM');
  await gateway.redis.restart();
  assert.equal(await gateway.nextJob(new Set()), id);
  await write(await gateway.take(id), 0);
  let text = '';
  for await (const { data } of sseEvents(response)) {
    if (data !== '[DONE]') text += (JSON.parse(data) as Body).choices[0]!.text;
  }
  assert.equal(text, 'one two three');
});

void test('a job that Redis has in its journal but not in its queue is queued again', async () => {
  const response = await ask('unqueued', { stream: true });
  const id = response.headers.get('x-caravan-job')!;
  const take = await gateway.take(id);
  await gateway.journal.append(take, 0, [300], ['one ']);
  const keys = await raw.keys('bull:*');
  await raw.del(...keys);
  await gateway.redis.kill('SIGTERM');
  await gateway.redis.restart();
  assert.equal(await gateway.nextJob(new Set()), id);
  await write(await gateway.take(id), 1);
  assert.match(await response.text(), /\[DONE\]/);
});

void test('a job that the queue lost before its client came is queued again', async () => {
  const first = await ask('lost before', { stream: true });
  const id = first.headers.get('x-caravan-job')!;
  await first.body!.cancel();
  await raw.del(...(await raw.keys('bull:*')), ...(await raw.keys('caravan:order:*')));
  assert.deepEqual(await gateway.jobIds(), []);
  const events = await fetch(`${gateway.url}/v1/jobs/${id}/events`);
  assert.equal(await gateway.nextJob(new Set()), id);
  await write(await gateway.take(id), 0);
  assert.match(await events.text(), /\[DONE\]/);
});

void test('a job can be looked at and cancelled by its name', async () => {
  const response = await ask('cancelled', { stream: true });
  const id = response.headers.get('x-caravan-job')!;
  const job = async (): Promise<{ status: string; object: string }> =>
    (await (await fetch(`${gateway.url}/v1/jobs/${id}`)).json()) as never;
  assert.equal((await job()).status, 'waiting');
  const cancel = (): Promise<Response> =>
    fetch(`${gateway.url}/v1/jobs/${id}/cancel`, { method: 'POST' });
  assert.equal(((await (await cancel()).json()) as { status: string }).status, 'cancelled');
  assert.equal((await cancel()).status, 200);
  assert.match(await response.text(), /"code":"cancelled"/);
  assert.equal((await fetch(`${gateway.url}/v1/jobs/job_none`)).status, 404);
  assert.equal(
    (await fetch(`${gateway.url}/v1/jobs/job_none/cancel`, { method: 'POST' })).status,
    404,
  );
});
