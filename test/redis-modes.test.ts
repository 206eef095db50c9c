/** Redis as it stands in clusters: TLS, users, Sentinel; what is not supported is refused in one line. */
import assert from 'node:assert/strict';
import { spawn, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { after, afterEach, test } from 'node:test';
import { Redis } from 'ioredis';
import { channelOf, keysOf } from '../coordinator/journal-keys.js';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Request } from '../coordinator/request.js';
import { redisAddress } from '../coordinator/store-address.js';
import { Store } from '../coordinator/store.js';
import { Authority } from './certificates.js';
import { freePort } from './redis-server.js';

const limit = { timeout: 90_000 };
const authority = new Authority();
after(() => {
  authority.remove();
});
const children: ChildProcess[] = [];
afterEach(async () => {
  for (const child of children.splice(0)) {
    if (child.exitCode !== null || child.signalCode !== null) continue;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill('SIGKILL');
    await gone;
  }
});

/** Starts redis-server and returns when it accepts connections. */
async function start(port: number, lines: readonly string[], args: readonly string[] = []) {
  const folder = fs.mkdtempSync(path.join(authority.folder, 'redis-'));
  const config = path.join(folder, 'redis.conf');
  fs.writeFileSync(config, ['bind 127.0.0.1', `dir ${folder}`, 'save ""', ...lines].join('\n'));
  const child = spawn('redis-server', [config, ...args], { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  await new Promise<void>((resolve, reject) => {
    let said = '';
    child.stdout.on('data', (chunk: Buffer) => {
      said += chunk.toString();
      if (/Ready to accept connections|Sentinel ID is/.test(said)) resolve();
    });
    child.once('exit', () => {
      reject(new Error(`redis-server on ${port} ended: ${said}`));
    });
  });
  return child;
}

const requestOf = (model: string): Request => ({
  ...{ version: 1, model, promptTokenIds: [1, 2], maxTokens: 3, stop: [], ignoreEos: true },
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 1 },
  isTextStart: false,
});
const terms = { priority: 100, deadlineMs: null };

/** A job's way through every connection there is: store, journal with its channels, queue, taker. */
async function runOneJob(url: string): Promise<void> {
  const ignore = (): void => undefined;
  const store = await Store.open(url, 'impatient');
  const journal = await Journal.open(url, 'impatient');
  const queue = new JobQueue(url, 'm');
  const taker = new JobTaker(url, 'm', ignore);
  try {
    assert.match((await store.health()).version, /^\d/);
    const id = newJobId();
    await journal.create(id, requestOf('m'), terms);
    await queue.submit(id, terms);
    const taken = await taker.take(AbortSignal.timeout(30_000));
    assert.equal(taken?.id, id);
    const take = await journal.take(id, 'engine');
    assert.ok(take.kind === 'taken');
    await journal.append(take, 0, [5, 6, 7], ['a', 'b', 'c']);
    const usage = { promptTokens: 2, completionTokens: 3 };
    await journal.end(take, 3, { status: 'completed', finishReason: 'length', usage }, '');
    await taken.finish(false);
    assert.equal((await journal.job(id))?.status, 'completed');
  } finally {
    await taker.close();
    await queue.close();
    journal.close();
    store.close();
  }
}

const refusal = async (url: string): Promise<{ code: string; message: string }> => {
  try {
    (await Store.open(url, 'impatient')).close();
  } catch (error) {
    return error as { code: string; message: string };
  }
  throw new Error(`${url} was not refused`);
};

void test(
  'TLS with a private authority, a client certificate and a user with a password',
  limit,
  async () => {
    const { certPath, keyPath } = authority.leaf('redis');
    const client = authority.leaf('client');
    const port = await freePort();
    await start(port, [
      ...[
        'port 0',
        `tls-port ${port}`,
        'tls-auth-clients yes',
        `tls-ca-cert-file ${authority.caPath}`,
      ],
      ...[`tls-cert-file ${certPath}`, `tls-key-file ${keyPath}`],
      ...['user default off', 'user caravan on >p@ss/word ~* &* +@all'],
    ]);
    const own = `ca=${authority.caPath}&cert=${client.certPath}&key=${client.keyPath}`;
    const secret = path.join(authority.folder, 'password');
    fs.writeFileSync(secret, 'p@ss/word\n');
    await runOneJob(`rediss://caravan:p%40ss%2Fword@127.0.0.1:${port}?${own}`);
    await runOneJob(`rediss://caravan@127.0.0.1:${port}/0?${own}&passwordFile=${secret}`);

    const wrong = await refusal(`rediss://caravan:wrong@127.0.0.1:${port}?${own}`);
    assert.match(wrong.message, /cannot be reached: WRONGPASS|refused: WRONGPASS/);
    assert.ok(!wrong.message.includes(':wrong@'), 'a password is not shown');
    const stranger = new Authority();
    after(() => {
      stranger.remove();
    });
    const others = `ca=${stranger.caPath}&cert=${client.certPath}&key=${client.keyPath}`;
    assert.match(
      (await refusal(`rediss://caravan@127.0.0.1:${port}?${others}`)).message,
      /^Redis at rediss:.*cannot be reached: .*(certificate|self.signed)/i,
    );
    assert.match((await refusal(`redis://127.0.0.1:${port}`)).message, /cannot be reached/);
  },
);

void test('Sentinel: a job runs, and runs again after the master has died', limit, async () => {
  const [first, second, sentinelPort] = [await freePort(), await freePort(), await freePort()];
  const master = await start(first, [`port ${first}`, 'appendonly yes']);
  await start(second, [`port ${second}`, `replicaof 127.0.0.1 ${first}`, 'appendonly yes']);
  await start(
    sentinelPort,
    [
      ...[`port ${sentinelPort}`, `sentinel monitor caravan 127.0.0.1 ${first} 1`],
      ...[
        'sentinel down-after-milliseconds caravan 1000',
        'sentinel failover-timeout caravan 5000',
      ],
    ],
    ['--sentinel'],
  );
  const url = `redis+sentinel://127.0.0.1:${sentinelPort}/caravan`;
  await runOneJob(url);
  const sentinel = new Redis(sentinelPort, '127.0.0.1');
  after(() => {
    sentinel.disconnect();
  });
  sentinel.on('error', () => undefined);
  const masterPort = async (): Promise<number> => {
    const [, port] = (await sentinel.call(
      'SENTINEL',
      'get-master-addr-by-name',
      'caravan',
    )) as string[];
    return Number(port);
  };
  assert.equal(await masterPort(), first);
  // A Sentinel knows of replicas a while after its start; without one there is nobody to fail over to.
  while (((await sentinel.call('SENTINEL', 'replicas', 'caravan')) as unknown[]).length === 0);
  master.kill('SIGKILL');
  while ((await masterPort()) !== second);
  const isMaster = new Redis(second, '127.0.0.1');
  while (!(await isMaster.info('replication')).includes('role:master'));
  isMaster.disconnect();
  await runOneJob(url);
});

void test(
  'Cluster mode is refused in one line; a job would be in one of its slots',
  limit,
  async () => {
    const port = await freePort();
    await start(port, [`port ${port}`, 'cluster-enabled yes', `cluster-port ${await freePort()}`]);
    const { code, message } = await refusal(`redis://127.0.0.1:${port}`);
    assert.equal(code, 'bad_usage');
    assert.match(message, /Cluster mode, which is not supported: use one primary, or Sentinel/);
    const cluster = new Redis(port);
    const slotsOf = async (id: string): Promise<number[]> =>
      Promise.all([...keysOf(id, 3), channelOf(id)].map((key) => cluster.cluster('KEYSLOT', key)));
    const [first, second] = [await slotsOf(newJobId()), await slotsOf(newJobId())];
    cluster.disconnect();
    assert.equal(first.length, 8, 'the job, three journals, three prompts, a channel');
    assert.equal(new Set(first).size, 1);
    assert.equal(new Set([...first, ...second]).size, 2, 'jobs are spread');
  },
);

void test('a URL says all there is to say, and a bad one is refused by what is wrong', () => {
  assert.deepEqual(redisAddress('redis://[::1]'), { host: '::1', port: 6379 });
  assert.deepEqual(redisAddress('unix:///run/redis.sock'), { path: '/run/redis.sock' });
  assert.deepEqual(redisAddress('redis+sentinel://:secret@a,b:26380/main/3'), {
    password: 'secret',
    name: 'main',
    sentinels: [
      { host: 'a', port: 26_379 },
      { host: 'b', port: 26_380 },
    ],
    db: 3,
  });
  for (const [url, reason] of [
    ['redis://a,b', /several hosts are for redis\+sentinel/],
    ['redis+sentinel://a', /must end with the name of the master/],
    ['redis://a?ca=/x', /\?ca=\/x cannot be read/],
    ['redis://a?tls=1', /\?tls= is not known/],
    ['redis://a/x', /\/x is not the number of a database/],
    ['redis://a:99999', /a:99999 is not HOST:PORT/],
  ] as const) {
    assert.throws(() => redisAddress(url), reason, url);
  }
});
