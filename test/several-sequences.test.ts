/** A job of several sequences in the journal: a stream each, one ending, and logprobs that survive a take. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import { Journal, newJobId, type Take } from '../coordinator/journal.js';
import type { SequenceEntry } from '../coordinator/journal-reader.js';
import { JournalWriter } from '../coordinator/journal-writer.js';
import type { Ending, Request, TokenLogprobs } from '../coordinator/request.js';
import { startRedis } from './redis-server.js';

const redis = await startRedis();
after(() => redis.stop());
const journal = await Journal.open(redis.url, 'patient');
const client = new Redis(redis.url);
after(() => {
  journal.close();
  client.disconnect();
});

const request: Request = {
  version: 1,
  model: 'm',
  promptTokenIds: [1, 5],
  otherPrompts: [{ promptTokenIds: [1, 6, 7], isTextStart: false }],
  n: 2,
  logprobs: 1,
  echo: true,
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
  maxTokens: 10,
  stop: [],
  ignoreEos: false,
  isTextStart: false,
};
const completed: Ending = {
  status: 'completed',
  finishReason: 'stop',
  usage: { promptTokens: 5, completionTokens: 7 },
};

async function newJob(): Promise<string> {
  const id = newJobId();
  await journal.create(id, request, { priority: 100, deadlineMs: null });
  return id;
}

async function takeJob(id: string): Promise<Take> {
  const take = await journal.take(id, 'engine');
  assert.ok(take.kind === 'taken');
  return take;
}

const writerOf = (take: Take): JournalWriter =>
  new JournalWriter(
    journal,
    take,
    () => undefined,
    () => undefined,
  );

const logprobsOf = (token: number): TokenLogprobs => ({
  logprob: -token / 8,
  top: [[token, -token / 8]],
});

async function readAll(id: string, offsets: readonly number[]): Promise<SequenceEntry[]> {
  const entries: SequenceEntry[] = [];
  for await (const entry of journal.readAll(id, offsets, AbortSignal.timeout(30_000))) {
    entries.push(entry);
  }
  return entries;
}

const tokensOf = (entries: readonly SequenceEntry[], index: number): number[] =>
  entries.flatMap(({ index: of, entry }) =>
    of === index && entry.kind === 'tokens' ? entry.tokenIds : [],
  );

void test('each sequence has its stream and its finish, and the job one ending, the last entry', async () => {
  const id = await newJob();
  const take = await takeJob(id);
  assert.equal(take.sequences.length, 4);
  const reading = readAll(id, [0, 0, 0, 0]);
  const writer = writerOf(take);
  for (const [index, sequence] of writer.sequences.entries()) {
    for (let token = 0; token <= index; token += 1) {
      sequence.token(10 * index + token, `${token}`, logprobsOf(token));
    }
  }
  // The first finishes first: its stream gets the ending long after.
  writer.sequences[0]!.finish('length', '');
  writer.sequences[2]!.finish('stop', 'held');
  writer.sequences[1]!.finish('length', '');
  writer.sequences[3]!.finish('stop', '');
  assert.equal(await writer.end(completed, ''), true);
  const entries = await reading;
  assert.deepEqual(
    [0, 1, 2, 3].map((index) => tokensOf(entries, index)),
    [[0], [10, 11], [20, 21, 22], [30, 31, 32, 33]],
  );
  assert.deepEqual(
    entries
      .filter(({ entry }) => entry.kind === 'finish')
      .map(({ index, entry }) => [index, entry.kind === 'finish' && entry.finishReason])
      .sort(),
    [
      [0, 'length'],
      [1, 'length'],
      [2, 'stop'],
      [3, 'stop'],
    ],
  );
  const last = entries.at(-1);
  assert.equal(last?.index, 0);
  assert.deepEqual(last.entry.kind === 'end' && last.entry.ending, completed);
  assert.equal(entries.filter(({ entry }) => entry.kind === 'end').length, 1);
  // Whoever comes later, and from the middle, sees the same.
  assert.deepEqual(await readAll(id, [1, 2, 2, 4]).then((rest) => tokensOf(rest, 2)), [22]);
  assert.deepEqual((await journal.job(id))?.ending, completed);
});

void test('a second take has the tokens, logprobs and finishes of the first', async () => {
  const id = await newJob();
  const writer = writerOf(await takeJob(id));
  writer.sequences[0]!.prompt([logprobsOf(5)]);
  writer.sequences[0]!.token(40, 'a', logprobsOf(40));
  writer.sequences[3]!.token(50, 'b', logprobsOf(50));
  writer.sequences[3]!.finish('stop', 'c');
  await writer.release();
  const { sequences } = await takeJob(id);
  assert.deepEqual(sequences[0], {
    tokenIds: [40],
    texts: ['a'],
    logprobs: [logprobsOf(40)],
    promptCount: 1,
    finish: null,
  });
  assert.deepEqual(sequences[1], { tokenIds: [], texts: [], promptCount: 0, finish: null });
  assert.deepEqual(sequences[3]?.finish, {
    kind: 'finish',
    endOffset: 1,
    text: 'c',
    finishReason: 'stop',
  });
  assert.deepEqual(await journal.promptLogprobs(id, 0), [logprobsOf(5)]);
});

void test('a long prompt is written in pieces, before the first token, and once by two takes', async () => {
  const id = await newJob();
  const all = Array.from({ length: 1000 }, (_, i) => logprobsOf(i + 1));
  const first = writerOf(await takeJob(id));
  first.sequences[0]!.prompt(all.slice(0, 700));
  await first.release();
  const second = writerOf(await takeJob(id));
  for (let i = 0; i < 1000; i += 100) second.sequences[0]!.prompt(all.slice(i, i + 100));
  second.sequences[0]!.token(9, 'x', logprobsOf(9));
  for await (const { entry } of journal.readAll(id, [0], AbortSignal.timeout(30_000))) {
    assert.equal(entry.kind, 'tokens');
    assert.deepEqual(await journal.promptLogprobs(id, 0), all);
    break;
  }
  await second.sequences[0]!.flush();
});

void test('what a killed Redis lost of any stream is written again before the ending', async () => {
  const id = await newJob();
  const writer = writerOf(await takeJob(id));
  for (const [index, sequence] of writer.sequences.entries()) {
    sequence.token(index, 'a', logprobsOf(1));
    await sequence.flush();
  }
  const streams = [0, 1, 2, 3].map((index) => `caravan:{${id}}:journal:${index}`);
  for (const sequence of writer.sequences) sequence.finish('stop', '');
  await Promise.all(writer.sequences.map((sequence) => sequence.flush()));
  // As if its last second were gone.
  await client.del(streams[1]!, streams[2]!);
  await client.del(streams[3]!);
  assert.equal(await writer.end(completed, ''), true);
  const entries = await readAll(id, [0, 0, 0, 0]);
  for (const index of [0, 1, 2, 3]) assert.deepEqual(tokensOf(entries, index), [index]);
});

void test('a job that is cancelled while it waits ends in all its streams', async () => {
  const id = await newJob();
  const writer = writerOf(await takeJob(id));
  writer.sequences[1]!.token(3, 'a', logprobsOf(3));
  writer.sequences[0]!.finish('stop', '');
  await writer.release();
  assert.equal(await journal.requestCancel(id), 'cancelled');
  const entries = await readAll(id, [0, 0, 0, 0]);
  assert.deepEqual(entries.at(-1)?.entry, {
    kind: 'end',
    endOffset: 0,
    text: '',
    ending: { status: 'cancelled' },
  });
  assert.equal((await journal.entries(id, 1, 1)).at(-1)?.kind, 'end');
  for (const key of [`journal:0`, `journal:1`, `journal:3`]) {
    const seconds = await client.ttl(`caravan:{${id}}:${key}`);
    assert.ok(seconds > 0, `${key} goes with the job: ${seconds}`);
  }
});
