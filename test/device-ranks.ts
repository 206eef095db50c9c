/** Ranks in this process, on whatever device, over their real gRPC service. */
import { planGroup, type GroupSpec } from '../coordinator/group-spec.js';
import { Ranks } from '../coordinator/ranks.js';
import { openCheckpoint } from '../model/checkpoint.js';
import type { DeviceKind } from '../model/device-name.js';
import { BoundDevice } from '../worker/bound-device.js';
import type { Capturer } from '../worker/device-launch.js';
import { Ort } from '../worker/ort.js';
import { RankServer } from '../worker/service.js';

const silent = { info: () => undefined, warn: () => undefined };

export interface DeviceGroupLimits {
  readonly tp: number;
  readonly weights: 'fp32' | 'fp16' | 'int8' | 'int4';
  readonly maxSeqLen: number;
  readonly maxBatchSize: number;
  readonly maxStepRows: number;
  /** What is taken where `weights` do not fit, one after the other. */
  readonly smaller?: readonly DeviceGroupLimits['weights'][];
  readonly memoryLimit?: number;
  /** Of steps that come again; none if left out. */
  readonly capturer?: Capturer;
  /** Most rows of a slot that a run of attention takes; found out if left out. */
  readonly attentionRows?: number | undefined;
}

// The library is loaded once a process.
const ort = new Ort(1);

/**
 * Runs `use` with a group whose ranks compute the graphs of `kind` in host memory, through IoBinding; `again` ends it and
 * gives another one of the same ranks.
 */
export async function withHostMemoryDevices<T>(
  folder: string,
  kind: DeviceKind,
  limits: DeviceGroupLimits,
  use: (ranks: Ranks, again: () => Promise<Ranks>) => Promise<T>,
): Promise<T> {
  const { memoryLimit = null, attentionRows = null, capturer = null } = limits;
  const servers = Array.from({ length: limits.tp }, () => {
    const settings = { kind, memoryLimit, attentionRows, capturer };
    const device = new BoundDevice(ort, { kind: 'cpu' }, settings);
    return new RankServer(device, silent);
  });
  try {
    const ports = await Promise.all(servers.map((server) => server.listen('127.0.0.1:0')));
    const plan = (weights: DeviceGroupLimits['weights']) =>
      planGroup(openCheckpoint(folder), limits.tp, {
        ...{ ...limits, weights, exact: false, device: kind },
        // Ranks of one process cannot sleep for each other.
        transport: 'grpc',
      }).spec;
    const spec = [limits.weights, ...(limits.smaller ?? [])].reduceRight<GroupSpec | null>(
      (smaller, weights) => ({ ...plan(weights), smaller }),
      null,
    )!;
    const addresses = ports.map((port) => `127.0.0.1:${port}`);
    let ranks = await Ranks.connect(addresses, spec);
    const again = async (): Promise<Ranks> => {
      ranks.close();
      ranks = await Ranks.connect(addresses, spec);
      return ranks;
    };
    try {
      return await use(ranks, again);
    } finally {
      ranks.close();
    }
  } finally {
    for (const server of servers) server.stop();
  }
}
