/** The embedded model as clients see it, in exact mode: a gateway of this process over an engine of one rank. */
import { startGateway } from './gateway.js';
import { startEngine, type RealEngine } from './real-engine.js';

export interface ServedModel {
  /** The gateway's address. */
  readonly url: string;
  readonly engine: RealEngine;
  stop(): Promise<void>;
}

/** Where `caravan up` with its six processes would show no more. */
export async function serveModel(maxBatchSize: number): Promise<ServedModel> {
  const gateway = await startGateway();
  const engine = await startEngine(gateway.redis.url, { tp: 1, maxBatchSize });
  return {
    url: gateway.url,
    engine,
    // The engine first: with a job in it, it waits for a Redis that is gone.
    stop: async () => {
      await engine.stop();
      await gateway.stop();
    },
  };
}
