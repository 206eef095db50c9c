/** KEDA's calls over real gRPC, against a real BullMQ queue: what is counted, and that zero engines is a valid state. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { credentials, type ServiceError } from '@grpc/grpc-js';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { EngineHealth } from '../coordinator/engine-health.js';
import { capacityOf, EngineSpeed } from '../coordinator/engine-speed.js';
import { newJobId } from '../coordinator/journal.js';
import { LoadingSign } from '../coordinator/loading-sign.js';
import { queueName } from '../coordinator/queue-connection.js';
import { JobTaker } from '../coordinator/queue-taker.js';
import type { Request } from '../coordinator/request.js';
import { METRIC_NAME } from '../coordinator/scaler.js';
import { ExternalScalerClient, type IsActiveResponse } from '../proto/gen/externalscaler.js';
import { startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const { card, journal, redis, store } = gateway;
const client = new ExternalScalerClient(
  `127.0.0.1:${gateway.scalerPort}`,
  credentials.createInsecure(),
);
after(() => {
  client.close();
});
const queue = new Queue(queueName(card.name), { connection: { port: redis.port } });
after(() => queue.close());

type Metadata = Readonly<Record<string, string>>;
const refOf = (metadata: Metadata) => ({
  name: 'engines',
  namespace: 'default',
  scalerMetadata: { ...metadata },
});
const ours = { model: card.name, targetSeconds: '20', tokensPerSecond: '10' };

const answered = <A>(call: (reply: (error: ServiceError | null, answer: A) => void) => unknown) =>
  new Promise<A>((resolve, reject) => {
    call((error, answer) => {
      if (error === null) resolve(answer);
      else reject(error);
    });
  });

const isActive = async (metadata: Metadata): Promise<boolean> =>
  (await answered<IsActiveResponse>((reply) => client.isActive(refOf(metadata), reply))).result;

async function seconds(metadata: Metadata = ours): Promise<number> {
  const request = { scaledObjectRef: refOf(metadata), metricName: METRIC_NAME };
  const { metricValues } = await answered<{
    metricValues: { metricName: string; metricValue: number; metricValueFloat: number }[];
  }>((reply) => client.getMetrics(request, reply));
  assert.deepEqual(
    metricValues.map(({ metricName }) => metricName),
    [METRIC_NAME],
  );
  assert.equal(metricValues[0]!.metricValue, Math.ceil(metricValues[0]!.metricValueFloat));
  return metricValues[0]!.metricValueFloat;
}

const requestOf = (promptTokens: number, maxTokens: number, n = 1): Request => ({
  version: 1,
  model: card.name,
  promptTokenIds: Array.from({ length: promptTokens }, () => 5),
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 1 },
  maxTokens,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
  ...(n === 1 ? {} : { n }),
});

async function add(request: Request, options: object): Promise<string> {
  const id = newJobId();
  await journal.create(id, request, { priority: 100, deadlineMs: null });
  await queue.add('generate', {}, { jobId: id, ...options });
  return id;
}

void test('waiting, prioritized, due and active jobs count with the tokens that are left', async () => {
  assert.equal(await isActive(ours), false);
  assert.equal(await seconds(), 0);
  const stream = client.streamIsActive(refOf(ours));
  const stated: boolean[] = [];
  stream.on('error', () => undefined);
  const heard = (): Promise<unknown> => once(stream, 'data');
  stream.on('data', ({ result }: IsActiveResponse) => stated.push(result));
  await heard();
  assert.deepEqual(stated, [false]);

  const becameActive = heard();
  // Waiting without a priority; 10 + 30 tokens at 10 a second.
  await add(requestOf(10, 30), {});
  assert.equal(await seconds(), 4);
  assert.equal(await isActive(ours), true);
  await becameActive;
  assert.deepEqual(stated, [false, true]);
  stream.cancel();

  // Prioritized, two sequences: the prompt is computed for each.
  await add(requestOf(20, 40, 2), { priority: 100 });
  assert.equal(await seconds(), 16);
  // Delayed: far away it is no work; nobody moves it when its time has come, and it counts all the same.
  const delayed = await add(requestOf(5, 5), { priority: 100, delay: 3_600_000 });
  assert.equal(await seconds(), 16);
  await moveDelayed(delayed, Date.now() - 1);
  assert.equal(await seconds(), 17);
  // A limit beyond the context counts to its end: 500 + 12 of 512.
  const long = await add(requestOf(500, 4096), { priority: 1000 });
  assert.equal(await seconds(), 68.2);
  assert.equal(await gateway.store.card(card.name).then((found) => found?.maxSeqLen), 512);

  // Active: what the journal has is done, and with its first token the prompt.
  const taker = new JobTaker(redis.url, card.name, () => undefined);
  const taken = await taker.take(AbortSignal.timeout(30_000));
  assert.ok(taken);
  assert.equal(await seconds(), 68.2);
  const take = await gateway.take(taken.id);
  assert.equal(take.request.promptTokenIds.length, 10);
  await journal.append(take, 0, [1, 2, 3, 4, 5], ['a', 'b', 'c', 'd', 'e']);
  assert.equal(await seconds(), 68.2 - 1.5);
  const usage = { promptTokens: 10, completionTokens: 5 };
  await journal.end(take, 5, { status: 'completed', finishReason: 'stop', usage }, '');
  await taken.finish(false);
  await (await queue.getJob(long))!.remove();
  assert.equal(await seconds(), 13);
  await taker.close();
});

/** Moves a delayed job's time. */
async function moveDelayed(id: string, timeMs: number): Promise<void> {
  const direct = new Redis(redis.url);
  await direct.zadd(`bull:${queueName(card.name)}:delayed`, timeMs * 0x1000, id);
  direct.disconnect();
}

void test('seconds follow what engines can under load, also of engines that were; the metric says the same', async () => {
  const tokens = 10 * (await seconds());
  const beat = { model: card.name, active: 0, slots: 4, tp: 2 };
  const guessless = { model: card.name };
  // Nothing was measured with half of the slots in use: the guess counts, or else what there is.
  await store.beat({
    ...{ ...beat, engineId: 'idle' },
    speeds: [{ sequences: 1, tokensPerSecond: 5 }],
  });
  assert.equal(await seconds(), tokens / 10);
  assert.equal(await seconds(guessless), tokens / 5);
  const loaded = (rate: number) => [
    { sequences: 1, tokensPerSecond: 5 },
    { sequences: 4, tokensPerSecond: rate },
  ];
  await store.beat({ ...beat, engineId: 'one', speeds: loaded(40) });
  await store.beat({ ...beat, engineId: 'two', speeds: loaded(60) });
  assert.equal(await seconds(), tokens / 50);
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  assert.match(
    metrics,
    new RegExp(`^caravan_work_seconds\\{model="${card.name}"\\} ${tokens / 50}$`, 'm'),
  );
  // The idle one alone does not say otherwise, and nor does nobody.
  for (const engine of ['one', 'two']) await store.retire(card.name, engine);
  assert.equal(await seconds(), tokens / 60);
  await store.retire(card.name, 'idle');
  assert.equal(await seconds(), tokens / 60);
});

void test('while a group loads nobody is taken away, and an engine is counted once', async () => {
  const model = 'loading';
  const metadata = { model, targetSeconds: '20', tokensPerSecond: '10' };
  await store.publishCard({ ...card, name: model });
  const beat = { model, active: 0, slots: 4, tp: 1 };
  await store.beat({ ...beat, engineId: 'pod-a-00000001' });
  assert.equal(await isActive(metadata), false);
  assert.equal(await seconds(metadata), 0);
  await store.beatLoading(model, 'pod-b-00000002');
  assert.equal(await isActive(metadata), true);
  assert.equal(await seconds(metadata), 40, 'two engines, at the target of each');
  // What one Pod's engine of before has left is not one more; nor is one that drains.
  await store.beatLoading(model, 'pod-a-00000003');
  await store.beat({ ...beat, engineId: 'pod-c-00000004', isDraining: true });
  assert.equal(await seconds(metadata), 40);
  // They serve: their beat may come before the end of their loading.
  for (const engineId of ['pod-a-00000003', 'pod-b-00000002'])
    await store.beat({ ...beat, engineId });
  assert.equal(await seconds(metadata), 0);
  for (const id of ['pod-a-00000003', 'pod-b-00000002']) await store.endLoading(model, id);
  assert.deepEqual(await store.loadingEngines(model), []);
  assert.equal(await isActive(metadata), false);
  for (const id of ['a-00000001', 'a-00000003', 'b-00000002', 'c-00000004']) {
    await store.retire(model, `pod-${id}`);
  }
});

void test('a group says that it loads for as long as its weights move, and no longer', async () => {
  let nowMs = 0;
  const size = { tp: 2, slots: 1, kvPositions: 512 };
  const health = new EngineHealth(size, 1000, () => nowMs);
  const sign = new LoadingSign(store, 'm', 'pod-00000001', health);
  after(() => {
    sign.close();
  });
  const said = async (): Promise<boolean> => {
    await sign.look();
    return (await store.loadingEngines('m')).length === 1;
  };
  assert.equal(await said(), false);
  health.rankReached(0);
  assert.equal(await said(), false, 'it waits for a rank');
  health.rankReached(1);
  assert.equal(await said(), true);
  nowMs = 1500;
  assert.equal(await said(), false, 'nothing moves');
  health.rankLoading(0, 10, 20);
  assert.equal(await said(), true);
  health.serve(() => ({ sequences: 0, slotsUsed: 0, kvPositionsUsed: 0, unmovedMs: 0 }));
  assert.equal(await said(), false);
  health.wait();
  health.rankReached(0);
  health.rankReached(1);
  assert.equal(await said(), true, 'again, after a rank was lost');
  health.drain();
  assert.equal(await said(), false);
});

void test('a model that no engine has served yet asks for its first one', async () => {
  assert.equal(await isActive({ model: 'newcomer' }), true);
  assert.equal(await seconds({ model: 'newcomer' }), 0);
});

void test('the target is per engine, and bad metadata is refused by name', async () => {
  const spec = await answered<{ metricSpecs: unknown[] }>((reply) =>
    client.getMetricSpec(refOf(ours), reply),
  );
  assert.deepEqual(spec.metricSpecs, [
    { metricName: METRIC_NAME, targetSize: 20, targetSizeFloat: 20 },
  ]);
  await assert.rejects(isActive({}), { code: 3, details: /metadata\.model/ });
  await assert.rejects(isActive({ ...ours, targetSeconds: '-1' }), {
    code: 3,
    details: /metadata\.targetSeconds: must be above 0, got -1/,
  });
  const other = { scaledObjectRef: refOf(ours), metricName: 'other' };
  await assert.rejects(
    answered((reply) => client.getMetrics(other, reply)),
    { code: 5 },
  );
});

void test('an engine is rated by its busiest steps, and follows when they change', () => {
  const speed = new EngineSpeed();
  assert.equal(speed.tokensPerSecond, null);
  const run = (count: number, rows: number, sequences: number, totalMs: number): void => {
    for (let i = 0; i < count; i += 1) speed.add(rows, sequences, totalMs);
  };
  run(15, 1, 1, 100);
  assert.equal(speed.tokensPerSecond, null, 'the first steps say nothing');
  run(500, 1, 1, 100);
  const near = (rate: number): boolean => Math.abs((speed.tokensPerSecond ?? 0) - rate) < rate / 50;
  assert.ok(near(10));
  run(20, 8, 8, 160);
  assert.ok(near(50));
  // Hours of little to do change nothing of what it can.
  run(5000, 1, 1, 100);
  assert.ok(near(50));
  run(3000, 9, 9, 90);
  assert.ok(near(100));
  assert.deepEqual(
    speed.speeds.map(({ sequences }) => sequences),
    [1, 8],
  );
  const kinds = (rate: number) => [{ sequences: 8, tokensPerSecond: rate }];
  assert.deepEqual(capacityOf([], [], 8), null);
  assert.deepEqual(capacityOf([kinds(10), kinds(30)], kinds(99), 8), {
    ...{ tokensPerSecond: 20, isUnderLoad: true },
  });
  assert.deepEqual(capacityOf([[{ sequences: 1, tokensPerSecond: 3 }]], kinds(99), 17), {
    ...{ tokensPerSecond: 99, isUnderLoad: false },
  });
  assert.equal(
    capacityOf([[{ sequences: 1, tokensPerSecond: 3 }]], kinds(99), 4)?.tokensPerSecond,
    3,
  );
});

void test('while Redis is away KEDA is told so, in time', async () => {
  await redis.kill();
  await assert.rejects(seconds(), { code: 14 });
  await redis.restart();
});
