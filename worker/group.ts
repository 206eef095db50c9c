/**
 * One rank's membership in a group: everything that lives as long as one coordinator holds the rank.
 */
import type { Checkpoint } from '../model/checkpoint.js';
import { CaravanError } from '../proto/errors.js';
import type { Load, Loaded } from '../proto/gen/cluster.js';
import type { LinkSecurity } from '../proto/link-security.js';
import { GroupAllReduce, SoloAllReduce, type AllReduce } from './all-reduce.js';
import type { LoadedShard, OpenPass } from './device.js';
import { Forward } from './forward.js';
import type { Lobby } from './lobby.js';
import { Pacer } from './pacer.js';
import { describePeers, meetPeers } from './peers.js';

export type GroupFigures = Pick<Loaded, 'kvBytes' | 'transport' | 'directFault'>;

export class Group {
  readonly forward: Forward;
  /** What the coordinator is told of it. */
  readonly figures: GroupFigures;
  readonly #open: OpenPass;
  readonly #allReduce: AllReduce;

  private constructor(
    forward: Forward,
    figures: GroupFigures,
    open: OpenPass,
    allReduce: AllReduce,
  ) {
    this.forward = forward;
    this.figures = figures;
    this.#open = open;
    this.#allReduce = allReduce;
  }

  /**
   * Reserves the KV cache and meets the peers: each calls each other.
   *
   * @throws CaravanError `out_of_memory`, `rank_unavailable`, or the signal's reason.
   */
  static async join(
    shard: LoadedShard,
    load: Load,
    lobby: Lobby,
    signal: AbortSignal,
    security: LinkSecurity | null = null,
  ): Promise<Group> {
    const { config, plan } = shard;
    const pacer = new Pacer();
    const capacity = load.maxStepRows * config.hiddenSize;
    const { directMemory } = shard;
    const peers = await meetPeers(load, capacity, lobby, signal, security, directMemory);
    const allReduce =
      plan.tp === 1
        ? new SoloAllReduce(capacity, pacer)
        : new GroupAllReduce(plan.rank, peers, capacity, load.stepTimeoutMs, pacer);
    try {
      const open = await shard.openPass(load, allReduce);
      const figures = { kvBytes: shard.kvBytes(load), ...describePeers(peers) };
      return new Group(new Forward(open.pass, pacer), figures, open, allReduce);
    } catch (error) {
      allReduce.close();
      throw error;
    }
  }

  /** Ends a step that is under way, with this error. */
  abort(error: CaravanError): void {
    this.#allReduce.abort(error);
  }

  /** Leaves the peers and frees the memory. No step may be under way. */
  close(): void {
    this.#allReduce.abort(new CaravanError('cancelled', 'the group was dissolved'));
    // What is bound to the peers' memory goes before it.
    this.#open.release();
    this.#allReduce.close();
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
