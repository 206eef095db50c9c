/**
 * A job that its engine dies of: suspected twice it runs alone, and when the engine dies even then it is dead, and the
 * others complete. The test is the poison: it kills the rank whenever it sees that the job has been taken.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Ending, Request } from '../coordinator/request.js';
import { ChaosWorld, type LogLine } from './chaos-world.js';
import { runCli, runCliJson } from './cli.js';
import { tinyTokenizer } from './real-engine.js';
import { monitorRedis } from './redis-monitor.js';

const TIMEOUT_MS = 90_000;
const terms = { priority: 100, deadlineMs: null };
const MODEL = 'caravan-tiny';

/** What the coordinator said of jobs, in order. */
const said: LogLine[] = [];
const world = await ChaosWorld.start(
  { engines: 1, gateways: 0, tp: 1, maxBatchSize: 4 },
  (line) => {
    if (line.job !== undefined) said.push(line);
  },
);
after(() => world.stop());
const redis = ['--redis', world.redis.url];
const journal = await Journal.open(world.redis.url, 'patient');
const queue = new JobQueue(world.redis.url, MODEL);
after(async () => {
  await queue.close();
  journal.close();
});
const tokenizer = tinyTokenizer();

async function submit(promptTokens: number, maxTokens: number): Promise<string> {
  const request: Request = {
    version: 1,
    model: MODEL,
    promptTokenIds: [tokenizer.bosTokenId, ...Array<number>(promptTokens - 1).fill(300)],
    sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    maxTokens,
    stop: [],
    ignoreEos: true,
    isTextStart: false,
  };
  const id = newJobId();
  await journal.create(id, request, terms);
  await queue.submit(id, terms);
  return id;
}

async function endingOf(id: string): Promise<{ ending: Ending; tokens: number }> {
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
    if (entry.kind === 'end') return { ending: entry.ending, tokens: entry.endOffset };
  }
  throw new Error('no ending');
}

void test('a job that its engine dies of ends as dead, alone, and can be retried', async () => {
  const innocents = [await submit(4, 400), await submit(5, 400)];
  // Long enough that no token comes before the rank is dead.
  const poison = await submit(480, 8);
  const jobField = `caravan:{${poison}}:job`;
  let kills = 0;
  const alone = new Set<string>();
  let isPoisonous = true;
  const kill = (): void => {
    kills += 1;
    void world.kill('rank', () => 0);
  };
  const unwatch = await monitorRedis(world.redis.port, ([name, key, ...rest], source) => {
    if (!isPoisonous || source !== 'lua' || name !== 'HSET' || key !== jobField) return;
    const isTake = rest[0] === 'fence' && rest.includes('engine');
    if (isTake && kills < 2) kill();
    // Alone it is let begin its first step, each time.
    const [field, fence, , step] = rest;
    if (field === 'alone' && step?.startsWith('prefill') === true && !alone.has(fence!)) {
      alone.add(fence!);
      kill();
    }
  });

  const { ending, tokens } = await endingOf(poison);
  isPoisonous = false;
  unwatch();
  assert.equal(kills, 4);
  assert.equal(tokens, 0);
  assert.ok(ending.status === 'failed');
  assert.equal(ending.code, 'poisonous');
  assert.match(
    ending.message,
    /^4 engines died of it, the last two while it ran alone, in the prefill of positions \d+ to \d+ of sequence 0, after 0 tokens$/,
  );
  for (const id of innocents) {
    const { ending: own, tokens: count } = await endingOf(id);
    assert.equal(own.status, 'completed');
    assert.equal(count, 400);
  }
  // The others had left when it ran alone: they were taken twice more at most, and not by the last deaths.
  const taken = said.filter(({ msg }) => msg === 'job taken').map(({ job }) => job);
  assert.equal(taken.filter((id) => id === poison).length, 5);
  for (const id of innocents) assert.ok(taken.filter((each) => each === id).length <= 3);
  const ended = said.filter(({ msg, outcome }) => msg === 'job left' && outcome === 'completed');
  const thirdLeave = said.filter(({ msg, job }) => msg === 'job left' && job === poison)[2]!;
  for (const each of ended)
    assert.ok(said.indexOf(each) < said.indexOf(thirdLeave), 'drained first');

  const { stdout } = await runCli(['jobs', '--dead', ...redis]);
  assert.match(stdout, new RegExp(`^${poison}  ${MODEL} .* in the prefill of `, 'm'));
  assert.equal(stdout.trim().split('\n').length, 1);
  const retry = (await runCliJson(['jobs', 'retry', poison, ...redis])) as { id: string };
  assert.notEqual(retry.id, poison);
  assert.equal((await endingOf(retry.id)).ending.status, 'completed');
  assert.equal((await runCli(['jobs', '--dead', ...redis])).stdout, '');
  const nothing = await runCli(['jobs', 'retry', retry.id, ...redis]);
  assert.equal(nothing.code, 2);
  assert.match(nothing.stderr, /is completed: there is nothing to retry/);
});
