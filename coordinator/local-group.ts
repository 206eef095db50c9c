/**
 * A group of ranks on this machine for one command: started, connected, and stopped at its end.
 */
import {
  openCheckpoint,
  rankBytes,
  resolveModelPath,
  type Checkpoint,
} from '../model/checkpoint.js';
import { deviceOfRank } from '../model/device-name.js';
import { planRanks, slicesOf } from '../model/plan.js';
import { planGroup, type GroupLimits, type GroupSpec } from './group-spec.js';
import { LoadBars } from './load-bars.js';
import { startLocalRank, stopLocalRank, threadsPerRank, type LocalRank } from './local-ranks.js';
import { Ranks } from './ranks.js';

export interface LocalGroupOptions extends GroupLimits {
  readonly model: string | undefined;
  readonly tp: number;
  readonly device: string;
}

export interface LocalGroup {
  readonly checkpoint: Checkpoint;
  readonly ranks: Ranks;
  readonly spec: GroupSpec;
}

/** Opens a checkpoint and checks every tensor that its ranks will read: before any process starts. */
export function openChecked(model: string | undefined, tp: number): Checkpoint {
  const checkpoint = openCheckpoint(resolveModelPath(model));
  for (const plan of planRanks(checkpoint.config, tp)) {
    rankBytes(checkpoint, slicesOf(checkpoint.config, plan));
  }
  return checkpoint;
}

/** A group that runs until it is closed. */
export interface StartedGroup extends LocalGroup {
  /** Ends the rank processes, and waits until they are gone. Idempotent. */
  close(): Promise<void>;
}

/**
 * Starts a group of local rank processes.
 *
 * @throws whatever opening the checkpoint or starting the ranks throws; no process is left then.
 */
export async function startLocalGroup(options: LocalGroupOptions): Promise<StartedGroup> {
  const checkpoint = openChecked(options.model, options.tp);
  const { tp, device } = options;
  const { spec } = planGroup(checkpoint, tp, options);
  const started: LocalRank[] = [];
  const stopAll = async (): Promise<void> => {
    await Promise.all(started.splice(0).map(stopLocalRank));
  };
  try {
    // What a rank has to say comes back as an error: a command's failure is one line.
    const starting = Array.from({ length: tp }, (_, rank) =>
      startLocalRank({
        threads: threadsPerRank(tp),
        device: deviceOfRank(device, rank),
        logLevel: 'silent',
      }),
    );
    const settled = await Promise.allSettled(starting);
    for (const result of settled) if (result.status === 'fulfilled') started.push(result.value);
    for (const result of settled) if (result.status === 'rejected') throw result.reason;
    const bars = new LoadBars(tp, process.stderr);
    const addresses = started.map(({ address }) => address);
    const onProgress = bars.progress.bind(bars);
    const ranks = await Ranks.connect(addresses, spec, { onProgress }).finally(() => {
      bars.end();
    });
    for (const warning of ranks.warnings) process.stderr.write(`caravan: ${warning}\n`);
    const close = async (): Promise<void> => {
      ranks.close();
      await stopAll();
    };
    return { checkpoint, ranks, spec, close };
  } catch (error) {
    await stopAll();
    throw error;
  }
}

/**
 * Runs `use` with a group of local rank processes, which end with it.
 *
 * @throws whatever starting the group or `use` throws.
 */
export async function withLocalGroup<T>(
  options: LocalGroupOptions,
  use: (group: LocalGroup) => Promise<T>,
): Promise<T> {
  const group = await startLocalGroup(options);
  try {
    return await use(group);
  } finally {
    await group.close();
  }
}
