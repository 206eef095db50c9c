/**
 * kill -9 of the coordinator in mid-generation: what was shown stays, the rest follows, and in exact mode the whole is
 * what an undisturbed engine gives. CARAVAN_LONG=1 kills early and late as well.
 */
import assert from 'node:assert/strict';
import { randomInt } from 'node:crypto';
import { after, test } from 'node:test';
import { Journal, newJobId, type JournalEntry } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Ending, Request } from '../coordinator/request.js';
import { startEngine, tinyTokenizer } from './real-engine.js';
import { startRedis } from './redis-server.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const TOKENS = 400;
const TIMEOUT_MS = 120_000;
const MOVES_AGAIN_MS = 15_000;
const terms = { priority: 100, deadlineMs: null };

const redis = await startRedis();
after(() => redis.stop());
const engine = await startEngine(redis.url, { tp: 2, maxBatchSize: 4, args: ['--job-lock', '3'] });
after(() => engine.stop());
const journal = await Journal.open(redis.url, 'patient');
after(() => {
  journal.close();
});
const queue = new JobQueue(redis.url, engine.model);
after(() => queue.close());
const tokenizer = tinyTokenizer();

const requestOf = (seed: number): Request => ({
  version: 1,
  model: engine.model,
  promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
  sampling: { temperature: 0.8, topP: 1, topK: 0, seed },
  maxTokens: TOKENS,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
});

async function submit(request: Request): Promise<string> {
  const id = newJobId();
  await journal.create(id, request, terms);
  await queue.submit(id, terms);
  return id;
}

/** A client that holds its stream open. */
class Client {
  readonly tokenIds: number[] = [];
  text = '';
  endingCount = 0;
  readonly #waiting = new Set<() => void>();
  readonly done: Promise<Ending>;

  constructor(id: string) {
    this.done = this.#follow(id);
    this.done.catch(() => undefined);
  }

  /** Returns when more than `count` tokens are here. */
  async hasMoreThan(count: number): Promise<void> {
    const more = new Promise<void>((resolve) => {
      const check = (): void => {
        if (this.tokenIds.length <= count) return;
        this.#waiting.delete(check);
        resolve();
      };
      this.#waiting.add(check);
      check();
    });
    const early = this.done.then(() => {
      if (this.tokenIds.length <= count) throw new Error(`ended after ${this.tokenIds.length}`);
    });
    await Promise.race([more, early]);
  }

  async #follow(id: string): Promise<Ending> {
    let ending: Ending | null = null;
    for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
      ending = this.#take(entry) ?? ending;
      for (const check of [...this.#waiting]) check();
    }
    assert.ok(ending);
    return ending;
  }

  #take(entry: JournalEntry): Ending | null {
    if (entry.kind === 'end') {
      this.text += entry.text;
      this.endingCount += 1;
      return entry.ending;
    }
    assert.equal(this.tokenIds.length + entry.tokenIds.length, entry.endOffset, 'a gap, or twice');
    this.tokenIds.push(...entry.tokenIds);
    this.text += entry.texts.join('');
    return null;
  }
}

/** What the journal holds, whoever wrote it. */
async function journalOf(id: string): Promise<{ tokenIds: number[]; text: string }> {
  const entries = (await journal.entries(id, 0, 0)).filter((entry) => entry.kind === 'tokens');
  return {
    tokenIds: entries.flatMap((entry) => entry.tokenIds),
    text: entries.flatMap((entry) => entry.texts).join(''),
  };
}

/** BullMQ's count of results; it hears of an ending after the journal does. */
async function completedWhenIdle(): Promise<number> {
  const giveUpMs = performance.now() + TIMEOUT_MS;
  for (;;) {
    const { active, waiting, completed } = await queue.counts();
    if (active + waiting === 0) return completed;
    assert.ok(performance.now() < giveUpMs, 'BullMQ never heard of the ending');
  }
}

const kills = [
  ['unseeded, in the middle', randomInt(2 ** 40), 0.45],
  ['seeded, early', 7, 0.2],
  ['seeded, late', 11, 0.7],
] as const;

for (const [name, seed, fraction] of kills.slice(0, isLong ? kills.length : 1)) {
  void test(`a killed coordinator loses nothing (${name})`, async (context) => {
    const request = requestOf(seed);
    const alone = new Client(await submit(request));
    assert.equal((await alone.done).status, 'completed');
    assert.equal(alone.tokenIds.length, TOKENS);
    const finishedBefore = await completedWhenIdle();

    const id = await submit(request);
    const client = new Client(id);
    await client.hasMoreThan(Math.floor(fraction * TOKENS));
    await engine.kill();
    const shown = await journalOf(id);
    const share = shown.tokenIds.length / TOKENS;
    assert.ok(share >= 0.2 && share <= 0.8, `killed at ${share} of seed ${seed}`);

    const startMs = performance.now();
    await engine.restart();
    await client.hasMoreThan(shown.tokenIds.length);
    const waitedMs = performance.now() - startMs;
    // Of the clock, which decides nothing: a machine with much else to do takes longer.
    context.diagnostic(
      `killed at ${share}, moved again after ${waitedMs.toFixed(0)} ms (goal: ${MOVES_AGAIN_MS})`,
    );

    assert.deepEqual(await client.done, await alone.done);
    assert.deepEqual(client.tokenIds, alone.tokenIds, `seed ${seed}`);
    assert.equal(client.text, alone.text);
    assert.equal(client.endingCount, 1);
    assert.deepEqual(shown.tokenIds, client.tokenIds.slice(0, shown.tokenIds.length));
    const bytes = Buffer.from(client.text).subarray(0, Buffer.byteLength(shown.text));
    assert.equal(Buffer.compare(bytes, Buffer.from(shown.text)), 0, 'a byte-exact prefix');
    assert.deepEqual((await journalOf(id)).tokenIds, client.tokenIds);
    assert.equal(await completedWhenIdle(), finishedBefore + 1, 'one result');
  });
}
