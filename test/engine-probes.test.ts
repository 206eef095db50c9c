/** What an engine and its ranks say of themselves: probes that mean progress, and the metrics that alerts need. */
import assert from 'node:assert/strict';
import { fork } from 'node:child_process';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { EngineHealth, type EngineLoad } from '../coordinator/engine-health.js';
import { Journal, newJobId } from '../coordinator/journal.js';
import { workerEntry } from '../coordinator/package-root.js';
import { JobQueue } from '../coordinator/queue.js';
import { startEngine, tinyTokenizer } from './real-engine.js';
import { startRedis } from './redis-server.js';

const size = { tp: 2, slots: 4, kvPositions: 4 * 512 };

void test('an engine is alive while what should move moves, and started when weights are read', () => {
  let nowMs = 0;
  const health = new EngineHealth(size, 1000, () => nowMs);
  assert.equal(health.started().isOk, false);
  assert.deepEqual(health.alive(), { isOk: true, reason: '0 of 2 ranks reached' });
  nowMs = 60_000;
  assert.equal(health.alive().isOk, true, 'starting again brings no ranks');
  health.rankReached(0);
  assert.equal(health.started().isOk, false);
  health.rankReached(1);
  assert.equal(health.started().isOk, true);
  assert.equal(health.ready(true).isOk, false);
  nowMs += 900;
  health.rankLoading(0, 10, 100);
  nowMs += 900;
  assert.equal(health.alive().isOk, true);
  health.rankLoading(0, 10, 100);
  nowMs += 200;
  assert.match(health.alive().reason, /no more weights were read for 1 s \(loading, 10 of 100/);
  assert.equal(health.started().isOk, false);
  health.rankLoading(1, 1, 100);
  assert.deepEqual(health.loading, { read: 11, total: 200 });

  let load: EngineLoad = { sequences: 0, slotsUsed: 0, kvPositionsUsed: 0, unmovedMs: 0 };
  health.serve(() => load);
  assert.deepEqual(health.ready(true), { isOk: true, reason: 'serving 0 sequences' });
  assert.match(health.ready(false).reason, /Redis/);
  load = { ...load, sequences: 3, unmovedMs: 1001 };
  assert.match(health.alive().reason, /no step has ended for 1 s/);
  load = { ...load, unmovedMs: 10 };
  health.drain();
  assert.equal(health.alive().isOk, true);
  assert.equal(health.ready(true).reason, 'draining');
  health.wait();
  assert.equal(health.started().isOk, true, 'it was started once');
  assert.equal(health.ranksConnected, 0);
});

const value = (metrics: string, name: string): number =>
  Number(new RegExp(`^${name}(?:\\{[^}]*\\})? (\\S+)$`, 'm').exec(metrics)?.[1]);

void test('a stopped rank makes a loaded engine fail its probe, and metrics follow the load', async () => {
  const redis = await startRedis();
  after(() => redis.stop());
  const engine = await startEngine(redis.url, {
    ...{ tp: 2, maxBatchSize: 4 },
    args: ['--metrics-port', '0', '--stall-timeout', '1'],
  });
  after(() => engine.stop());
  const probe = async (path: string): Promise<{ status: number; reason: string }> => {
    const response = await fetch(`${engine.metricsUrl}${path}`);
    const { reason } = (await response.json()) as { reason: string };
    return { status: response.status, reason };
  };
  const metrics = async (): Promise<string> => (await fetch(`${engine.metricsUrl}/metrics`)).text();
  const until = async (what: string, holds: () => Promise<boolean>): Promise<void> => {
    const giveUpMs = performance.now() + 120_000;
    while (!(await holds())) assert.ok(performance.now() < giveUpMs, `${what} never came`);
  };
  for (const path of ['/livez', '/startupz', '/readyz']) {
    assert.deepEqual(await probe(path), { status: 200, reason: 'serving 0 sequences' }, path);
  }
  const idle = await metrics();
  for (const [name, expected] of [
    ['caravan_engine_up', 1],
    ['caravan_engine_ranks', 2],
    ['caravan_engine_ranks_connected', 2],
    ['caravan_engine_slots', 4],
    ['caravan_engine_slots_used', 0],
    ['caravan_engine_kv_positions', 4 * 512],
    ['caravan_engine_kv_positions_used', 0],
    ['caravan_engine_step_seconds_count', NaN],
    ['caravan_redis_up', 1],
    ['caravan_redis_durable', 1],
  ] as const) {
    assert.equal(value(idle, name), expected, name);
  }
  assert.match(idle, /^caravan_redis_condition\{condition="aof_last_write_ok"\} 1$/m);

  const journal = await Journal.open(redis.url, 'patient');
  const queue = new JobQueue(redis.url, engine.model);
  after(async () => {
    journal.close();
    await queue.close();
  });
  const tokenizer = tinyTokenizer();
  const submit = async (): Promise<string> => {
    const id = newJobId();
    const terms = { priority: 100, deadlineMs: null };
    await journal.create(
      id,
      {
        ...{ version: 1, model: engine.model, maxTokens: 400, stop: [], ignoreEos: true },
        promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
        sampling: { temperature: 0, topP: 1, topK: 0, seed: 1 },
        isTextStart: false,
      },
      terms,
    );
    await queue.submit(id, terms);
    return id;
  };
  await submit();
  await submit();
  await until('two slots', async () => value(await metrics(), 'caravan_engine_slots_used') === 2);
  await until(
    'positions',
    async () => value(await metrics(), 'caravan_engine_kv_positions_used') > 20,
  );
  const rank = engine.ranks[1]!.process;
  rank.kill('SIGSTOP');
  try {
    await until('a failed probe', async () => (await probe('/livez')).status === 503);
    assert.match((await probe('/livez')).reason, /no step has ended for \d+ s \(serving 2/);
    const stalled = await metrics();
    assert.equal(value(stalled, 'caravan_engine_slots_used'), 2);
    assert.ok(value(stalled, 'caravan_engine_kv_positions_used') > 20);
    assert.ok(value(stalled, 'caravan_engine_unmoved_seconds') > 1);
  } finally {
    rank.kill('SIGCONT');
  }
  await until('progress', async () => (await probe('/livez')).status === 200);
  await until(
    'both endings',
    async () => value(await metrics(), 'caravan_engine_jobs_total') === 2,
  );
  const done = await metrics();
  assert.match(done, /^caravan_engine_jobs_total\{model="caravan-tiny",outcome="completed"\} 2$/m);
  assert.ok(value(done, 'caravan_engine_tokens_total') >= 800);
  assert.ok(value(done, 'caravan_engine_tokens_per_second') > 0);

  await redis.kill();
  await until('no Redis', async () => (await probe('/readyz')).reason === 'Redis does not answer');
  assert.equal((await probe('/livez')).status, 200, 'a dead Redis is no reason to start anew');
  assert.equal(value(await metrics(), 'caravan_redis_up'), 0);
  await redis.restart();
  await until('Redis', async () => (await probe('/readyz')).status === 200);
});

void test('a rank answers on its health port, and refuses a port that is taken', async () => {
  const start = (healthPort: number) =>
    fork(
      workerEntry,
      [
        ...['--listen', '127.0.0.1:0', '--log-level', 'error'],
        // Probes may come from elsewhere than coordinators and peers.
        ...['--health-host', '127.0.0.2', '--health-port', String(healthPort)],
      ],
      { stdio: ['ignore', 'ignore', 'pipe', 'ipc'] },
    );
  const rank = start(0);
  after(() => rank.kill('SIGKILL'));
  const [{ healthPort }] = (await once(rank, 'message')) as [{ healthPort: number }];
  const live = await fetch(`http://127.0.0.2:${healthPort}/livez`);
  assert.equal(live.status, 200);
  assert.deepEqual(await live.json(), { status: 'ok', reason: 'idle' });
  const second = start(healthPort);
  const exited = once(second, 'exit');
  // A parent of ours hears it as a message, before anything is on stderr.
  const [failure] = (await once(second, 'message')) as [{ type: string; message: string }];
  assert.equal(failure.type, 'failed');
  assert.match(failure.message, /^--health-port \d+: .*EADDRINUSE/);
  const [code] = (await exited) as [number];
  assert.equal(code, 2);
});
