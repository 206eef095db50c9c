/**
 * Two coordinators hold the same job: one is frozen until its locks are lost and another has its jobs, then it goes
 * on; or their locks are torn from engines that run. Redis itself (MONITOR) tells what each of them could write: the
 * loser nothing.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { Journal, newJobId } from '../coordinator/journal.js';
import { queueName } from '../coordinator/queue-connection.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Request } from '../coordinator/request.js';
import { startEngine, tinyTokenizer } from './real-engine.js';
import { monitorRedis } from './redis-monitor.js';
import { startRedis } from './redis-server.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const JOBS = 4;
const TOKENS = isLong ? 440 : 250;
const TP = isLong ? 2 : 1;
/** How often all locks are torn away while the jobs run. */
const ROUNDS = isLong ? 4 : 0;
const TIMEOUT_MS = 120_000;
/** Jobs of a frozen engine move sooner. */
const args = ['--job-lock', '3'];
const terms = { priority: 100, deadlineMs: null };

const redis = await startRedis();
after(() => redis.stop());
const raw = new Redis(redis.url);
after(() => {
  raw.disconnect();
});
const [one, other] = await Promise.all([
  startEngine(redis.url, { tp: TP, maxBatchSize: 2 * JOBS, args }),
  startEngine(redis.url, { tp: TP, maxBatchSize: 2 * JOBS, args }),
]);
after(() => Promise.all([one.stop(), other.stop()]));
const { model } = one;
const journal = await Journal.open(redis.url, 'patient');
after(() => {
  journal.close();
});
const queue = new JobQueue(redis.url, model);
after(() => queue.close());
const tokenizer = tinyTokenizer();

/** Every other job has two answers. */
const requestOf = (i: number): Request => ({
  version: 1,
  model,
  promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
  sampling: { temperature: 0.8, topP: 1, topK: 0, seed: 100 + i },
  maxTokens: TOKENS,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
  n: 1 + (i % 2),
});

async function submitAll(): Promise<string[]> {
  const ids: string[] = [];
  for (let i = 0; i < JOBS; i += 1) {
    const id = newJobId();
    await journal.create(id, requestOf(i), terms);
    await queue.submit(id, terms);
    ids.push(id);
  }
  return ids;
}

/** What a client sees of a job: tokens and text of each sequence, and how it ended. */
async function follow(id: string, count: number): Promise<unknown> {
  const tokenIds = Array.from({ length: count }, () => [] as number[]);
  const texts = Array<string>(count).fill('');
  const offsets = Array<number>(count).fill(0);
  const signal = AbortSignal.timeout(TIMEOUT_MS);
  for await (const { index, entry } of journal.readAll(id, offsets, signal)) {
    if (entry.kind === 'end') return { tokenIds, texts, ending: entry.ending, held: entry.text };
    if (entry.kind === 'tokens') {
      tokenIds[index]!.push(...entry.tokenIds);
      texts[index]! += entry.texts.join('');
      assert.equal(tokenIds[index]!.length, entry.endOffset, 'a gap, or twice');
    } else texts[index]! += entry.text;
  }
  return null;
}

const followAll = (ids: readonly string[]): Promise<unknown[]> =>
  Promise.all(ids.map((id, i) => follow(id, requestOf(i).n!)));

/** What every script of a take came to, in Redis's own order. */
class Watch {
  /** Of each job, the fences of its takes. */
  readonly #fences = new Map<string, string[]>();
  /** Scripts that came with the fence of a take that was not the latest, and what they wrote. */
  loserCalls = 0;
  readonly loserWrites: string[] = [];
  readonly endings = new Map<string, number>();
  /** What Redis was last asked to echo. */
  echoed = '';
  #script: { readonly id: string; readonly fence: string | undefined } | null = null;

  take(args: readonly string[], source: string): void {
    if (source !== 'lua') {
      const [name, echo, keyCount, job] = args;
      if (/^echo$/i.test(name ?? '')) this.echoed = echo ?? '';
      const id = /^caravan:\{(.*)\}:job$/.exec(job ?? '')?.[1];
      this.#script =
        /^eval(sha)?$/i.test(name ?? '') && id !== undefined
          ? { id, fence: args[3 + Number(keyCount)] }
          : null;
      if (this.#script !== null && this.#isLosers(this.#script)) this.loserCalls += 1;
      return;
    }
    if (this.#script === null) return;
    const { id, fence } = this.#script;
    const [name, key, ...rest] = args;
    if (name === 'HSET' && rest[0] === 'fence' && rest[2] === 'status') {
      const fences = this.#fences.get(id) ?? [];
      this.#fences.set(id, [...fences, rest[1]!]);
    }
    if (name === 'XADD' || name === 'HSET') {
      if (name === 'XADD' && key === `caravan:{${id}}:journal:0` && rest[1] === 'ending') {
        this.endings.set(id, (this.endings.get(id) ?? 0) + 1);
      }
      if (this.#isLosers(this.#script)) this.loserWrites.push(`${fence ?? ''} ${args.join(' ')}`);
    }
  }

  takes(id: string): number {
    return this.#fences.get(id)?.length ?? 0;
  }

  #isLosers({ id, fence }: { id: string; fence: string | undefined }): boolean {
    const fences = this.#fences.get(id) ?? [];
    return fences.slice(0, -1).includes(fence ?? '');
  }
}

async function until(isSo: () => boolean | Promise<boolean>, what: string): Promise<void> {
  const giveUpMs = performance.now() + TIMEOUT_MS;
  while (!(await isSo())) {
    assert.ok(performance.now() < giveUpMs, what);
    await turn();
  }
}

const tokensOf = async (id: string): Promise<number> =>
  (await journal.entries(id, 0, 0)).at(-1)?.endOffset ?? 0;

void test('two coordinators hold the same jobs: one result each, the loser writes nothing', async (context) => {
  const watch = new Watch();
  const unwatch = await monitorRedis(redis.port, (args, source) => {
    watch.take(args, source);
  });
  try {
    // Undisturbed first.
    const expected = await followAll(await submitAll());
    assert.equal(watch.loserCalls, 0);

    // The other engine is away while the first takes all of them, and is back before that is frozen.
    await other.kill();
    const ids = await submitAll();
    const followed = followAll(ids);
    await until(async () => (await tokensOf(ids.at(-1)!)) > 20, 'no tokens came');
    one.coordinator.kill('SIGSTOP');
    await other.restart();
    await until(() => ids.every((id) => watch.takes(id) === 2), 'the jobs were not taken over');
    one.coordinator.kill('SIGCONT');
    await until(() => watch.loserCalls >= JOBS, 'the loser tried nothing');
    assert.deepEqual(await followed, expected);
    const frozenCalls = watch.loserCalls;

    // Both run now, and again and again lose their locks to each other.
    let takes = 0;
    for (let round = 0; round < ROUNDS; round += 1) {
      const torn = await submitAll();
      const seen = followAll(torn);
      await until(async () => (await tokensOf(torn.at(-1)!)) > 5, 'no tokens came');
      for (const id of torn) await raw.del(`bull:${queueName(model)}:${id}:lock`);
      assert.deepEqual(await seen, expected);
      takes += torn.reduce((sum, id) => sum + watch.takes(id), 0);
      ids.push(...torn);
    }
    if (ROUNDS > 0) assert.ok(takes > JOBS * ROUNDS, 'some were taken twice');
    // Clients may have heard of an ending before the watch has: what comes before an echo has been told with it.
    await raw.echo('all told');
    await until(() => watch.echoed === 'all told', 'Redis tells nothing');
    context.diagnostic(
      `calls of losers: ${frozenCalls} after the freeze, ${watch.loserCalls - frozenCalls} after ` +
        `${takes - JOBS * ROUNDS} torn locks; written by them: ${watch.loserWrites.length}`,
    );
    assert.deepEqual(watch.loserWrites, []);
    for (const id of ids) assert.equal(watch.endings.get(id), 1, 'one ending');
    await until(async () => {
      const { active, waiting } = await queue.counts();
      return active + waiting === 0;
    }, 'BullMQ has jobs left');
    const { completed, failed } = await queue.counts();
    assert.deepEqual([completed, failed], [ids.length + JOBS, 0], 'one result each');
  } finally {
    unwatch();
  }
});
