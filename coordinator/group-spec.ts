/**
 * What a group of ranks is told, and what that means for memory. Arithmetic, but for the size of this machine.
 */
import os from 'node:os';
import path from 'node:path';
import type { Checkpoint } from '../model/checkpoint.js';
import { deviceCodes, parseDevice } from '../model/device-name.js';
import { kvBytes, planRanks, type RankPlan } from '../model/plan.js';
import { shapeOf } from '../model/stored-tensor.js';
import {
  graphBytes,
  kvCodes,
  kvElementBytes,
  modesOfDevice,
  weightBytes,
  weightForms,
  weightsCodes,
  type KvMode,
  type WeightForms,
  type WeightsMode,
} from '../model/weights.js';
import { CaravanError } from '../proto/errors.js';
import {
  Transport,
  type DeviceKind,
  type KvForm,
  type WeightCache,
  type Weights,
} from '../proto/gen/cluster.js';
import type { Config } from './config.js';

/** What a group is to load; every rank is told all of it. */
export interface GroupSpec {
  readonly modelPath: string;
  readonly checkpointDigest: string;
  readonly weights: Weights;
  readonly isExact: boolean;
  readonly maxSeqLen: number;
  readonly maxBatchSize: number;
  readonly maxStepRows: number;
  readonly stepTimeoutMs: number;
  readonly transport: Transport;
  /** Left out where weights are not kept for the next start. */
  readonly weightCache: WeightCache | undefined;
  readonly device: DeviceKind;
  readonly kv: KvForm;
  /** With fewer bits, where a device turns out to have no room for this one; null if there is none. */
  readonly smaller: GroupSpec | null;
}

export interface GroupLimits {
  readonly weights: Config['weights'];
  readonly exact: boolean;
  readonly maxSeqLen: number | undefined;
  readonly maxBatchSize: number;
  readonly maxStepRows: number;
  /** `auto` if left out. */
  readonly transport?: Config['transport'];
  /** Where ranks keep their weights for the next start; nowhere if left out. */
  readonly keptWeights?: WeightCache | undefined;
  /** What all ranks compute on; `cpu` if left out. */
  readonly device?: string;
  /** `auto` if left out. */
  readonly kv?: KvMode;
}

/** The settings of the weight cache, which every command that starts or drives ranks takes. */
export const weightCacheSettingNames = ['weightCache', 'weightCacheMax'] as const;

/** What ranks are told of the weight cache. A folder is one of theirs: relative ones mean nothing to them. */
export function weightCacheTerms(
  s: Pick<Config, (typeof weightCacheSettingNames)[number]>,
): WeightCache | undefined {
  if (s.weightCache === 'off') return undefined;
  const folder = s.weightCache === undefined ? '' : path.resolve(s.weightCache);
  return { folder, maxBytes: s.weightCacheMax };
}

/** A group that can be: its spec, and what every rank holds. */
export interface PlannedGroup {
  readonly spec: GroupSpec;
  readonly weights: WeightsMode;
  readonly forms: WeightForms;
  readonly ranks: readonly {
    readonly plan: RankPlan;
    readonly weightBytes: number;
    readonly kvBytes: number;
    /** What a GPU's graphs take beside them. */
    readonly graphBytes: number;
  }[];
  /** All ranks together. */
  readonly neededBytes: number;
  /** What is taken in its place where a device has no room for it. */
  readonly smaller: PlannedGroup | null;
}

/** Bytes that the fullest device holds. */
export const fullestBytes = ({ ranks }: PlannedGroup): number =>
  Math.max(...ranks.map((rank) => rank.weightBytes + rank.kvBytes + rank.graphBytes));

/** What comes of a group on devices that have so much free: the first that fits, else the smallest. */
export function fitting(group: PlannedGroup, freeBytes: number): PlannedGroup {
  if (group.smaller === null || fullestBytes(group) <= freeBytes) return group;
  return fitting(group.smaller, freeBytes);
}

export const DEFAULT_STEP_TIMEOUT_MS = 60_000;

/** Rows of one step, unless it is told otherwise. */
export const DEFAULT_MAX_STEP_ROWS = 512;

/** Below it a model is quick as it is, and small enough to suffer from fewer bits. */
const SMALL_PARAMETER_COUNT = 50e6;
/** What `auto` leaves to everything else on the machine. */
const USABLE_MEMORY = 0.9;

const transports = {
  auto: Transport.TRANSPORT_UNSPECIFIED,
  grpc: Transport.TRANSPORT_GRPC,
  shm: Transport.TRANSPORT_SHM,
  direct: Transport.TRANSPORT_DIRECT,
} as const;

/**
 * Plans a group.
 *
 * @param machineBytes memory that all ranks share; `auto` chooses by it.
 * @throws CaravanError `illegal_tp`, or `bad_usage` when maxSeqLen is more than the checkpoint was trained for or
 *   the weights mode cannot be exact.
 */
export function planGroup(
  checkpoint: Checkpoint,
  tp: number,
  limits: GroupLimits,
  machineBytes = os.totalmem(),
): PlannedGroup {
  const { maxPositions } = checkpoint.config;
  const maxSeqLen = limits.maxSeqLen ?? maxPositions;
  if (maxSeqLen > maxPositions) {
    throw new CaravanError(
      'bad_usage',
      `--max-seq-len ${maxSeqLen}: the model was trained for ${maxPositions} positions`,
    );
  }
  if (limits.exact && limits.weights === 'int4+int8') {
    throw new CaravanError(
      'bad_usage',
      '--weights int4+int8 chooses by the number of rows and cannot be --exact: use int8, int4 or fp32',
    );
  }
  const device = parseDevice(limits.device ?? 'cpu').kind;
  if (limits.exact && device !== 'cpu') {
    throw new CaravanError(
      'bad_usage',
      `--exact: ${device} takes other kernels for other numbers of rows; only cpu promises the same bits`,
    );
  }
  const kv = limits.kv ?? 'auto';
  if (kv === 'int8' && limits.exact) {
    throw new CaravanError(
      'bad_usage',
      '--kv int8 rounds by what was computed before and cannot be --exact',
    );
  }
  if (kv === 'int8' && device !== 'cpu') {
    throw new CaravanError('bad_usage', `--kv int8: ${device} holds keys and values as floats`);
  }
  const modes = modesOfDevice[device];
  if (limits.weights !== 'auto' && !modes.includes(limits.weights)) {
    const rule = `${device} takes ${modes.join(', ')}`;
    throw new CaravanError('bad_usage', `--weights ${limits.weights}: ${rule}`);
  }
  const planned = (weights: WeightsMode, smaller: PlannedGroup | null = null): PlannedGroup => {
    const forms = weightForms(checkpoint.config, tp, weights, limits.exact, device);
    const ranks = planRanks(checkpoint.config, tp, forms.ffnGrid).map((plan) => ({
      plan,
      weightBytes: weightBytes(checkpoint.config, plan, forms),
      kvBytes: kvBytes(
        checkpoint.config,
        plan,
        maxSeqLen,
        limits.maxBatchSize,
        kvElementBytes(device, weights, kv),
      ),
      graphBytes: graphBytes(checkpoint.config, forms, device),
    }));
    const spec: GroupSpec = {
      modelPath: checkpoint.path,
      checkpointDigest: checkpoint.digest,
      weights: weightsCodes[weights],
      isExact: limits.exact,
      maxSeqLen,
      maxBatchSize: limits.maxBatchSize,
      // A decode of every slot must fit into a step.
      maxStepRows: Math.max(limits.maxStepRows, limits.maxBatchSize + 16),
      stepTimeoutMs: DEFAULT_STEP_TIMEOUT_MS,
      transport: transports[limits.transport ?? 'auto'],
      weightCache: limits.keptWeights,
      device: deviceCodes[device],
      kv: kvCodes[kv],
      smaller: smaller?.spec ?? null,
    };
    const neededBytes = ranks.reduce(
      (sum, rank) => sum + rank.weightBytes + rank.kvBytes + rank.graphBytes,
      0,
    );
    return { spec, weights, forms, ranks, neededBytes, smaller };
  };
  if (limits.weights !== 'auto') return planned(limits.weights);
  if (parameterCount(checkpoint) < SMALL_PARAMETER_COUNT) return planned('fp32');
  // What is free on a device its rank alone can tell: it refuses what does not fit.
  if (device === 'webgpu') return planned('fp16', planned('int4'));
  if (device === 'cuda') return planned('fp16', planned('int8', planned('int4')));
  if (limits.exact) return planned('int8');
  const both = planned('int4+int8');
  return both.neededBytes <= USABLE_MEMORY * machineBytes ? both : planned('int4');
}

export function parameterCount({ tensors }: Checkpoint): number {
  let sum = 0;
  for (const source of tensors.values()) sum += shapeOf(source).reduce((a, b) => a * b, 1);
  return sum;
}
