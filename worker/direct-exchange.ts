/**
 * Whether the ranks of a group read each other's partials on their devices: all of them do, or none. Each offers its block
 * when it meets a peer, opens all others', and shows in shared memory what came of it.
 */
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { Transport, type Load } from '../proto/gen/cluster.js';
import { DirectOffer, type DirectMemory, type DirectPartials } from './direct-memory.js';
import type { SharedSegment } from './shared-memory.js';

export interface DirectExchange {
  readonly partials: DirectPartials | null;
  /** Why not; empty where they are, or where nobody asked. */
  readonly fault: string;
}

/** What a rank tells its peers: its block's handle, or, where that is empty, why there is none. */
export interface DirectWord {
  readonly handle: string;
  readonly fault: string;
}

interface PeerWord extends DirectWord {
  /** If we share memory. */
  readonly segment: SharedSegment | null;
}

/** How often it is looked whether all peers have opened all blocks. */
const LOOK_EVERY_MS = 2;

export class DirectNegotiation {
  readonly #load: Pick<Load, 'rank' | 'peers' | 'transport'>;
  readonly #offer: DirectOffer | null;
  /** Why we offer nothing. */
  readonly #fault: string;

  /** @param memory null where the device has none that others could read. */
  constructor(
    load: Pick<Load, 'rank' | 'peers' | 'transport' | 'group'>,
    capacity: number,
    memory: DirectMemory | null,
    hasSegment: boolean,
  ) {
    this.#load = load;
    const { transport, group, rank } = load;
    const isAsked =
      transport === Transport.TRANSPORT_UNSPECIFIED || transport === Transport.TRANSPORT_DIRECT;
    let offer: DirectOffer | null = null;
    let fault = '';
    if (memory === null) {
      // Nothing that a user of such a device would expect.
      if (transport === Transport.TRANSPORT_DIRECT) {
        fault = `the device of rank ${rank} has no memory that others can read`;
      }
    } else if (isAsked && !hasSegment) {
      fault = `rank ${rank} has no shared memory to tell the others that it has written`;
    } else if (isAsked) {
      try {
        offer = new DirectOffer(memory, group, rank, capacity);
      } catch (error) {
        fault = `rank ${rank} shares none of its memory: ${toCaravanError(error).message}`;
      }
    }
    this.#offer = offer;
    this.#fault = fault;
  }

  /** For peers. */
  get word(): DirectWord {
    return { handle: this.#offer?.handle ?? '', fault: this.#fault };
  }

  /** @throws CaravanError `invalid_request` when it is demanded, and one of us has none: then nobody waits for the other. */
  hear(peer: number, { handle, fault }: DirectWord): void {
    // It has heard the same of us, and waits for nobody either.
    if (this.#offer === null) this.#refuse(this.#fault);
    if (handle === '')
      this.#refuse(fault === '' ? `rank ${peer} offers none of its memory` : fault);
  }

  /**
   * @param peers by rank; null at our own place.
   * @param own our segment.
   * @throws CaravanError `invalid_request` when it is demanded and cannot be had; or the signal's reason.
   */
  async agree(
    peers: readonly (PeerWord | null)[],
    own: SharedSegment | null,
    signal: AbortSignal,
  ): Promise<DirectExchange> {
    const fault = await this.#agree(peers, own, signal);
    if (fault === null) return { partials: this.#offer!.accept(), fault: '' };
    this.close();
    this.#refuse(fault);
    return { partials: null, fault };
  }

  close(): void {
    this.#offer?.close();
  }

  #refuse(fault: string): void {
    if (this.#load.transport !== Transport.TRANSPORT_DIRECT) return;
    throw new CaravanError('invalid_request', `--transport direct: ${fault}`);
  }

  /** @returns what keeps the group from it, or null. */
  async #agree(
    peers: readonly (PeerWord | null)[],
    own: SharedSegment | null,
    signal: AbortSignal,
  ): Promise<string | null> {
    const offer = this.#offer;
    // All ranks see alike who offers and who shares memory: none waits for a verdict that does not come.
    if (offer === null) return this.#fault;
    const others = peers.flatMap((peer, rank) => (peer === null ? [] : [{ rank, ...peer }]));
    const far = others.find(({ segment }) => segment === null);
    if (far !== undefined) return `rank ${far.rank} shares no memory with rank ${this.#load.rank}`;
    const silent = others.find(({ handle }) => handle === '');
    if (silent !== undefined)
      return silent.fault || `rank ${silent.rank} offers none of its memory`;
    const faults = others.map(({ rank, handle }) => offer.open(rank, handle));
    const first = faults.find((fault) => fault !== null) ?? '';
    own!.declare(first);
    const verdicts = [first];
    for (const { segment } of others) {
      let verdict = segment!.declared();
      while (verdict === null) {
        await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY_MS));
        signal.throwIfAborted();
        verdict = segment!.declared();
      }
      verdicts.push(verdict);
    }
    return verdicts.find((verdict) => verdict !== '') ?? null;
  }
}
