/**
 * Rank processes that many groups use one after the other: starting one takes longer than most tests.
 */
import { openCheckpoint, type Checkpoint } from '../model/checkpoint.js';
import { planGroup } from '../coordinator/group-spec.js';
import type { Config } from '../coordinator/config.js';
import { startLocalRank, stopLocalRank, type LocalRank } from '../coordinator/local-ranks.js';
import { Ranks } from '../coordinator/ranks.js';
import type { KvMode } from '../model/weights.js';
import type { WeightCache } from '../proto/gen/cluster.js';

export interface PoolGroup {
  readonly checkpoint: Checkpoint;
  readonly ranks: Ranks;
  /** The first tp processes of the pool. */
  readonly processes: readonly LocalRank[];
}

export class RankPool {
  readonly #started: LocalRank[] = [];
  readonly #device: string;

  constructor(device = 'cpu') {
    this.#device = device;
  }

  /** The first `count` processes; those that are missing are started. */
  async start(count: number): Promise<readonly LocalRank[]> {
    const missing = Math.max(0, count - this.#started.length);
    const starting = Array.from({ length: missing }, () =>
      startLocalRank({ threads: 1, device: this.#device, logLevel: 'error' }),
    );
    this.#started.push(...(await Promise.all(starting)));
    return this.#started.slice(0, count);
  }

  /** Runs `use` with a group of the first `tp` processes, which stay for the next group. */
  async withGroup<T>(
    folder: string,
    limits: {
      tp: number;
      maxSeqLen: number;
      maxBatchSize: number;
      maxStepRows: number;
      transport?: Config['transport'];
      weights?: Config['weights'];
      exact?: boolean;
      kv?: KvMode;
      keptWeights?: WeightCache;
    },
    use: (group: PoolGroup) => Promise<T>,
  ): Promise<T> {
    const processes = await this.start(limits.tp);
    const checkpoint = openCheckpoint(folder);
    const addresses = processes.map(({ address }) => address);
    const { spec } = planGroup(checkpoint, limits.tp, {
      ...{ weights: 'fp32', exact: true, device: this.#device },
      ...limits,
    });
    const ranks = await Ranks.connect(addresses, spec);
    try {
      return await use({ checkpoint, ranks, processes });
    } finally {
      ranks.close();
    }
  }

  async stop(): Promise<void> {
    await Promise.all(this.#started.splice(0).map(stopLocalRank));
  }
}
