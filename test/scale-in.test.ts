/** Who goes first when engines are taken away: idle ones, by deletion cost or because low ordinals had the work. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import https from 'node:https';
import type { AddressInfo } from 'node:net';
import path from 'node:path';
import { after, test } from 'node:test';
import { EngineHealth, type EngineLoad } from '../coordinator/engine-health.js';
import { Journal, newJobId } from '../coordinator/journal.js';
import { deletionCost, PodDeletionCost, podIdentity } from '../coordinator/pod-deletion-cost.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { EngineBeat } from '../coordinator/store.js';
import { takeDelayMs } from '../coordinator/take-order.js';
import { Authority } from './certificates.js';
import { Pod } from './pod.js';
import { startRedis } from './redis-server.js';

const size = { tp: 1, slots: 8, kvPositions: 8 * 512 };
const idle: EngineLoad = { sequences: 0, slotsUsed: 0, kvPositionsUsed: 0, unmovedMs: 0 };

const authority = new Authority();
after(() => {
  authority.remove();
});

interface Patch {
  readonly url: string;
  readonly method: string;
  readonly headers: Readonly<Record<string, string | string[] | undefined>>;
  readonly cost: string;
}

/** An API server that knows one Pod; it hears and remembers patches. */
async function startApi(pod: string): Promise<{
  readonly port: number;
  readonly patches: Patch[];
  readonly next: () => Promise<Patch>;
  refuse: boolean;
}> {
  const { certPath, keyPath } = authority.leaf('api');
  const patches: Patch[] = [];
  const waiting: ((patch: Patch) => void)[] = [];
  const api = { refuse: false };
  const server = https.createServer(
    { cert: fs.readFileSync(certPath), key: fs.readFileSync(keyPath) },
    (request, response) => {
      let body = '';
      request.on('data', (chunk: Buffer) => (body += chunk.toString()));
      request.on('end', () => {
        const { url = '', method = '', headers } = request;
        const isKnown = url === `/api/v1/namespaces/models/pods/${pod}`;
        const isAllowed = headers.authorization === 'Bearer secret-token' && !api.refuse;
        response.writeHead(isAllowed ? (isKnown ? 200 : 404) : 403).end('{}');
        const { metadata } = JSON.parse(body) as {
          metadata: { annotations: Record<string, string> };
        };
        const cost = metadata.annotations['controller.kubernetes.io/pod-deletion-cost']!;
        const patch = { url, method, headers, cost };
        if (response.statusCode === 200) patches.push(patch);
        waiting.shift()?.(patch);
      });
    },
  );
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  after(() => {
    server.closeAllConnections();
    server.close();
  });
  const next = (): Promise<Patch> => new Promise((resolve) => waiting.push(resolve));
  return Object.assign(api, { port: (server.address() as AddressInfo).port, patches, next });
}

function accountFolder(): string {
  const folder = fs.mkdtempSync(path.join(authority.folder, 'account-'));
  fs.writeFileSync(path.join(folder, 'token'), 'secret-token\n');
  fs.writeFileSync(path.join(folder, 'namespace'), 'models');
  fs.copyFileSync(authority.caPath, path.join(folder, 'ca.crt'));
  return folder;
}

void test('a group that loads is the dearest, an idle one the cheapest but for one that drains', () => {
  const health = new EngineHealth(size, 1000);
  const waiting = deletionCost(health);
  let load = idle;
  health.serve(() => load);
  assert.equal(deletionCost(health), 0);
  load = { ...idle, sequences: 1 };
  const busy = deletionCost(health);
  load = { ...idle, sequences: 7 };
  const busier = deletionCost(health);
  assert.ok(0 < busy && busy < busier && busier < waiting);
  health.drain();
  assert.ok(deletionCost(health) < 0);
});

void test(
  'the cost is told to the API server when it changes, and again when that refused',
  { timeout: 90_000 },
  async () => {
    const api = await startApi('engine-7f-abc');
    const health = new EngineHealth(size, 1000);
    let load = idle;
    const env = {
      ...{ KUBERNETES_SERVICE_HOST: '127.0.0.1', KUBERNETES_SERVICE_PORT: String(api.port) },
      ...{ POD_NAME: 'engine-7f-abc', CARAVAN_SERVICE_ACCOUNT_DIR: accountFolder() },
    };
    const errors: string[] = [];
    const cost = new PodDeletionCost(podIdentity(env), health, (error) => errors.push(error));
    after(() => cost.close());
    const first = await api.next();
    assert.deepEqual(
      [first.method, first.url, first.cost, first.headers['content-type']],
      [
        'PATCH',
        '/api/v1/namespaces/models/pods/engine-7f-abc',
        '1000000',
        'application/merge-patch+json',
      ],
    );
    health.serve(() => load);
    assert.equal((await api.next()).cost, '0');
    load = { ...idle, sequences: 3 };
    assert.equal((await api.next()).cost, '2');
    // Busier is no news; idle is.
    load = { ...idle, sequences: 8 };
    await cost.look();
    load = idle;
    api.refuse = true;
    assert.equal((await api.next()).cost, '0');
    api.refuse = false;
    assert.equal((await api.next()).cost, '0');
    health.drain();
    await cost.look();
    assert.deepEqual(
      api.patches.map((patch) => patch.cost),
      ['1000000', '0', '2', '0', '-1'],
    );
    assert.deepEqual(errors, [
      'PATCH /api/v1/namespaces/models/pods/engine-7f-abc was answered 403',
    ]);
    assert.throws(() => podIdentity({}), /--pod-deletion-cost: KUBERNETES_SERVICE_HOST/);
  },
);

const beat = (ordinal: number, more: Partial<EngineBeat> = {}): EngineBeat => ({
  ...{ model: 'm', engineId: `e${ordinal}`, active: 0, slots: 2, tp: 1, ordinal, ...more },
});

void test('an engine waits at the queue unless one of a lower ordinal has a free slot', () => {
  const own = { model: 'm', ordinal: 3 };
  assert.equal(takeDelayMs({ model: 'm', ordinal: undefined }, [beat(0)]), 0);
  assert.equal(takeDelayMs(own, [beat(3), beat(4)]), 0);
  assert.ok(takeDelayMs(own, [beat(0)]) > 0);
  assert.ok(takeDelayMs(own, [beat(0), beat(1)]) > takeDelayMs(own, [beat(0)]));
  const many = Array.from({ length: 100 }, (_, i) => beat(i));
  assert.ok(takeDelayMs({ model: 'm', ordinal: 200 }, many) <= 500, 'it is bounded');
  for (const busy of [{ active: 2 }, { isDraining: true }, { model: 'other' }]) {
    assert.equal(takeDelayMs(own, [beat(0, busy)]), 0);
  }
});

void test(
  'work goes to the low ordinal while it has room, and to the high one when it has none',
  { timeout: 90_000 },
  async () => {
    const redis = await startRedis();
    after(() => redis.stop());
    const journal = await Journal.open(redis.url, 'patient');
    const queue = new JobQueue(redis.url, 'm');
    let engines = [beat(0), beat(1)];
    const ignore = (): void => undefined;
    const taker = (ordinal: number): JobTaker =>
      new JobTaker(redis.url, 'm', ignore, undefined, () =>
        takeDelayMs({ model: 'm', ordinal }, engines),
      );
    const [low, high] = [taker(0), taker(1)];
    after(async () => {
      journal.close();
      await Promise.all([queue.close(), low.close(), high.close()]);
    });
    const over = new AbortController();
    const heard: string[] = [];
    let onHeard = ignore;
    const isLowFull = (): boolean => engines[0]!.active === 2;
    const run = async (name: string, own: JobTaker): Promise<void> => {
      while (!over.signal.aborted) {
        if (name === 'low' && isLowFull()) return;
        const job = await own.take(over.signal);
        if (job === null) return;
        heard.push(name);
        onHeard();
        await job.finish(false);
      }
    };
    const submitOne = async (): Promise<void> => {
      const told = new Promise<void>((resolve) => (onHeard = resolve));
      await queue.submit(newJobId(), { priority: 100, deadlineMs: null });
      await told;
    };
    const running = [run('low', low), run('high', high)];
    after(() => {
      over.abort();
    });
    for (let i = 0; i < 20; i += 1) await submitOne();
    const lowCount = heard.filter((name) => name === 'low').length;
    assert.ok(lowCount >= 14, `the low ordinal took ${lowCount} of 20`);
    engines = [beat(0, { active: 2 }), beat(1)];
    // The low one may have been waiting when it became full.
    await submitOne();
    for (let i = 0; i < 5; i += 1) await submitOne();
    assert.ok(heard.slice(-5).every((name) => name === 'high'));
    over.abort();
    await Promise.all(running);
  },
);

void test(
  'a real engine of a Pod keeps its cost, and lowers it when it drains',
  { timeout: 90_000 },
  async () => {
    const redis = await startRedis();
    after(() => redis.stop());
    const api = await startApi('engine-0');
    const pod = await Pod.start({
      ...{ redisUrl: redis.url, tp: 1, maxBatchSize: 4 },
      args: ['--pod-deletion-cost', '--ordinal', '0'],
      env: {
        ...{ KUBERNETES_SERVICE_HOST: '127.0.0.1', KUBERNETES_SERVICE_PORT: String(api.port) },
        ...{ POD_NAME: 'engine-0', CARAVAN_SERVICE_ACCOUNT_DIR: accountFolder() },
      },
    });
    after(() => pod.kill());
    await pod.ready;
    while (api.patches.at(-1)?.cost !== '0') await api.next();
    assert.equal(api.patches[0]?.cost, '1000000');
    await pod.terminate(30_000);
    assert.equal(api.patches.at(-1)?.cost, '-1');
  },
);
