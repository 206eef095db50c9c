/**
 * In exact mode, what a request gives does not depend on what else runs: 64 requests at once, on 16 slots, give the
 * tokens that each gives alone. Greedy and seeded, long and short prompts, with and without stop texts.
 * Without CARAVAN_LONG=1 there are 24 requests.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Ending, Request } from '../coordinator/request.js';
import { Random } from './random.js';
import { startEngine, tinyTokenizer } from './real-engine.js';
import { startRedis } from './redis-server.js';

const REQUESTS = process.env['CARAVAN_LONG'] === '1' ? 64 : 24;
const SLOTS = 16;
const TIMEOUT_MS = 240_000;
const terms = { priority: 100, deadlineMs: null };

const redis = await startRedis();
after(() => redis.stop());
const engine = await startEngine(redis.url, { tp: 2, maxBatchSize: SLOTS });
after(() => engine.stop());
const journal = await Journal.open(redis.url, 'patient');
after(() => {
  journal.close();
});
const queue = new JobQueue(redis.url, engine.model);
after(() => queue.close());

interface Answer {
  readonly tokenIds: readonly number[];
  readonly text: string;
  readonly ending: Ending;
}

async function submit(request: Request): Promise<string> {
  const id = newJobId();
  await journal.create(id, request, terms);
  await queue.submit(id, terms);
  return id;
}

async function answerOf(id: string): Promise<Answer> {
  const tokenIds: number[] = [];
  let text = '';
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
    if (entry.kind === 'end') return { tokenIds, text: text + entry.text, ending: entry.ending };
    tokenIds.push(...entry.tokenIds);
    text += entry.texts.join('');
  }
  throw new Error('a journal without an ending');
}

/**
 * The most jobs that were active at once until `finished`. May be more than the slots: BullMQ hears of an ending
 * after the slot has been given to the next job.
 */
async function peakOfActive(finished: Promise<unknown>): Promise<number> {
  let peak = 0;
  let isFinished = false;
  void finished.finally(() => (isFinished = true)).catch(() => undefined);
  const isOver = (): boolean => isFinished;
  while (!isOver()) peak = Math.max(peak, (await queue.counts()).active);
  return peak;
}

function makeRequests(): Request[] {
  const tokenizer = tinyTokenizer();
  const random = new Random(64);
  const opening = 'Once upon a time a small camel walked through the desert with the caravan.';
  return Array.from({ length: REQUESTS }, (_, i) => ({
    version: 1,
    model: engine.model,
    promptTokenIds: [
      tokenizer.bosTokenId,
      ...tokenizer.encode(`${i} ${opening.repeat(random.below(4))} ${opening}`).slice(0, 8 + 3 * i),
    ],
    sampling: {
      temperature: i % 2 === 0 ? 0 : 0.8,
      topP: random.pick([1, 0.9]),
      topK: random.pick([0, 40]),
      seed: 1000 + i,
    },
    maxTokens: 16 + random.below(64),
    stop: i % 5 === 0 ? ['. '] : [],
    ignoreEos: i % 3 === 0,
    isTextStart: false,
  }));
}

void test(`${REQUESTS} requests at once give what each gives alone`, async () => {
  const requests = makeRequests();
  const alone: Answer[] = [];
  for (const request of requests) alone.push(await answerOf(await submit(request)));

  const ids = await Promise.all(requests.map(submit));
  const answers = Promise.all(ids.map(answerOf));
  assert.ok((await peakOfActive(answers)) >= SLOTS, 'the slots were filled');
  const together = await answers;
  for (const [i, answer] of together.entries()) {
    assert.deepEqual(answer, alone[i], `request ${i}`);
    assert.equal(answer.ending.status, 'completed');
  }
  // The check means something: the answers differ, and some end by themselves.
  assert.ok(new Set(together.map(({ text }) => text)).size > REQUESTS / 2);
  const reasons = together.map(({ ending }) => 'finishReason' in ending && ending.finishReason);
  assert.deepEqual(new Set(reasons), new Set(['stop', 'length']));
});
