/**
 * The all-reduce between the ranks of a group. It moves partials; the sum itself is taken inside the
 * next segment's graph, which has the partials of all ranks as inputs.
 *
 *   own partial ──> partials[turn][rank] ──> every peer
 *   peer r      ──> partials[turn][r]
 *
 * Two buffers a rank are used in turn: a peer can be one all-reduce ahead, never two, since it needs our
 * partial of this one to go on. Between ranks of one host the buffers lie in shared memory, and only a number
 * is written and waited for; between hosts they go as messages. Where devices can read each other's memory, partials stay
 * on them (`direct-memory`).
 */
import { CaravanError } from '../proto/errors.js';
import type { RankPartial } from '../proto/gen/cluster.js';
import type { Pacer } from './pacer.js';
import { FramedPartial } from './partial-codec.js';
import type { PeerLink, Peers } from './peers.js';
import type { DirectPartials, StreamSignals } from './direct-memory.js';
import { allocate } from './memory.js';
import { expectMessages } from './ort-memory.js';
import { mayRanksSpin } from './shared-memory.js';
import { StreamExchange } from './stream-exchange.js';

export type Turn = 0 | 1;

export interface AllReduce {
  /** (2 turns, tp) buffers of capacity elements. A rank writes its own before `exchange`. */
  readonly partials: readonly (readonly Float32Array[])[];
  /** Where partials lie instead, on the devices, if all ranks can read each other's; only that they are there is told then. */
  readonly direct: DirectPartials | null;
  /**
   * Gives our first `count` elements of this turn to every peer and waits until theirs are here.
   *
   * @returns null when they are here already, which costs no promise: a step has dozens of these.
   * @throws CaravanError `rank_failed` when a peer is gone or does not answer in time.
   */
  exchange(turn: Turn, count: number): Promise<void> | null;
  /**
   * Exchanges by a device's stream from now on, if partials are `direct`: `enqueue` in place of `exchange`, and `settle`
   * at the end of a step.
   *
   * @returns null where that cannot be.
   */
  attach(signals: StreamSignals): StreamExchange | null;
  /** Ends every wait with this error. */
  abort(error: CaravanError): void;
  close(): void;
}

/** TP 1: there is nobody to wait for. */
export class SoloAllReduce implements AllReduce {
  readonly partials: readonly (readonly Float32Array[])[];
  readonly direct = null;
  readonly #pacer: Pacer;
  #error: CaravanError | null = null;

  constructor(capacity: number, pacer: Pacer) {
    this.partials = [[allocate(capacity)], [allocate(capacity)]];
    this.#pacer = pacer;
  }

  exchange(): Promise<void> | null {
    if (this.#error !== null) throw this.#error;
    return this.#pacer.isDue ? this.#yield() : null;
  }

  async #yield(): Promise<void> {
    await this.#pacer.yield();
    if (this.#error !== null) throw this.#error;
  }

  attach(): null {
    return null;
  }

  abort(error: CaravanError): void {
    this.#error ??= error;
  }

  close(): void {
    // Nothing is open.
  }
}

/** How long a wait for shared memory spins before it sleeps. */
const SPIN_US = 300;
/** The longest sleep at once: then the event loop may be due. */
const SLEEP_MS = 2;

/** The ranks of a group, each joined to us by shared memory or by gRPC. */
export class GroupAllReduce implements AllReduce {
  readonly partials: readonly (readonly Float32Array[])[];
  readonly direct: DirectPartials | null;
  readonly #rank: number;
  readonly #peers: Peers;
  readonly #messagePeers: readonly PeerLink[];
  /** By turn: our partial as a message, where it is sent as one. Our own buffer, unless a peer sees that in shared memory. */
  readonly #framed: readonly FramedPartial[];
  readonly #memoryPeers: readonly { readonly rank: number; readonly link: PeerLink }[];
  readonly #spinUs: number;
  readonly #pacer: Pacer;
  readonly #timeoutMs: number;
  /** All-reduces begun; and, by peer, messages that have arrived, with the size of the last two. */
  #sequence = 0;
  readonly #arrived: number[];
  readonly #arrivedCounts: readonly [number[], number[]];
  #wake: (() => void) | null = null;
  #error: CaravanError | null = null;

  /** @param capacity elements of the largest partial. */
  constructor(rank: number, peers: Peers, capacity: number, timeoutMs: number, pacer: Pacer) {
    this.#rank = rank;
    this.#peers = peers;
    this.direct = peers.direct.partials;
    this.#pacer = pacer;
    this.#timeoutMs = timeoutMs;
    const { links } = peers;
    this.#messagePeers = links.filter((link) => link?.segment === null) as PeerLink[];
    if (this.#messagePeers.length > 0) expectMessages();
    this.#memoryPeers = links.flatMap((link, peer) =>
      link === null || link.segment === null ? [] : [{ rank: peer, link }],
    );
    this.#spinUs = mayRanksSpin(this.#memoryPeers.length + 1) ? SPIN_US : 0;
    this.#framed =
      this.#messagePeers.length === 0
        ? []
        : [new FramedPartial(capacity), new FramedPartial(capacity)];
    const buffer = (turn: Turn) => (link: PeerLink | null) => {
      const segment = link === null ? peers.segment : link.segment;
      if (segment !== null) return segment.turns[turn];
      return link === null ? this.#framed[turn]!.data : allocate(capacity);
    };
    this.partials = [links.map(buffer(0)), links.map(buffer(1))];
    this.#arrived = links.map(() => 0);
    this.#arrivedCounts = [links.map(() => 0), links.map(() => 0)];
    links.forEach((link, peer) => {
      if (link === null) return;
      const lost = (): void => {
        this.abort(new CaravanError('rank_failed', `rank ${peer} left the group`));
      };
      link.incoming.on('data', (partial: RankPartial) => {
        this.#receive(peer, partial);
      });
      link.incoming.on('error', lost);
      link.incoming.on('end', lost);
      link.outgoing.on('cancelled', lost);
      link.outgoing.on('error', lost);
    });
  }

  exchange(turn: Turn, count: number): Promise<void> | null {
    this.#sequence += 1;
    if (this.#messagePeers.length > 0) {
      const own = this.partials[turn]![this.#rank]!;
      const framed = this.#framed[turn]!;
      if (own !== framed.data) framed.data.set(own.subarray(0, count));
      // Not copied: who writes this turn's buffer again has the peers' next partials, so that they have this one.
      const message = framed.message(this.#sequence - 1, count);
      for (const { outgoing } of this.#messagePeers) outgoing.write(message);
    }
    this.#peers.segment?.publish(this.#sequence, turn, count);
    const isPlain = this.#messagePeers.length === 0 && this.#sequence > 1 && this.#error === null;
    if (!isPlain || !this.#isShown() || this.#pacer.isDue) return this.#wait(turn, count);
    this.#checkCounts(turn, count);
    return null;
  }

  /** Whether all peers in shared memory have shown their partial, or do so while we spin. */
  #isShown(): boolean {
    for (let i = 0; i < this.#memoryPeers.length; i += 1) {
      const { segment } = this.#memoryPeers[i]!.link;
      if (!segment!.has(this.#sequence) && !segment!.spin(this.#sequence, this.#spinUs))
        return false;
    }
    return true;
  }

  #checkCounts(turn: Turn, count: number): void {
    for (let i = 0; i < this.#memoryPeers.length; i += 1) {
      const { rank, link } = this.#memoryPeers[i]!;
      this.#checkCount(rank, link.segment!.count(turn), count);
    }
  }

  async #wait(turn: Turn, count: number): Promise<void> {
    const deadlineMs = performance.now() + this.#timeoutMs;
    // Some turns of the event loop, or our own partials would stay in the socket's queue.
    if (this.#messagePeers.length > 0) await this.#receiveAll(turn, count, deadlineMs);
    for (const { rank, link } of this.#memoryPeers) {
      const { segment } = link;
      while (!segment!.spin(this.#sequence, this.#spinUs)) {
        segment!.sleep(this.#sequence, SLEEP_MS);
        if (this.#pacer.isDue) await this.#pacer.yield();
        if (this.#error !== null) throw this.#error;
        if (performance.now() >= deadlineMs && !segment!.has(this.#sequence))
          throw this.#late(rank);
      }
    }
    this.#checkCounts(turn, count);
    if (this.#sequence === 1) {
      // Whoever has sent a partial has mapped all segments.
      this.#peers.segment?.unlink();
    }
    if (this.#pacer.isDue) await this.#pacer.yield();
    if (this.#error !== null) throw this.#error;
  }

  attach(signals: StreamSignals): StreamExchange | null {
    const { segment } = this.#peers;
    if (this.direct === null || segment === null) return null;
    const peers = this.#memoryPeers.map(({ rank, link }) => ({ rank, segment: link.segment! }));
    return new StreamExchange(signals, segment, peers, this.#pacer, this.#timeoutMs, {
      next: () => (this.#sequence += 1),
      error: () => this.#error,
    });
  }

  abort(error: CaravanError): void {
    this.#error ??= error;
    this.#wake?.();
  }

  close(): void {
    this.abort(new CaravanError('cancelled', 'the group was dissolved'));
    for (const link of this.#peers.links) {
      if (link === null) continue;
      // Streams that are cut report it as an error: nobody is interested.
      link.incoming.on('error', () => undefined);
      link.incoming.cancel();
      link.outgoing.end();
      link.segment?.close();
    }
    this.#peers.segment?.close();
    this.direct?.close();
  }

  async #receiveAll(turn: Turn, count: number, deadlineMs: number): Promise<void> {
    do {
      await this.#pacer.yield();
      if (this.#error !== null) throw this.#error;
      if (!this.#isWhole()) await this.#waitForArrival(deadlineMs);
    } while (!this.#isWhole());
    this.#peers.links.forEach((link, peer) => {
      if (link?.segment === null) this.#checkCount(peer, this.#arrivedCounts[turn][peer]!, count);
    });
  }

  #checkCount(peer: number, got: number, count: number): void {
    if (got === count) return;
    throw new CaravanError('internal', `rank ${peer} sent ${got} elements, not ${count}`);
  }

  #isWhole(): boolean {
    return this.#peers.links.every(
      (link, peer) => link?.segment !== null || this.#arrived[peer]! >= this.#sequence,
    );
  }

  async #waitForArrival(deadlineMs: number): Promise<void> {
    const leftMs = deadlineMs - performance.now();
    await new Promise<void>((resolve) => {
      const timer = setTimeout(resolve, Math.max(0, leftMs));
      this.#wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
    this.#wake = null;
    this.#pacer.served();
    if (this.#error !== null) throw this.#error;
    if (!this.#isWhole() && performance.now() >= deadlineMs) {
      throw this.#late(
        this.#peers.links.findIndex(
          (link, peer) => link?.segment === null && this.#arrived[peer]! < this.#sequence,
        ),
      );
    }
  }

  #late(rank: number): CaravanError {
    return new CaravanError(
      'rank_failed',
      `rank ${rank} sent no partial for ${this.#timeoutMs} ms`,
    );
  }

  #receive(peer: number, { sequence, data }: RankPartial): void {
    const expected = this.#arrived[peer]!;
    const turn = (expected & 1) as Turn;
    const target = this.partials[turn]![peer]!;
    if (sequence !== expected >>> 0 || data.length > target.byteLength || data.length % 4 !== 0) {
      this.abort(
        new CaravanError('internal', `rank ${peer} sent partial ${sequence}, not ${expected}`),
      );
      return;
    }
    new Uint8Array(target.buffer, target.byteOffset, data.length).set(data);
    this.#arrivedCounts[turn][peer] = data.length / 4;
    this.#arrived[peer] = expected + 1;
    if (this.#isWhole()) this.#wake?.();
  }
}
