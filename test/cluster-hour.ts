/**
 * An hour of a trace on a simulated cluster: three days, each a raised cosine of traffic that comes out of silence and goes
 * back to it, with the requests of the trace in their order. The real scaler answers over real gRPC, and KEDA's algorithm,
 * its times scaled by the same factor as the trace's, sets the number of engines.
 */
import fs from 'node:fs';
import { credentials } from '@grpc/grpc-js';
import { METRIC_NAME, ScalerServer } from '../coordinator/scaler.js';
import { ExternalScalerClient } from '../proto/gen/externalscaler.js';
import { Keda } from './keda.js';
import {
  MODEL,
  SimulatedCluster,
  type Arrival,
  type EngineModel,
  type Outcome,
} from './simulated-cluster.js';

export const DAYS = 3;
export const DAY_S = 1200;
export const BUSY_S = 600;
export const TTFT_LIMIT_S = 10;
/** KEDA's and the autoscaler's own times (15, 300 and 300 s), for time that runs twice as fast. */
const COMPRESSION = 2;
const TICK_S = 0.5;
const settings = {
  syncS: 15 / COMPRESSION,
  stabilizationS: 300 / COMPRESSION,
  cooldownS: 300 / COMPRESSION,
};

/** Assumed, of the order of a 7B model in 16 bits on one large GPU: 1,170 tokens/s at 16 slots, 8,000 of prompts. */
export const engine: EngineModel = {
  slots: 16,
  maxSeqLen: 16_384,
  maxStepRows: 512,
  loadS: 20,
  stepMs: { base: 12, decode: 0.1, prefill: 0.12 },
};

/** The requests of a trace file, in three days. @param every keeps every so many of them. */
export function readArrivals(path: string, every = 1): Arrival[] {
  const rows = fs
    .readFileSync(path, 'utf8')
    .trim()
    .split('\n')
    .slice(1)
    .filter((_, i) => i % every === 0)
    .map((line) => {
      const [timestamp, prompt, output] = line.split(',');
      const atMs = Date.parse(`${timestamp!.slice(0, 23).replace(' ', 'T')}Z`);
      return { atMs, promptTokens: Number(prompt), outputTokens: Math.max(1, Number(output)) };
    });
  const startMs = rows[0]!.atMs;
  const spanMs = rows.at(-1)!.atMs - startMs + 1;
  return rows.map(({ atMs, promptTokens, outputTokens }) => {
    const share = ((atMs - startMs) / spanMs) * DAYS;
    const day = Math.floor(share);
    return { atS: day * DAY_S + BUSY_S * dayTime(share - day), promptTokens, outputTokens };
  });
}

/** When, of a day of length 1 with a raised cosine of traffic, this share of its requests has come. */
function dayTime(share: number): number {
  let low = 0;
  let high = 1;
  for (let i = 0; i < 40; i += 1) {
    const middle = (low + high) / 2;
    if (middle - Math.sin(2 * Math.PI * middle) / (2 * Math.PI) < share) low = middle;
    else high = middle;
  }
  return low;
}

export type Policy =
  | { readonly kind: 'static'; readonly engines: number }
  | { readonly kind: 'work'; readonly targetSeconds: number; readonly maxEngines: number }
  /** Jobs that wait, or those that are active too, for each engine. */
  | {
      readonly kind: 'queue';
      readonly jobs: number;
      readonly counts: 'waiting' | 'all';
      readonly maxEngines: number;
    };

export async function playHour(arrivals: readonly Arrival[], policy: Policy): Promise<Outcome> {
  const startPods = policy.kind === 'static' ? policy.engines : 0;
  const cluster = new SimulatedCluster({
    ...{ engine, ttftLimitS: TTFT_LIMIT_S, drainTimeoutS: 60, startPods },
  });
  const untilS = DAYS * DAY_S;
  if (policy.kind === 'static')
    return cluster.run(arrivals, untilS, TICK_S, () => Promise.resolve());
  const keda = new Keda({ ...settings, maxPods: policy.maxEngines });
  const scaler = new ScalerServer(cluster.work);
  const port = await scaler.listen('127.0.0.1', 0);
  const client = new ExternalScalerClient(`127.0.0.1:${port}`, credentials.createInsecure());
  const target = policy.kind === 'work' ? policy.targetSeconds : policy.jobs;
  const scaledObjectRef = {
    ...{ name: 'engines', namespace: 'default' },
    scalerMetadata: { model: MODEL, targetSeconds: String(target) },
  };
  const isActive = async (): Promise<boolean> => {
    if (policy.kind === 'queue') return cluster.waiting + cluster.activeCount > 0;
    return new Promise((resolve, reject) => {
      client.isActive(scaledObjectRef, (error, { result }) => {
        if (error === null) resolve(result);
        else reject(error);
      });
    });
  };
  const metric = async (): Promise<number> => {
    if (policy.kind === 'queue') {
      return cluster.waiting + (policy.counts === 'all' ? cluster.activeCount : 0);
    }
    return new Promise((resolve, reject) => {
      client.getMetrics({ scaledObjectRef, metricName: METRIC_NAME }, (error, { metricValues }) => {
        if (error === null) resolve(metricValues[0]!.metricValueFloat);
        else reject(error);
      });
    });
  };
  let pushedS = -Infinity;
  let syncedS = -Infinity;
  try {
    return await cluster.run(arrivals, untilS, TICK_S, async (nowS) => {
      // The scaler's stream looks every second; where nothing can have changed it need not be asked that often.
      if (nowS - pushedS >= (cluster.pods === 0 && cluster.waiting > 0 ? 1 : 5)) {
        pushedS = nowS;
        cluster.scaleTo(keda.activity(nowS, cluster.pods, await isActive()));
      }
      if (nowS - syncedS >= settings.syncS) {
        syncedS = nowS;
        cluster.scaleTo(keda.sync(nowS, cluster.pods, await metric(), target));
      }
    });
  } finally {
    client.close();
    scaler.close();
  }
}
