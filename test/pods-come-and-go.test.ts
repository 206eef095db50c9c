/**
 * A cluster of real processes, as small as two cores carry: a gateway's scaler is asked over gRPC, KEDA's algorithm starts and
 * ends Pods of real engines, three times from zero and back. No job is lost, none runs twice.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { credentials, type ServiceError } from '@grpc/grpc-js';
import { newJobId } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import { METRIC_NAME } from '../coordinator/scaler.js';
import {
  ExternalScalerClient,
  type GetMetricsResponse,
  type IsActiveResponse,
} from '../proto/gen/externalscaler.js';
import { startGateway } from './gateway.js';
import { Keda } from './keda.js';
import { Pod } from './pod.js';
import { Random } from './random.js';

const WAVES = 3;
const JOBS = 16;
const MAX_PODS = 2;
const GRACE_MS = 60_000;
const TARGET_SECONDS = 0.5;
const isLong = process.env['CARAVAN_LONG'] === '1';
const terms = { priority: 100, deadlineMs: null };

/** The time in seconds, every so often: what a controller looks at. */
async function* clock(everyMs: number): AsyncGenerator<number> {
  for (;;) {
    yield performance.now() / 1000;
    await delay(everyMs);
  }
}

/** The Pods of one StatefulSet. */
class Pods {
  readonly #redisUrl: string;
  readonly #running: Pod[] = [];
  readonly #ending: Promise<unknown>[] = [];
  most = 0;
  /** Times from a start to serving, in seconds. */
  readonly loadS: number[] = [];

  constructor(redisUrl: string) {
    this.#redisUrl = redisUrl;
  }

  get count(): number {
    return this.#running.length;
  }

  async scaleTo(count: number): Promise<void> {
    while (this.#running.length < count) {
      const ordinal = ['--ordinal', String(this.#running.length)];
      const options = { redisUrl: this.#redisUrl, tp: 1, maxBatchSize: 2, args: ordinal };
      const pod = await Pod.start(options);
      this.#running.push(pod);
      this.most = Math.max(this.most, this.#running.length);
      void pod.ready.then(
        () => this.loadS.push((performance.now() - pod.startedMs) / 1000),
        () => undefined,
      );
    }
    while (this.#running.length > count) {
      this.#ending.push(
        this.#running
          .pop()!
          .terminate(GRACE_MS)
          .then(({ codes }) => {
            assert.deepEqual(codes, [0, 0], 'a Pod had to be killed');
          }),
      );
    }
  }

  async ended(): Promise<void> {
    await Promise.all(this.#ending.splice(0));
  }
}

void test(
  'engines come with the work and go with it, three times from zero and back',
  { timeout: 280_000, skip: isLong ? false : 'real Pods come and go in the long form' },
  async (context) => {
    const gateway = await startGateway();
    after(() => gateway.stop());
    const { redis, journal, tokenizer } = gateway;
    const pods = new Pods(redis.url);
    after(async () => {
      await pods.scaleTo(0);
      await pods.ended();
    });
    const queue = new JobQueue(redis.url, 'caravan-tiny');
    after(() => queue.close());
    const client = new ExternalScalerClient(
      `127.0.0.1:${gateway.scalerPort}`,
      credentials.createInsecure(),
    );
    after(() => {
      client.close();
    });
    const scalerMetadata = { model: 'caravan-tiny', targetSeconds: String(TARGET_SECONDS) };
    const scaledObjectRef = { name: 'engines', namespace: 'default', scalerMetadata };
    const answered = <A>(call: (reply: (error: ServiceError | null, a: A) => void) => unknown) =>
      new Promise<A>((resolve, reject) => {
        call((error, answer) => {
          if (error === null) resolve(answer);
          else reject(error);
        });
      });
    const keda = new Keda({ syncS: 1, stabilizationS: 4, cooldownS: 4, maxPods: MAX_PODS });
    const control = async (nowS: number): Promise<void> => {
      const { result } = await answered<IsActiveResponse>((reply) =>
        client.isActive(scaledObjectRef, reply),
      );
      await pods.scaleTo(keda.activity(nowS, pods.count, result));
      const { metricValues } = await answered<GetMetricsResponse>((reply) =>
        client.getMetrics({ scaledObjectRef, metricName: METRIC_NAME }, reply),
      );
      const seconds = metricValues[0]!.metricValueFloat;
      await pods.scaleTo(keda.sync(nowS, pods.count, seconds, TARGET_SECONDS));
    };

    const random = new Random(11);
    const ids: string[] = [];
    const submit = async (): Promise<void> => {
      const id = newJobId();
      await journal.create(
        id,
        {
          ...{ version: 1, model: 'caravan-tiny', stop: [], ignoreEos: true, isTextStart: false },
          promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
          sampling: { temperature: 0, topP: 1, topK: 0, seed: 1 },
          maxTokens: 50 + random.below(300),
        },
        terms,
      );
      await queue.submit(id, terms);
      ids.push(id);
    };
    const hasEnded = async (): Promise<boolean> => {
      const { waiting, active } = await queue.counts();
      return waiting + active === 0;
    };
    let roundTrips = 0;
    for (let wave = 0; wave < WAVES; wave += 1) {
      assert.ok(pods.count < 1, 'the last wave has gone');
      const startMs = performance.now();
      let servedMs: number | null = null;
      const last = (wave + 1) * JOBS;
      const loads = pods.loadS.length;
      for await (const nowS of clock(500)) {
        for (let i = 0; i < 2 && ids.length < last; i += 1) await submit();
        await control(nowS);
        const first = ids[wave * JOBS]!;
        if (servedMs === null && (await journal.entries(first, 0, 0)).length > 0) {
          servedMs = performance.now();
        }
        if (ids.length === last && pods.count === 0 && (await hasEnded())) break;
      }
      await pods.ended();
      roundTrips += 1;
      const waitedS = (servedMs! - startMs) / 1000;
      const loadS = pods.loadS[loads]!;
      context.diagnostic(
        `wave ${wave + 1}: first token after ${waitedS.toFixed(1)} s, loading took ${loadS.toFixed(1)} s`,
      );
      assert.ok(waitedS <= loadS + 10, `0 → 1 took ${waitedS} s, loading ${loadS} s`);
    }
    context.diagnostic(`${ids.length} jobs, at most ${pods.most} engines`);
    assert.equal(roundTrips, WAVES);
    assert.equal(pods.most, MAX_PODS);
    for (const id of ids) {
      let count = 0;
      let endings = 0;
      for (const entry of await journal.entries(id, 0, 0)) {
        if (entry.kind === 'tokens') {
          assert.equal(count + entry.tokenIds.length, entry.endOffset, 'a gap, or twice');
          count = entry.endOffset;
        } else endings += 1;
      }
      assert.equal(endings, 1);
      assert.equal((await journal.job(id))?.status, 'completed');
    }
    assert.equal((await queue.counts()).completed, ids.length, 'each job once');
  },
);
