/**
 * What the queue adds: submits a second, the time from a submit to its engine's start, and what a job that has ended
 * costs Redis.
 *
 *   node dist/test/bench/queue-latency.js [--jobs 10000] [--paced 2500] [--rate 50] [--engines 1] [--slots 16]
 *
 * Real are Redis (AOF everysec), the intake, the journal, the order, BullMQ and the code that takes, runs and ends jobs;
 * only the engine is a stand-in, in a process of its own, that knows its tokens at once. The latency is measured with
 * free slots: what it says is what the queue adds.
 */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { setImmediate as turn, setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import { Redis } from 'ioredis';
import { Answers } from '../../coordinator/answers.js';
import type { Engine, SequenceHandle, SequenceSink } from '../../coordinator/engine.js';
import { Intake } from '../../coordinator/intake.js';
import { JobRunner } from '../../coordinator/job-runner.js';
import { Journal, newJobId } from '../../coordinator/journal.js';
import { GatewayMetrics } from '../../coordinator/metrics.js';
import { JobQueue } from '../../coordinator/queue.js';
import { JobTaker } from '../../coordinator/queue-taker.js';
import type { Request } from '../../coordinator/request.js';
import { Store } from '../../coordinator/store.js';
import { startRedis } from '../redis-server.js';

const { values } = parseArgs({
  options: {
    jobs: { type: 'string', default: '10000' },
    paced: { type: 'string', default: '2500' },
    rate: { type: 'string', default: '50' },
    engines: { type: 'string', default: '1' },
    slots: { type: 'string', default: '16' },
    submitters: { type: 'string', default: '32' },
    engine: { type: 'string' },
  },
});
const MODEL = 'bench';
const PROMPT_TOKENS = 64;
const OUTPUT_TOKENS = 8;
const ignore = (): void => undefined;
const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};
/** The same in all processes of this machine, in milliseconds. */
const clockMs = (): number => performance.timeOrigin + performance.now();

/** An engine that needs no time: its tokens are there a turn of the event loop later. */
class InstantEngine implements Engine {
  readonly hasEnded = false;
  freeSlotCount: number;
  readonly starts: (readonly [id: string, atMs: number])[] = [];

  constructor(slotCount: number) {
    this.freeSlotCount = slotCount;
  }

  add(spec: { readonly id: string }, sink: SequenceSink): SequenceHandle {
    this.starts.push([spec.id, clockMs()]);
    this.freeSlotCount -= 1;
    let isOver = false;
    const leave = (): void => {
      if (!isOver) this.freeSlotCount += 1;
      isOver = true;
    };
    void turn().then(() => {
      if (isOver) return;
      for (let i = 0; i < OUTPUT_TOKENS; i += 1) sink.token(300 + i, ' word');
      leave();
      sink.end('length', '');
    });
    return { cancel: leave };
  }

  run(): Promise<void> {
    return Promise.reject(new Error('it has no steps'));
  }
}

/** The process of an engine: it tells its starts, twenty times a second. */
async function runEngine(url: string): Promise<void> {
  const engine = new InstantEngine(Number(values.slots));
  const journal = await Journal.open(url, 'patient');
  const taker = new JobTaker(url, MODEL, ignore);
  const log = { info: ignore, warn: ignore };
  const runner = new JobRunner(engine, journal, taker, `engine ${process.pid}`, log);
  setInterval(() => {
    if (engine.starts.length > 0) process.send!(engine.starts.splice(0));
  }, 50);
  process.send!('ready');
  const never = new AbortController().signal;
  await runner.run(never, never);
}

const quantile = (sorted: readonly number[], share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] ?? NaN;

async function measure(): Promise<void> {
  const redis = await startRedis();
  const raw = new Redis(redis.url);
  const store = await Store.open(redis.url, 'impatient');
  const journal = await Journal.open(redis.url, 'impatient');
  const rules = {
    admission: 'estimate',
    maxQueuedJobs: 1_000_000,
    maxQueuedTokens: 1_000_000_000,
    retentionS: 24 * 3600,
  } as const;
  const intake = new Intake(store, rules);
  const answers = new Answers(redis.url, journal, new GatewayMetrics(), ignore, { intake });
  const queue = new JobQueue(redis.url, MODEL);
  const tenant = {
    ...{ name: 'default', weight: 1, maxJobs: null, maxQueuedTokens: null },
    ...{ requestsPerMinute: null, mostUrgent: 1 },
  };
  const request: Request = {
    version: 1,
    model: MODEL,
    promptTokenIds: Array.from({ length: PROMPT_TOKENS }, (_, i) => 1000 + i),
    sampling: { temperature: 0.8, topP: 1, topK: 0, seed: 1 },
    maxTokens: OUTPUT_TOKENS,
    stop: [],
    ignoreEos: true,
    isTextStart: false,
  };
  const terms = { priority: 100, deadlineMs: null };
  const submit = (id: string): Promise<unknown> => answers.submit({ request, terms }, id, tenant);
  const usedBytes = async (): Promise<number> =>
    Number(/^used_memory:(\d+)/m.exec(await raw.info('memory'))![1]);
  const starts = new Map<string, number>();
  const startEngines = async (): Promise<(() => void)[]> =>
    Promise.all(
      Array.from({ length: Number(values.engines) }, async () => {
        const child = fork(fileURLToPath(import.meta.url), [
          ...['--engine', redis.url, '--slots', values.slots],
        ]);
        child.on('message', (message) => {
          if (message === 'ready') return;
          for (const [id, atMs] of message as [string, number][]) starts.set(id, atMs);
        });
        await once(child, 'message');
        return () => child.kill('SIGKILL');
      }),
    );
  const drained = async (count: number): Promise<void> => {
    while ((await queue.counts()).completed < count) await delay(20);
  };
  const [jobs, paced, rate] = [Number(values.jobs), Number(values.paced), Number(values.rate)];
  try {
    // Connections, scripts and compiled code first.
    for (let i = 0; i < 200; i += 1) await submit(newJobId());
    const engines = await startEngines();
    await drained(200);

    const latencies: number[] = [];
    const submits: number[] = [];
    const due: [string, number][] = [];
    const firstMs = clockMs();
    const pending: Promise<unknown>[] = [];
    for (let i = 0; i < paced; i += 1) {
      const waitMs = firstMs + (1000 * i) / rate - clockMs();
      if (waitMs > 0) await delay(waitMs);
      const id = newJobId();
      const startMs = clockMs();
      due.push([id, startMs]);
      pending.push(submit(id).then(() => submits.push(clockMs() - startMs)));
    }
    await Promise.all(pending);
    while (due.some(([id]) => !starts.has(id))) await delay(20);
    for (const [id, startMs] of due) latencies.push(starts.get(id)! - startMs);
    latencies.sort((a, b) => a - b);
    submits.sort((a, b) => a - b);
    const show = (sorted: readonly number[]): string =>
      [0.5, 0.9, 0.99, 1].map((share) => quantile(sorted, share).toFixed(1)).join(', ');
    print(`${paced} jobs at ${rate}/s, ms from the submit to the engine's start`);
    print(`  p50, p90, p99, most: ${show(latencies)}; of that the submit itself: ${show(submits)}`);
    await drained(Math.min(10_000, 200 + paced));

    for (const stop of engines) stop();
    const beforeBytes = await usedBytes();
    const startMs = clockMs();
    const startCpu = process.cpuUsage();
    let next = 0;
    const work = async (): Promise<void> => {
      while (next < jobs) {
        next += 1;
        await submit(newJobId());
      }
    };
    await Promise.all(Array.from({ length: Number(values.submitters) }, work));
    const seconds = (clockMs() - startMs) / 1000;
    const { user, system } = process.cpuUsage(startCpu);
    const cpuMs = ((user + system) / 1000 / jobs).toFixed(2);
    print(
      `${jobs} submits in ${seconds.toFixed(1)} s: ${(jobs / seconds).toFixed(0)}/s, ${cpuMs} ms of processor time each`,
    );
    const queuedBytes = await usedBytes();
    const perJob = (bytes: number): string => (bytes / jobs / 1024).toFixed(2);
    print(`Redis memory: ${perJob(queuedBytes - beforeBytes)} KB a job that waits`);

    const drainMs = clockMs();
    const others = await startEngines();
    for (;;) {
      const { waiting, active } = await queue.counts();
      if (waiting + active === 0) break;
      await delay(50);
    }
    const drainS = (clockMs() - drainMs) / 1000;
    for (const stop of others) stop();
    print(`taken and ended in ${drainS.toFixed(1)} s: ${(jobs / drainS).toFixed(0)}/s`);
    await printMemory(raw, jobs + paced + 200);
  } finally {
    await answers.close();
    await queue.close();
    journal.close();
    store.close();
    raw.disconnect();
    await redis.stop();
  }
}

/** What jobs that have ended cost, by kinds of keys. */
async function printMemory(raw: Redis, jobs: number): Promise<void> {
  const kinds = new Map<string, { keys: number; bytes: number }>();
  for (let cursor = '0'; ;) {
    const [next, keys] = await raw.scan(cursor, 'COUNT', 1000);
    const pipeline = raw.pipeline();
    for (const key of keys) pipeline.call('MEMORY', 'USAGE', key, 'SAMPLES', '0');
    for (const [i, [, bytes]] of ((await pipeline.exec()) ?? []).entries()) {
      const kind = keys[i]!.replace(/job_[\w-]+/, 'ID');
      const known = kinds.get(kind) ?? { keys: 0, bytes: 0 };
      kinds.set(kind, { keys: known.keys + 1, bytes: known.bytes + Number(bytes) });
    }
    if (next === '0') break;
    cursor = next;
  }
  const total = [...kinds.values()].reduce((sum, { bytes }) => sum + bytes, 0);
  print(`${jobs} jobs have ended: ${(total / jobs / 1024).toFixed(2)} KB of Redis each, in`);
  const largest = [...kinds].sort(([, a], [, b]) => b.bytes - a.bytes).slice(0, 8);
  for (const [kind, { keys, bytes }] of largest) {
    print(`  ${kind}: ${keys} keys, ${(bytes / 1024).toFixed(0)} KB`);
  }
}

await (values.engine === undefined ? measure() : runEngine(values.engine));
