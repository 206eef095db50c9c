/**
 * What a rank computes on. Two kinds: host memory (`host-device`), and the memory of a device that ONNX Runtime's
 * IoBinding reaches (`bound-device`).
 */
import type { LlamaConfig } from '../model/config.js';
import type { DeviceKind } from '../model/device-name.js';
import type { RankPlan } from '../model/plan.js';
import type { KvForm, LoadProgress, WeightCache } from '../proto/gen/cluster.js';
import type { AllReduce } from './all-reduce.js';
import type { DirectMemory } from './direct-memory.js';
import type { Pass } from './pass.js';
import type { WeightsOrigin } from './weight-cache.js';

/** What a group asks of a rank's memory. */
export interface GroupLimits {
  readonly maxSeqLen: number;
  readonly maxBatchSize: number;
  readonly maxStepRows: number;
  /** How keys and values are held; floats if left out. */
  readonly kv?: KvForm;
}

export interface LoadTerms extends GroupLimits {
  /** Where weights are kept for the next start; undefined where they are not. */
  readonly weightCache?: WeightCache | undefined;
}

/** One rank's slices of the model, loaded; they outlive the groups that use them. */
export interface LoadedShard {
  readonly config: LlamaConfig;
  readonly plan: RankPlan;
  /** Bytes of weights as held in memory. */
  readonly weightBytes: number;
  /** Bytes of slices that were read for it. */
  readonly bytesRead: number;
  /** Bytes of the weight cache that it lies in; 0 when it came from the checkpoint. */
  readonly cachedBytes: number;
  /** Why it was not kept for the next start; empty where it was, or need not be. */
  readonly cacheFault: string;
  /** Memory of its device that peers can read; null where there is none. */
  readonly directMemory: DirectMemory | null;
  /** Why steps that come again are not given to the device as one; empty where they are, or no such device does it. */
  captureFault(): string;
  /** Bytes that a group's KV cache takes. */
  kvBytes(limits: GroupLimits): number;
  /** Reserves what a group needs. @throws CaravanError `out_of_memory`. */
  openPass(limits: GroupLimits, allReduce: AllReduce): Promise<OpenPass>;
  release(): void;
}

export interface OpenPass {
  readonly pass: Pass;
  /** No step may be under way. */
  release(): void;
}

export interface DeviceMemory {
  readonly freeBytes: number;
  readonly totalBytes: number;
}

export interface Device {
  /** As in --device. */
  readonly name: string;
  readonly kind: DeviceKind;
  /** Of its own; null where it has none, or it cannot be known. */
  memory(): DeviceMemory | null;
  /** Numbers of the devices of its kind whose memory it can read; null where that cannot be, or be known. */
  readablePeers(): readonly number[] | null;
  /**
   * Reads a rank's slices and puts them on the device.
   *
   * @param terms of the group that they are for: what does not fit is refused before anything is read.
   * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the signal aborts.
   */
  load(
    origin: WeightsOrigin,
    terms: LoadTerms,
    onProgress: (progress: LoadProgress) => void,
    signal: AbortSignal,
  ): Promise<LoadedShard>;
}
