/**
 * One rank's membership in a group: everything that lives as long as one coordinator holds the rank.
 */
import os from 'node:os';
import type { Checkpoint } from '../model/checkpoint.js';
import { kvBytes } from '../model/plan.js';
import { CaravanError } from '../proto/errors.js';
import type { Load } from '../proto/gen/cluster.js';
import { GroupAllReduce, SoloAllReduce, type AllReduce } from './all-reduce.js';
import { Forward } from './forward.js';
import { HostPass } from './host-pass.js';
import { KvCache } from './kv-cache.js';
import type { Lobby } from './lobby.js';
import type { Ort } from './ort.js';
import { Pacer } from './pacer.js';
import { meetPeers } from './peers.js';
import type { Shard } from './shard.js';
import { Workspace } from './workspace.js';

export class Group {
  readonly forward: Forward;
  readonly kvBytes: number;
  readonly #kv: KvCache;
  readonly #workspace: Workspace;
  readonly #allReduce: AllReduce;

  private constructor(forward: Forward, kv: KvCache, workspace: Workspace, allReduce: AllReduce) {
    this.forward = forward;
    this.#kv = kv;
    this.#workspace = workspace;
    this.#allReduce = allReduce;
    this.kvBytes = kv.byteCount;
  }

  /**
   * Reserves the KV cache and meets the peers: each calls each other.
   *
   * @throws CaravanError `out_of_memory`, `rank_unavailable`, or the signal's reason.
   */
  static async join(
    ort: Ort,
    shard: Shard,
    load: Load,
    lobby: Lobby,
    signal: AbortSignal,
  ): Promise<Group> {
    const { config, plan } = shard;
    refuseTooLittleMemory(kvBytes(config, plan, load.maxSeqLen, load.maxBatchSize));
    const pacer = new Pacer();
    const kv = new KvCache(ort, config, plan, load.maxSeqLen, load.maxBatchSize);
    const capacity = load.maxStepRows * config.hiddenSize;
    const peers = await meetPeers(load, capacity, lobby, signal);
    const allReduce =
      plan.tp === 1
        ? new SoloAllReduce(capacity, pacer)
        : new GroupAllReduce(plan.rank, peers, capacity, load.stepTimeoutMs, pacer);
    const workspace = new Workspace(
      ort,
      config,
      plan,
      load.maxStepRows,
      load.maxSeqLen,
      allReduce.partials,
    );
    const pass = new HostPass(shard, kv, workspace, allReduce);
    const forward = new Forward(pass, pacer);
    return new Group(forward, kv, workspace, allReduce);
  }

  /** Ends a step that is under way, with this error. */
  abort(error: CaravanError): void {
    this.#allReduce.abort(error);
  }

  /** Leaves the peers and frees the memory. No step may be under way. */
  close(): void {
    this.#allReduce.close();
    this.#workspace.release();
    this.#kv.release();
  }
}

/** The KV cache is committed as it fills: it is checked here, where it can still be said in one line. */
function refuseTooLittleMemory(byteCount: number): void {
  const total = os.totalmem();
  if (byteCount > total) {
    throw new CaravanError(
      'out_of_memory',
      `the KV cache needs ${byteCount} bytes, this machine has ${total}: lower max_seq_len or max_batch_size`,
    );
  }
}

/** Refuses a Load that this rank cannot serve, before anything is read. */
export function checkLoad(load: Load, checkpoint: Checkpoint): void {
  const refuse = (message: string): never => {
    throw new CaravanError('invalid_request', message);
  };
  if (load.rank >= load.peers.length) refuse(`rank ${load.rank} of ${load.peers.length}`);
  for (const field of ['maxSeqLen', 'maxBatchSize', 'maxStepRows', 'stepTimeoutMs'] as const) {
    if (load[field] < 1) refuse(`${field} is ${load[field]}; it must be at least 1`);
  }
  if (load.checkpointDigest !== checkpoint.digest) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${load.modelPath}: is not the checkpoint that the coordinator sees (digest ${checkpoint.digest})`,
    );
  }
}
