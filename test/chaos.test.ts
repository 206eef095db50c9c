/**
 * Everything dies, again and again, at random: Redis, coordinators, ranks and gateways, by kill -9 in the middle of
 * generations. Every job ends once, with the text of the undisturbed run, and no client sees a gap or a token twice.
 * `CHAOS_SEED` gives another run. The long form has 100 jobs and 24 kills; `CHAOS_JOBS=500 CHAOS_KILLS=14` with it makes
 * them 500 and 56 (docs/jobs.md).
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import { idempotencyKeyOf } from '../coordinator/idempotency-key.js';
import { JobQueue } from '../coordinator/queue.js';
import { ChaosClient, type ChaosAnswer, type ClientFigures } from './chaos-client.js';
import { chaosJobs, jobKinds, type ChaosJob } from './chaos-jobs.js';
import { ChaosWorld, until, victimKinds, type LogLine, type VictimKind } from './chaos-world.js';
import { Random } from './random.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const SEED = Number(process.env['CHAOS_SEED'] ?? 1);
const JOBS = Number(process.env['CHAOS_JOBS'] ?? (isLong ? 100 : 24));
const KILLS_OF_A_KIND = Number(process.env['CHAOS_KILLS'] ?? (isLong ? 6 : 2));
const TOKENS = isLong ? 160 : 180;
const TP = isLong ? 2 : 1;
const CLIENTS = isLong ? 40 : 20;
/** Jobs that are to be in the middle when something is killed, and how long that is waited for. */
const IN_THE_MIDDLE = 4;
const MIDDLE_WAIT_MS = 30_000;
/** Of an engine. Few in the short form: jobs that all fit would all run, and end, at the same time. */
const SLOTS = isLong ? 12 : 5;
const TIMEOUT_MS = isLong ? Math.max(1_500_000, 6_000 * JOBS) : 180_000;

/** What coordinators said of takes, by the job's id. */
interface Takes {
  count: number;
  /** How the last holder left the job; null when it said nothing. */
  lastOutcome: string | null;
}

const takes = new Map<string, Takes>();
const kindOfJob = new Map<string, string>();
/** Resumes with tokens, by the job's kind, and by what had become of the take before. */
const resumes: Record<string, number> = {};
const causes: Record<string, number> = {};

function hear({ msg, job, resumed, outcome }: LogLine): void {
  if (job === undefined) return;
  const known = takes.get(job) ?? { count: 0, lastOutcome: null };
  takes.set(job, known);
  if (msg === 'job left') known.lastOutcome = outcome ?? null;
  if (msg !== 'job taken') return;
  if (known.count > 0) {
    const cause = known.lastOutcome ?? 'its coordinator was gone';
    causes[cause] = (causes[cause] ?? 0) + 1;
    const kind = `${kindOfJob.get(job) ?? 'other'}${resumed === 0 ? ' (no token yet)' : ''}`;
    resumes[kind] = (resumes[kind] ?? 0) + 1;
  }
  known.count += 1;
  known.lastOutcome = null;
}

const world = await ChaosWorld.start(
  // Jobs move sooner in the short form: there are few, and the last ones would wait for locks.
  { engines: 2, gateways: 2, tp: TP, maxBatchSize: SLOTS, more: isLong ? [] : ['--job-lock', '2'] },
  hear,
);
after(() => world.stop());
const jobs = chaosJobs(JOBS, SEED, TOKENS);

const figures: ClientFigures = {
  reconnects: { 'asked again': 0, 'stream resumed': 0 },
  refusals: {},
};

interface Run {
  readonly clients: readonly ChaosClient[];
  readonly answers: Promise<ChaosAnswer[]>;
  doneCount: number;
}

/** The name that jobs of a run have for the gateway. */
const keyOf = (run: string, { number }: ChaosJob): string => `${run} ${SEED} ${number}`;

const idOf = (run: string, job: ChaosJob): string => {
  const { route, body, isStream } = job;
  return idempotencyKeyOf(keyOf(run, job), ['default', ''], route, { ...body, stream: isStream })!
    .jobId;
};

/** All jobs, so many at a time. */
function runAll(name: string): Run {
  const clients = jobs.map(
    (job) => new ChaosClient(job, keyOf(name, job), () => world.urls, figures),
  );
  const answers: ChaosAnswer[] = [];
  let next = 0;
  const run = { clients, doneCount: 0 };
  const work = async (): Promise<void> => {
    while (next < clients.length) {
      const number = next;
      next += 1;
      answers[number] = await clients[number]!.run();
      run.doneCount += 1;
    }
  };
  const all = Promise.all(Array.from({ length: CLIENTS }, work)).then(() => answers);
  all.catch(() => undefined);
  return Object.assign(run, { answers: all });
}

void test(
  `${JOBS} jobs outlive ${4 * KILLS_OF_A_KIND} deaths`,
  { timeout: TIMEOUT_MS },
  async (context) => {
    const startMs = performance.now();
    const expected = await runAll('calm').answers;
    assert.deepEqual(figures, {
      reconnects: { 'asked again': 0, 'stream resumed': 0 },
      refusals: {},
    });
    const calmMs = performance.now() - startMs;

    for (const job of jobs) kindOfJob.set(idOf('chaos', job), job.kind);
    const random = new Random(SEED);
    const order = victimKinds
      .flatMap((kind) => Array<VictimKind>(KILLS_OF_A_KIND).fill(kind))
      .map((kind) => ({ kind, at: random.next() }))
      .sort((a, b) => a.at - b.at);
    const run = runAll('chaos');
    let failure: unknown = null;
    run.answers.catch((error: unknown) => (failure = error));
    const middles: number[] = [];
    const killed: Record<string, number> = {};
    for (const [i, { kind }] of order.entries()) {
      // Spread over the jobs: each death finds others in the middle.
      const share = (JOBS * (i + 0.5)) / (order.length + 4);
      await until(() => run.doneCount >= share || failure !== null, TIMEOUT_MS, 'jobs end');
      if (failure !== null) break;
      const inTheMiddle = (): number => run.clients.filter((client) => client.isInTheMiddle).length;
      const isHopeless = (): boolean => JOBS - run.doneCount < IN_THE_MIDDLE;
      const isTime = (): boolean => inTheMiddle() >= IN_THE_MIDDLE || isHopeless();
      await until(isTime, MIDDLE_WAIT_MS, '').catch(() => undefined);
      middles.push(inTheMiddle());
      await world.kill(kind, (count) => random.below(count));
      killed[kind] = (killed[kind] ?? 0) + 1;
    }
    const answers = await run.answers;
    const chaosMs = performance.now() - startMs - calmMs;

    const seconds = (ms: number): string => (ms / 1000).toFixed(0);
    const well = middles.filter((count) => count >= IN_THE_MIDDLE).length;
    const show = (counts: object): string => JSON.stringify(counts).replaceAll('"', '');
    context.diagnostic(
      `seed ${SEED}: ${JOBS} jobs, undisturbed in ${seconds(calmMs)} s, with ${order.length} deaths in ` +
        `${seconds(chaosMs)} s: ${show(killed)}; ${well} of them with ${IN_THE_MIDDLE} jobs or more in the middle`,
    );
    context.diagnostic(`resumes by kind of job: ${show(resumes)}`);
    context.diagnostic(`resumes by what became of the take before: ${show(causes)}`);
    context.diagnostic(`clients: ${show(figures.reconnects)}, refusals ${show(figures.refusals)}`);
    assert.ok(well >= 0.7 * order.length, `${well} of ${order.length}`);

    for (const [number, answer] of answers.entries()) {
      assert.deepEqual(answer, expected[number], `job ${number} (${jobs[number]!.kind})`);
    }
    await checkEndings(['calm', 'chaos']);
    const lengths = answers.flat().map(({ text }) => text.length);
    assert.ok(lengths.reduce((a, b) => a + b, 0) > 50 * JOBS, 'they are no empty texts');
    for (const kind of jobKinds) assert.ok(answers.some((_, i) => jobs[i]!.kind === kind));
  },
);

/** In Redis every job has one ending, and there are no others. */
async function checkEndings(runs: readonly string[]): Promise<void> {
  const redis = new Redis(world.redis.url);
  try {
    const ids = new Set(runs.flatMap((run) => jobs.map((job) => idOf(run, job))));
    const keys = await redis.keys('caravan:{job_*}:job');
    assert.equal(keys.length, ids.size, 'no job was written down twice');
    for (const key of keys) {
      const id = /\{(.*)\}/.exec(key)![1]!;
      assert.ok(ids.has(id));
      assert.equal(await redis.hget(key, 'status'), 'completed', id);
      const entries = await redis.xrange(key.replace(/job$/, 'journal:0'), '-', '+');
      const endings = entries.filter(([, fields]) => fields[0] === 'ending');
      assert.equal(endings.length, 1, `${id} has one ending`);
    }
    const queue = new JobQueue(world.redis.url, 'caravan-tiny');
    const giveUpMs = performance.now() + 30_000;
    for (;;) {
      const { active, waiting } = await queue.counts();
      if (active + waiting === 0) break;
      assert.ok(performance.now() < giveUpMs, `BullMQ has ${active} active, ${waiting} waiting`);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    await queue.close();
  } finally {
    redis.disconnect();
  }
}
