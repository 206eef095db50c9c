/**
 * The all-reduce of partials that lie on devices, done by the devices' streams: each writes its number into shared memory
 * when its partial is there, and goes on when the peers' are. The host gives the stream a whole step, and looks whether it is
 * done. Numbers and their places are those of the exchange by the host, so that a rank may do the one and its peer the other.
 *
 * A stream whose peer is dead would wait for ever, and nothing but a number ends its wait: the host writes it in the peer's
 * place. What is computed with it is thrown away, since the group ends.
 */
import { CaravanError } from '../proto/errors.js';
import type { MappedMemory, StreamSignals } from './direct-memory.js';
import type { Pacer } from './pacer.js';
import type { SharedSegment } from './shared-memory.js';

interface PeerSegment {
  readonly rank: number;
  readonly segment: SharedSegment;
}

/** Of the exchange by the host. */
interface Shared {
  /** Counts one more all-reduce. */
  next(): number;
  /** What ended the group; null as long as it lasts. */
  error(): CaravanError | null;
}

/** Looks at the stream between two looks at the clock. */
const LOOKS = 32;
/** A stream that was let go is done within this, or its device is lost. */
const LAST_MS = 10_000;

export class StreamExchange {
  readonly #signals: StreamSignals;
  readonly #own: SharedSegment;
  readonly #peers: readonly PeerSegment[];
  readonly #pacer: Pacer;
  readonly #timeoutMs: number;
  readonly #shared: Shared;
  readonly #mapped: MappedMemory[] = [];
  readonly #ownNumber: bigint;
  readonly #peerNumbers: readonly bigint[];
  #sequence = 0;

  /** @throws CaravanError in the device's words when it cannot reach shared memory. */
  constructor(
    signals: StreamSignals,
    own: SharedSegment,
    peers: readonly PeerSegment[],
    pacer: Pacer,
    timeoutMs: number,
    shared: Shared,
  ) {
    this.#signals = signals;
    this.#own = own;
    this.#peers = peers;
    this.#pacer = pacer;
    this.#timeoutMs = timeoutMs;
    this.#shared = shared;
    try {
      this.#ownNumber = this.#map(own);
      this.#peerNumbers = peers.map(({ segment }) => this.#map(segment));
    } catch (error) {
      this.release();
      throw error;
    }
  }

  /** As the exchange by the host, of a partial that the stream will have written; it goes on when the others' are there. */
  enqueue(turn: 0 | 1, count: number): void {
    const sequence = this.#shared.next();
    this.#sequence = sequence;
    this.#own.announce(turn, count);
    this.#signals.show(this.#ownNumber, sequence);
    for (const number of this.#peerNumbers) this.#signals.await(number, sequence);
  }

  /**
   * Waits until the stream has done everything.
   *
   * @throws CaravanError `rank_failed` when a peer is gone or does not answer in time.
   */
  async settle(): Promise<void> {
    const deadlineMs = performance.now() + this.#timeoutMs;
    for (;;) {
      for (let i = 0; i < LOOKS; i += 1) if (this.#signals.isIdle()) return;
      if (this.#pacer.isDue) await this.#pacer.yield();
      const error = this.#shared.error() ?? this.#late(deadlineMs);
      if (error === null) continue;
      this.#letGo();
      throw error;
    }
  }

  release(): void {
    for (const mapped of this.#mapped.splice(0)) mapped.release();
  }

  #map(segment: SharedSegment): bigint {
    const { address, byteCount } = segment.numberPage;
    const mapped = this.#signals.map(address, byteCount);
    this.#mapped.push(mapped);
    return mapped.address;
  }

  #late(deadlineMs: number): CaravanError | null {
    if (performance.now() < deadlineMs) return null;
    const late = this.#peers.find(({ segment }) => !segment.has(this.#sequence));
    const who = late === undefined ? 'the device' : `rank ${late.rank}`;
    return new CaravanError('rank_failed', `${who} sent no partial for ${this.#timeoutMs} ms`);
  }

  /** Ends the stream's waits. A living peer may write a smaller number meanwhile: again and again, then. */
  #letGo(): void {
    const lastMs = performance.now() + LAST_MS;
    do {
      for (const { segment } of this.#peers) segment.giveUp(this.#sequence);
    } while (!this.#signals.isIdle() && performance.now() < lastMs);
  }
}
