import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import { Journal, newJobId, type JournalEntry, type Take } from '../coordinator/journal.js';
import { JournalWriter } from '../coordinator/journal-writer.js';
import type { Ending, JobTerms, Request } from '../coordinator/request.js';
import { CaravanError } from '../proto/errors.js';
import { freePort, startRedis } from './redis-server.js';

const redis = await startRedis();
const journal = await Journal.open(redis.url, 'patient');
const raw = new Redis(redis.url);
raw.on('error', () => undefined);
after(async () => {
  raw.disconnect();
  journal.close();
  await redis.stop();
});

const request: Request = {
  version: 1,
  model: 'm',
  promptTokenIds: [1, 2, 3],
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
  maxTokens: 100,
  stop: [],
  ignoreEos: false,
  isTextStart: true,
};
const terms: JobTerms = { priority: 100, deadlineMs: null };
const completed: Ending = {
  status: 'completed',
  finishReason: 'stop',
  usage: { promptTokens: 3, completionTokens: 3 },
};

async function newJob(): Promise<string> {
  const id = newJobId();
  await journal.create(id, request, terms);
  return id;
}

async function takeJob(id: string, engine: string): Promise<Take> {
  const take = await journal.take(id, engine);
  if (take.kind !== 'taken') throw new Error(`the job is ${take.kind}`);
  return take;
}

/** All tokens and texts from `offset` on, and the ending. */
async function readAll(id: string, offset = 0) {
  const tokenIds: number[] = [];
  let text = '';
  for await (const entry of journal.read(id, 0, offset, AbortSignal.timeout(20_000))) {
    if (entry.kind === 'end') return { tokenIds, text: text + entry.text, ending: entry.ending };
    tokenIds.push(...entry.tokenIds);
    text += entry.texts.join('');
  }
  throw new Error('the stream ended without an ending');
}

const never = (): void => {
  assert.fail('must not be called');
};

void test('a job is read back as it was written, token by token', async () => {
  const id = await newJob();
  const writer = new JournalWriter(journal, await takeJob(id, 'a'), never, never);
  const reading = readAll(id);
  writer.sequences[0]!.token(10, 'One ');
  writer.sequences[0]!.token(11, '');
  writer.sequences[0]!.token(12, '日');
  assert.equal(await writer.end(completed, '!'), true);
  assert.deepEqual(await reading, { tokenIds: [10, 11, 12], text: 'One 日!', ending: completed });
  assert.equal((await journal.job(id))?.status, 'completed');
});

void test('of two engines that hold a job, the earlier can write nothing', async () => {
  const id = await newJob();
  const first = await takeJob(id, 'a');
  assert.equal((await journal.append(first, 0, [10], ['x'])).kind, 'written');
  const second = await takeJob(id, 'b');
  assert.ok(second.fence > first.fence);
  assert.deepEqual(second.sequences[0]?.tokenIds, [10]);
  assert.equal((await journal.append(first, 1, [66], ['bad'])).kind, 'stale');
  assert.equal((await journal.end(first, 1, completed, '')).kind, 'stale');
  assert.equal((await journal.append(second, 1, [11], ['y'])).kind, 'written');
  assert.equal((await journal.end(second, 2, completed, '')).kind, 'written');
  assert.deepEqual((await readAll(id)).tokenIds, [10, 11]);
});

void test('a writer that is fenced off hears of it once and stops', async () => {
  const id = await newJob();
  let staleCount = 0;
  const writer = new JournalWriter(journal, await takeJob(id, 'a'), () => (staleCount += 1), never);
  await takeJob(id, 'b');
  writer.sequences[0]!.token(10, 'x');
  writer.sequences[0]!.token(11, 'y');
  assert.equal(await writer.end(completed, ''), false);
  assert.equal(staleCount, 1);
  assert.deepEqual(await journal.entries(id, 0, 0), []);
});

void test('an append that comes twice is written once, and a gap is filled', async () => {
  const id = await newJob();
  const take = await takeJob(id, 'a');
  assert.equal((await journal.append(take, 0, [10, 11], ['a', 'b'])).kind, 'written');
  assert.deepEqual(await journal.append(take, 0, [10, 11], ['a', 'b']), {
    kind: 'offset',
    offset: 2,
    index: 0,
  });
  assert.deepEqual(await journal.append(take, 5, [15], ['f']), {
    kind: 'offset',
    offset: 2,
    index: 0,
  });
  assert.deepEqual(
    (await journal.entries(id, 0, 0)).map((entry) => entry.endOffset),
    [2],
  );
});

void test('a job ends once', async () => {
  const id = await newJob();
  const take = await takeJob(id, 'a');
  assert.equal((await journal.end(take, 0, completed, 'x')).kind, 'written');
  assert.equal((await journal.end(take, 0, { status: 'cancelled' }, '')).kind, 'already');
  assert.equal((await journal.append(take, 0, [1], ['late'])).kind, 'stale');
  assert.equal((await journal.take(id, 'b')).kind, 'ended');
  assert.equal(await journal.requestCancel(id), 'already');
  assert.deepEqual((await journal.job(id))?.ending, completed);
});

void test('what is kept of a job that has ended takes no more room than it needs', async () => {
  const id = await newJob();
  const take = await takeJob(id, 'a');
  const key = `caravan:{${id}}:journal:0`;
  const bytes = async (): Promise<number> => (await raw.memory('USAGE', key)) ?? 0;
  await journal.append(take, 0, [1, 2, 3], ['a', 'b', 'c']);
  const before = await bytes();
  assert.ok(before > 4000, `${before} bytes`);
  await journal.end(take, 3, completed, '.');
  const kept = await bytes();
  assert.ok(kept < 1500, `${kept} bytes`);
  const ttlS = await raw.ttl(key);
  assert.ok(ttlS > 86_000 && ttlS <= 86_400, `${ttlS} s`);
  assert.deepEqual(await readAll(id), { tokenIds: [1, 2, 3], text: 'abc.', ending: completed });
});

void test('a reader can start in the middle of an entry', async () => {
  const id = await newJob();
  const take = await takeJob(id, 'a');
  await journal.append(take, 0, [10, 11, 12, 13], ['a', 'b', 'c', 'd']);
  await journal.end(take, 4, completed, '');
  assert.deepEqual(await readAll(id, 3), { tokenIds: [13], text: 'd', ending: completed });
});

void test('cancelling a waiting job ends it; an active one is asked to end', async () => {
  const waiting = await newJob();
  assert.equal(await journal.requestCancel(waiting), 'cancelled');
  assert.equal((await readAll(waiting)).ending.status, 'cancelled');
  assert.equal((await journal.take(waiting, 'a')).kind, 'ended');

  const active = await newJob();
  await takeJob(active, 'a');
  const heard = new Promise<string>((resolve) => void journal.onCancel(resolve));
  assert.equal(await journal.requestCancel(active), 'requested');
  assert.equal(await heard, active);
  assert.equal(await journal.isCancelRequested(active), true);
});

void test('a job that was given back keeps its tokens and can be cancelled at once', async () => {
  const id = await newJob();
  const writer = new JournalWriter(journal, await takeJob(id, 'a'), never, never);
  writer.sequences[0]!.token(10, 'x');
  await writer.release();
  assert.equal((await journal.job(id))?.status, 'waiting');
  assert.deepEqual((await takeJob(id, 'b')).sequences[0]?.tokenIds, [10]);
});

void test('an unknown job is an error, not a wait', async () => {
  await assert.rejects(
    readAll('job_unknown'),
    (error) => error instanceof CaravanError && error.code === 'not_found',
  );
});

void test('a dead Redis is said within three seconds', async () => {
  const url = `redis://127.0.0.1:${await freePort()}`;
  const startMs = performance.now();
  await assert.rejects(
    Journal.open(url, 'impatient'),
    (error) => error instanceof CaravanError && error.code === 'redis_unavailable',
  );
  assert.ok(performance.now() - startMs < 3500);
});

void test('a reader sees each token once over a killed Redis, and nothing is lost', async () => {
  const id = await newJob();
  const writer = new JournalWriter(journal, await takeJob(id, 'a'), never, () => undefined);
  const entries: JournalEntry[] = [];
  const seen: number[] = [];
  let onSeen: () => void = () => undefined;
  const reading = (async () => {
    for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(30_000))) {
      entries.push(entry);
      if (entry.kind === 'tokens') seen.push(...entry.tokenIds);
      onSeen();
    }
  })();
  const count = 60;
  for (let token = 0; token < count; token += 1) {
    writer.sequences[0]!.token(token, `${token} `);
    if (token === 30) {
      await new Promise<void>((resolve) => {
        onSeen = () => {
          if (seen.length >= 20) resolve();
        };
        onSeen();
      });
      onSeen = () => undefined;
      // Killed at once: the last second of appends may be gone, and is written again.
      await redis.kill();
      for (let lost = 100; lost < 103; lost += 1) writer.sequences[0]!.token(lost, '');
      await redis.restart();
    }
  }
  assert.equal(await writer.end(completed, ''), true);
  await reading;
  const expected = Array.from({ length: count }, (_, i) => i);
  expected.splice(31, 0, 100, 101, 102);
  assert.deepEqual(seen, expected);
  assert.equal(entries.at(-1)?.kind, 'end');
});
