/**
 * Pods that end under load: the jobs of an engine end, or go on elsewhere, within the grace period, and nothing is lost or
 * done twice, whatever the order of signals.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Request } from '../coordinator/request.js';
import { Store } from '../coordinator/store.js';
import { Pod, type PodEnd } from './pod.js';
import { tinyTokenizer } from './real-engine.js';
import { startRedis } from './redis-server.js';

const MODEL = 'caravan-tiny';
const TOKENS = 450;
const TIMEOUT_MS = 120_000;
const GRACE_MS = 30_000;
const terms = { priority: 100, deadlineMs: null };

const redis = await startRedis();
after(() => redis.stop());
const journal = await Journal.open(redis.url, 'patient');
const store = await Store.open(redis.url, 'patient');
const queue = new JobQueue(redis.url, MODEL);
after(async () => {
  journal.close();
  store.close();
  await queue.close();
});
const tokenizer = tinyTokenizer();

const requestOf = (seed: number): Request => ({
  version: 1,
  model: MODEL,
  promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
  sampling: { temperature: 0.8, topP: 1, topK: 0, seed },
  maxTokens: TOKENS,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
});

const pods: Pod[] = [];
async function startPod(args: readonly string[] = []): Promise<Pod> {
  const pod = await Pod.start({ redisUrl: redis.url, tp: 1, maxBatchSize: 4, args });
  pods.push(pod);
  await pod.ready;
  return pod;
}
after(async () => {
  for (const pod of pods) await pod.kill();
});

async function submit(count: number): Promise<string[]> {
  const ids = Array.from({ length: count }, newJobId);
  for (const [i, id] of ids.entries()) {
    await journal.create(id, requestOf(i), terms);
    await queue.submit(id, terms);
  }
  return ids;
}

/** Returns when every one of these jobs has more than `least` tokens. */
async function shown(ids: readonly string[], least: number): Promise<void> {
  for (const id of ids) {
    for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
      if (entry.kind === 'tokens' && entry.endOffset > least) break;
    }
  }
}

/** Token ids of every job once it has ended: without a gap, ended once, and counted once. */
async function results(ids: readonly string[]): Promise<number[][]> {
  const all = await Promise.all(
    ids.map(async (id) => {
      const tokenIds: number[] = [];
      let endings = 0;
      for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
        if (entry.kind === 'tokens') {
          assert.equal(tokenIds.length + entry.tokenIds.length, entry.endOffset, 'gap, or twice');
          tokenIds.push(...entry.tokenIds);
        } else {
          endings += 1;
          assert.equal(entry.ending.status, 'completed');
        }
      }
      assert.equal(endings, 1);
      assert.equal(tokenIds.length, TOKENS);
      return tokenIds;
    }),
  );
  return all;
}

/** What one engine that nobody disturbs gives, by seed. */
const undisturbed: number[][] = [];

/** Of one drain the engine that goes on is the one that the next is told to end. */
let pod = await startPod();

void test('SIGTERM to all processes of a Pod at once: its jobs end first', async (context) => {
  const alone = await submit(4);
  undisturbed.push(...(await results(alone)));
  const running = await submit(4);
  await shown(running, 20);
  const waiting = await submit(2);
  const end = await pod.terminate(GRACE_MS, 'ranks first');
  context.diagnostic(`it ended after ${end.seconds.toFixed(1)} s`);
  assertEnded(end);
  assert.deepEqual(await results(running), undisturbed, 'they ended here');
  for (const id of waiting) assert.equal((await journal.job(id))?.status, 'waiting');
  assert.deepEqual(await store.engines(), []);
  pod = await startPod();
  assert.deepEqual(await results(waiting), undisturbed.slice(0, 2));
});

function assertEnded(end: PodEnd): void {
  assert.deepEqual(end.codes, [0, 0], 'nobody had to be killed');
}

/** How a Pod with running jobs is ended, and what its successor is told, for the next of these. */
const ways: readonly (readonly [string, readonly string[], (pod: Pod) => Promise<void>])[] = [
  [
    'a second SIGTERM',
    [],
    async (own) => {
      const ending = own.terminate(GRACE_MS);
      // Two signals that come too close are one.
      while ((await store.engines()).some((engine) => engine.isDraining !== true));
      own.coordinator.kill('SIGTERM');
      assertEnded(await ending);
    },
  ],
  [
    'a SIGKILL in the middle of draining',
    ['--drain-timeout', '0.2'],
    async (own) => {
      assert.ok((await own.terminate(10)).codes.includes(null));
    },
  ],
  [
    'what is left after the drain timeout',
    [],
    async (own) => {
      assertEnded(await own.terminate(GRACE_MS));
    },
  ],
];

for (const [name, successorArgs, disturb] of ways) {
  void test(`${name} goes on in another engine, from its next token`, async () => {
    const ids = await submit(4);
    await shown(ids, 40);
    await disturb(pod);
    const before = await Promise.all(ids.map((id) => journal.job(id)));
    assert.ok(
      before.some((job) => job?.status !== 'completed'),
      'something was left to do',
    );
    pod = await startPod(successorArgs);
    assert.deepEqual(await results(ids), undisturbed);
  });
}

void test('a group that loads can be ended at once', async () => {
  const loading = await Pod.start({ redisUrl: redis.url, tp: 1, maxBatchSize: 4 });
  pods.push(loading);
  // Ranks are there, the coordinator may be anywhere on its way.
  const end = await loading.terminate(GRACE_MS);
  assert.ok(end.seconds < GRACE_MS / 1000);
});
