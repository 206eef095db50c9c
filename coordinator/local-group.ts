/**
 * A group of ranks on this machine for one command: started, connected, and stopped at its end.
 */
import {
  openCheckpoint,
  rankBytes,
  resolveModelPath,
  type Checkpoint,
} from '../model/checkpoint.js';
import { planRanks, slicesOf } from '../model/plan.js';
import { CaravanError } from '../proto/errors.js';
import { Transport, Weights } from '../proto/gen/cluster.js';
import type { Config } from './config.js';
import { startLocalRank, stopLocalRank, threadsPerRank, type LocalRank } from './local-ranks.js';
import { Ranks, type GroupSpec } from './ranks.js';

export interface LocalGroupOptions {
  readonly model: string | undefined;
  readonly tp: number;
  readonly device: string;
  readonly maxSeqLen: number | undefined;
  readonly maxBatchSize: number;
  readonly maxStepRows: number;
  /** `auto` if left out. */
  readonly transport?: Config['transport'];
}

const transports = {
  auto: Transport.TRANSPORT_UNSPECIFIED,
  grpc: Transport.TRANSPORT_GRPC,
  shm: Transport.TRANSPORT_SHM,
} as const;

export interface LocalGroup {
  readonly checkpoint: Checkpoint;
  readonly ranks: Ranks;
  readonly spec: GroupSpec;
}

export const DEFAULT_STEP_TIMEOUT_MS = 60_000;

/** Rows of one step, unless it is told otherwise. */
export const DEFAULT_MAX_STEP_ROWS = 512;

/**
 * What a group of this checkpoint is told.
 *
 * @throws CaravanError `invalid_request` when maxSeqLen is more than the checkpoint was trained for.
 */
export function groupSpec(
  checkpoint: Checkpoint,
  options: Pick<LocalGroupOptions, 'maxSeqLen' | 'maxBatchSize' | 'maxStepRows' | 'transport'>,
): GroupSpec {
  const { maxPositions } = checkpoint.config;
  const maxSeqLen = options.maxSeqLen ?? maxPositions;
  if (maxSeqLen > maxPositions) {
    throw new CaravanError(
      'bad_usage',
      `--max-seq-len ${maxSeqLen}: the model was trained for ${maxPositions} positions`,
    );
  }
  return {
    modelPath: checkpoint.path,
    checkpointDigest: checkpoint.digest,
    weights: Weights.WEIGHTS_FP32,
    maxSeqLen,
    maxBatchSize: options.maxBatchSize,
    // A decode of every slot must fit into a step.
    maxStepRows: Math.max(options.maxStepRows, options.maxBatchSize + 16),
    stepTimeoutMs: DEFAULT_STEP_TIMEOUT_MS,
    transport: transports[options.transport ?? 'auto'],
  };
}

/** Opens a checkpoint and checks every tensor that its ranks will read: before any process starts. */
export function openChecked(model: string | undefined, tp: number): Checkpoint {
  const checkpoint = openCheckpoint(resolveModelPath(model));
  for (const plan of planRanks(checkpoint.config, tp)) {
    rankBytes(checkpoint, slicesOf(checkpoint.config, plan));
  }
  return checkpoint;
}

/**
 * Runs `use` with a group of local rank processes, which end with it.
 *
 * @throws whatever opening the checkpoint, starting the ranks or `use` throws.
 */
export async function withLocalGroup<T>(
  options: LocalGroupOptions,
  use: (group: LocalGroup) => Promise<T>,
): Promise<T> {
  const checkpoint = openChecked(options.model, options.tp);
  const spec = groupSpec(checkpoint, options);
  const { tp, device } = options;
  const started: LocalRank[] = [];
  try {
    // What a rank has to say comes back as an error: a command's failure is one line.
    const starting = Array.from({ length: tp }, () =>
      startLocalRank({ threads: threadsPerRank(tp), device, logLevel: 'silent' }),
    );
    const settled = await Promise.allSettled(starting);
    for (const result of settled) if (result.status === 'fulfilled') started.push(result.value);
    for (const result of settled) if (result.status === 'rejected') throw result.reason;
    const ranks = await Ranks.connect(
      started.map(({ address }) => address),
      spec,
    );
    try {
      return await use({ checkpoint, ranks, spec });
    } finally {
      ranks.close();
    }
  } finally {
    await Promise.all(started.map(stopLocalRank));
  }
}
