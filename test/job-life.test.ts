/**
 * A job comes to exactly one ending, whatever happens to the engine that runs it. Real queue, real journal, the
 * production runner; only the arithmetic is a stand-in: token n of every job is n, and releases `n `.
 */
import assert from 'node:assert/strict';
import { once, EventEmitter } from 'node:events';
import { after, test, type TestContext } from 'node:test';
import type { Engine, SequenceSink, SequenceSpec } from '../coordinator/engine.js';
import { JobRunner } from '../coordinator/job-runner.js';
import { Journal, newJobId, type JournalEntry } from '../coordinator/journal.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Ending, JobTerms, Request } from '../coordinator/request.js';
import { CaravanError } from '../proto/errors.js';
import { startRedis } from './redis-server.js';

const redis = await startRedis();
const journal = await Journal.open(redis.url, 'patient');
after(async () => {
  journal.close();
  await redis.stop();
});

const TIMEOUT_MS = 30_000;
const quiet = { info: () => undefined, warn: () => undefined };

interface StandInSequence {
  readonly spec: SequenceSpec;
  readonly sink: SequenceSink;
  tokenCount: number;
}

/** An engine that generates when the test says so. Emits `added` and `cancelled` with the job's id. */
class StandInEngine extends EventEmitter implements Engine {
  readonly sequences = new Map<string, StandInSequence>();
  readonly hasEnded = false;
  readonly #slotCount: number;
  /** The most sequences that it ever held. */
  peakCount = 0;
  constructor(slotCount: number) {
    super();
    this.#slotCount = slotCount;
  }

  get freeSlotCount(): number {
    return this.#slotCount - this.sequences.size;
  }

  add(spec: SequenceSpec, sink: SequenceSink) {
    assert.ok(this.freeSlotCount > 0, 'a job was taken without a free slot');
    this.sequences.set(spec.id, { spec, sink, tokenCount: spec.resumeTokenIds.length });
    this.peakCount = Math.max(this.peakCount, this.sequences.size);
    this.emit('added', spec.id);
    return {
      cancel: () => {
        if (this.sequences.delete(spec.id)) this.emit('cancelled', spec.id);
      },
    };
  }

  run(): Promise<void> {
    return Promise.resolve();
  }

  /** Generates `count` tokens of a job; ends it when it has all that it asked for. */
  generate(id: string, count: number): void {
    const sequence = this.sequences.get(id);
    assert.ok(sequence, `${id} is not in this engine`);
    for (let i = 0; i < count; i += 1) {
      sequence.sink.token(sequence.tokenCount, `${sequence.tokenCount} `);
      sequence.tokenCount += 1;
    }
    if (sequence.tokenCount < sequence.spec.request.maxTokens) return;
    this.sequences.delete(id);
    sequence.sink.end('length', '.');
  }

  fail(id: string, error: CaravanError): void {
    const sequence = this.sequences.get(id);
    assert.ok(sequence);
    this.sequences.delete(id);
    sequence.sink.fail(error);
  }
}

interface Running {
  readonly engine: StandInEngine;
  /** Resolves when the job is in this engine. */
  readonly has: (id: string) => Promise<StandInSequence>;
  /** Stops at once, as a second SIGTERM does. */
  readonly stop: () => Promise<void>;
  readonly drain: () => Promise<void>;
}

let modelCount = 0;
/** Each test has a queue of its own. */
const newModel = (): string => `model-${(modelCount += 1)}`;

function startRunner(context: TestContext, model: string, slotCount = 4): Running {
  const engine = new StandInEngine(slotCount);
  const taker = new JobTaker(redis.url, model);
  const drained = new AbortController();
  const stopped = new AbortController();
  const runner = new JobRunner(engine, journal, taker, `engine of ${model}`, quiet);
  const ended = runner.run(drained.signal, stopped.signal).finally(() => taker.close());
  const stop = async (): Promise<void> => {
    drained.abort();
    stopped.abort();
    await ended;
  };
  context.after(stop);
  return {
    engine,
    has: async (id) => {
      while (!engine.sequences.has(id)) {
        await once(engine, 'added', { signal: AbortSignal.timeout(TIMEOUT_MS) });
      }
      return engine.sequences.get(id)!;
    },
    stop,
    drain: async () => {
      drained.abort();
      await ended;
    },
  };
}

function openQueue(context: TestContext, model: string): JobQueue {
  const queue = new JobQueue(redis.url, model);
  context.after(() => queue.close());
  return queue;
}

async function submit(
  queue: JobQueue,
  model: string,
  maxTokens: number,
  terms: Partial<JobTerms> = {},
): Promise<string> {
  const id = newJobId();
  const request: Request = {
    version: 1,
    model,
    promptTokenIds: [1, 2, 3],
    sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    maxTokens,
    stop: [],
    ignoreEos: false,
    isTextStart: true,
  };
  const whole = { priority: 100, deadlineMs: null, ...terms };
  await journal.create(id, request, whole);
  await queue.submit(id, whole);
  return id;
}

/** Entries until `isEnough` says so, or to the end. */
async function readUntil(
  id: string,
  isEnough: (entry: JournalEntry) => boolean,
): Promise<{ text: string; ending: Ending | null }> {
  let text = '';
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
    if (entry.kind === 'end') return { text: text + entry.text, ending: entry.ending };
    text += entry.texts.join('');
    if (isEnough(entry)) break;
  }
  return { text, ending: null };
}

const readAll = (id: string) => readUntil(id, () => false);
const readTokens = (id: string, count: number) => readUntil(id, (e) => e.endOffset >= count);

/** What BullMQ says once a job has left the active ones: that follows the ending in the journal. */
async function countsWhenIdle(queue: JobQueue) {
  const giveUpMs = performance.now() + TIMEOUT_MS;
  for (;;) {
    const counts = await queue.counts();
    if (counts.active + counts.waiting === 0) return counts;
    assert.ok(performance.now() < giveUpMs, `jobs are left: ${JSON.stringify(counts)}`);
  }
}

const completed = (completionTokens: number): Ending => ({
  status: 'completed',
  finishReason: 'length',
  usage: { promptTokens: 3, completionTokens, cachedTokens: 0 },
});

void test('a job goes through the queue to one ending', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const { engine, has } = startRunner(context, model);
  const id = await submit(queue, model, 3);
  await has(id);
  assert.equal((await journal.job(id))?.status, 'active');
  engine.generate(id, 3);
  assert.deepEqual(await readAll(id), { text: '0 1 2 .', ending: completed(3) });
  assert.deepEqual(await countsWhenIdle(queue), { waiting: 0, active: 0, completed: 1, failed: 0 });
});

void test('urgent jobs go first, and equally urgent ones in their order', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const ids: string[] = [];
  for (const priority of [100, 100, 1, 1000, 50]) {
    ids.push(await submit(queue, model, 1, { priority }));
  }
  const { engine, has } = startRunner(context, model, 1);
  const order: string[] = [];
  engine.on('added', (id: string) => order.push(id));
  for (const at of [2, 4, 0, 1, 3]) {
    await has(ids[at]!);
    engine.generate(ids[at]!, 1);
    await readAll(ids[at]!);
  }
  const expected = [2, 4, 0, 1, 3].map((at) => ids[at]);
  assert.deepEqual(order, expected);
});

void test('no job is taken while no slot is free', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const { engine, has } = startRunner(context, model, 2);
  const ids: string[] = [];
  for (let i = 0; i < 6; i += 1) ids.push(await submit(queue, model, 1));
  for (const id of ids) {
    await has(id);
    engine.generate(id, 1);
    await readAll(id);
  }
  assert.ok(engine.peakCount <= 2);
});

void test('a stopped engine gives its jobs back, and another goes on at the next token', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const first = startRunner(context, model);
  const id = await submit(queue, model, 5);
  await first.has(id);
  first.engine.generate(id, 2);
  await readTokens(id, 2);
  const startMs = performance.now();
  await first.stop();
  assert.equal((await journal.job(id))?.status, 'waiting');

  const second = startRunner(context, model);
  const { spec } = await second.has(id);
  assert.ok(performance.now() - startMs < 5_000, 'it did not wait for a lock to run out');
  assert.deepEqual(spec.resumeTokenIds, [0, 1]);
  second.engine.generate(id, 3);
  assert.deepEqual(await readAll(id), { text: '0 1 2 3 4 .', ending: completed(5) });
});

void test('a draining engine lets its jobs end and takes no other', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const { engine, has, drain } = startRunner(context, model);
  const id = await submit(queue, model, 2);
  await has(id);
  const drained = drain();
  const late = await submit(queue, model, 1);
  engine.generate(id, 2);
  await drained;
  assert.equal((await readAll(id)).ending?.status, 'completed');
  assert.equal((await journal.job(late))?.status, 'waiting');
  assert.equal((await queue.counts()).waiting, 1);
});

void test('the job of a dead engine moves again within fifteen seconds', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const id = await submit(queue, model, 4);
  // An engine that took the job, wrote two tokens, and renews its lock no more.
  const dead = new JobTaker(redis.url, model);
  assert.equal((await dead.take(AbortSignal.timeout(TIMEOUT_MS)))?.id, id);
  const take = await journal.take(id, 'dead');
  assert.ok(take.kind === 'taken');
  await journal.append(take, 0, [0, 1], ['0 ', '1 ']);
  await dead.close();
  const startMs = performance.now();

  const { engine, has } = startRunner(context, model);
  const { spec } = await has(id);
  const waitedMs = performance.now() - startMs;
  assert.ok(waitedMs < 15_000, `it waited for ${waitedMs.toFixed(0)} ms`);
  assert.deepEqual(spec.resumeTokenIds, [0, 1]);
  engine.generate(id, 2);
  assert.deepEqual(await readAll(id), { text: '0 1 2 3 .', ending: completed(4) });
  // What the dead one says from beyond the grave is refused.
  assert.equal((await journal.append(take, 2, [66], ['no'])).kind, 'stale');
});

void test('an ended job that BullMQ was not told of is finished without being run', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const id = await submit(queue, model, 4);
  const take = await journal.take(id, 'dead');
  assert.ok(take.kind === 'taken');
  await journal.append(take, 0, [0], ['0 ']);
  await journal.end(take, 1, completed(1), '.');
  const { engine } = startRunner(context, model);
  assert.equal((await countsWhenIdle(queue)).completed, 1);
  assert.equal(engine.peakCount, 0);
  assert.deepEqual(await readAll(id), { text: '0 .', ending: completed(1) });
});

void test('an engine that lost its job to another drops the sequence and writes nothing', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const { engine, has } = startRunner(context, model);
  const id = await submit(queue, model, 10);
  await has(id);
  engine.generate(id, 1);
  await readTokens(id, 1);
  const other = await journal.take(id, 'other');
  assert.ok(other.kind === 'taken');
  const dropped = once(engine, 'cancelled', { signal: AbortSignal.timeout(TIMEOUT_MS) });
  engine.generate(id, 1);
  assert.deepEqual(await dropped, [id]);
  await journal.append(other, 1, [50], ['fifty ']);
  await journal.end(other, 2, completed(2), '.');
  assert.deepEqual(await readAll(id), { text: '0 fifty .', ending: completed(2) });
});

void test('cancelling a running job ends it and frees its slot', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const { engine, has } = startRunner(context, model);
  const id = await submit(queue, model, 10);
  await has(id);
  engine.generate(id, 2);
  await readTokens(id, 2);
  const left = once(engine, 'cancelled', { signal: AbortSignal.timeout(TIMEOUT_MS) });
  assert.equal(await journal.requestCancel(id), 'requested');
  await left;
  assert.deepEqual(await readAll(id), { text: '0 1 ', ending: { status: 'cancelled' } });
  assert.equal(engine.sequences.size, 0);
  assert.equal((await countsWhenIdle(queue)).failed, 0);
});

void test('cancelling a waiting job takes it out of the queue', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const id = await submit(queue, model, 10);
  assert.equal(await journal.requestCancel(id), 'cancelled');
  assert.equal(await queue.remove(id), true);
  assert.equal(await queue.remove(id), false);
  assert.equal((await queue.counts()).waiting, 0);
  assert.deepEqual(await readAll(id), { text: '', ending: { status: 'cancelled' } });
});

void test('a job that was cancelled while its engine was dead is not run again', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const id = await submit(queue, model, 10);
  assert.equal((await journal.take(id, 'dead')).kind, 'taken');
  assert.equal(await journal.requestCancel(id), 'requested');
  const { engine } = startRunner(context, model);
  assert.equal((await readAll(id)).ending?.status, 'cancelled');
  assert.equal(engine.peakCount, 0);
});

void test('a job past its deadline expires, before it runs or while it does', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const late = await submit(queue, model, 10, { deadlineMs: Date.now() - 1 });
  const { engine, has } = startRunner(context, model);
  assert.deepEqual(await readAll(late), { text: '', ending: { status: 'expired' } });
  assert.equal(engine.peakCount, 0);

  const running = await submit(queue, model, 10, { deadlineMs: Date.now() + 1_500 });
  await has(running);
  engine.generate(running, 1);
  assert.deepEqual(await readAll(running), { text: '0 ', ending: { status: 'expired' } });
  assert.equal(engine.sequences.size, 0);
});

void test('a failure that a retry can mend gives the job back; another one ends it', async (context) => {
  const model = newModel();
  const queue = openQueue(context, model);
  const { engine, has } = startRunner(context, model);
  const id = await submit(queue, model, 3);
  await has(id);
  engine.generate(id, 1);
  const again = once(engine, 'added', { signal: AbortSignal.timeout(TIMEOUT_MS) });
  engine.fail(id, new CaravanError('rank_failed', 'rank 1 is gone'));
  await again;
  assert.deepEqual(engine.sequences.get(id)?.spec.resumeTokenIds, [0]);
  engine.fail(id, new CaravanError('internal', 'a whole row gave no token'));
  const { text, ending } = await readAll(id);
  assert.equal(text, '0 ');
  assert.deepEqual(ending, {
    status: 'failed',
    code: 'internal',
    message: 'a whole row gave no token',
  });
  assert.equal((await countsWhenIdle(queue)).failed, 1);
  assert.equal((await journal.job(id))?.status, 'failed');
});
