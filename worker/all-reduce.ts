/**
 * The all-reduce between the ranks of a group. It moves partials; the sum itself is taken inside the
 * next segment's graph, which has the partials of all ranks as inputs.
 *
 *   own partial ──> partials[turn][rank] ──> every peer
 *   peer r      ──> partials[turn][r]
 *
 * Two buffers a rank are used in turn: a peer can be one all-reduce ahead, never two, since it needs our
 * partial of this one to go on.
 */
import {
  Metadata,
  credentials,
  type ClientDuplexStream,
  type ServerDuplexStream,
} from '@grpc/grpc-js';
import { CaravanError } from '../proto/errors.js';
import { PeerClient, type RankPartial } from '../proto/gen/cluster.js';
import type { Pacer } from './pacer.js';
import { allocate } from './shard.js';

export type Turn = 0 | 1;

export interface AllReduce {
  /** (2 turns, tp) buffers of capacity elements. A rank writes its own before `exchange`. */
  readonly partials: readonly (readonly Float32Array[])[];
  /**
   * Gives our first `count` elements of this turn to every peer and waits until theirs are here.
   *
   * @throws CaravanError `rank_failed` when a peer is gone or does not answer in time.
   */
  exchange(turn: Turn, count: number): Promise<void>;
  /** Ends every wait with this error. */
  abort(error: CaravanError): void;
  close(): void;
}

/** TP 1: there is nobody to wait for. */
export class SoloAllReduce implements AllReduce {
  readonly partials: readonly (readonly Float32Array[])[];
  readonly #pacer: Pacer;
  #error: CaravanError | null = null;

  constructor(capacity: number, pacer: Pacer) {
    this.partials = [[allocate(capacity)], [allocate(capacity)]];
    this.#pacer = pacer;
  }

  async exchange(): Promise<void> {
    if (this.#pacer.isDue) await this.#pacer.yield();
    if (this.#error !== null) throw this.#error;
  }

  abort(error: CaravanError): void {
    this.#error ??= error;
  }

  close(): void {
    // Nothing is open.
  }
}

export type PeerCall =
  ClientDuplexStream<RankPartial, RankPartial> | ServerDuplexStream<RankPartial, RankPartial>;

/** Partials over one gRPC stream per pair of ranks. */
export class GrpcAllReduce implements AllReduce {
  readonly partials: readonly (readonly Float32Array[])[];
  readonly #rank: number;
  readonly #calls: readonly (PeerCall | null)[];
  readonly #pacer: Pacer;
  readonly #timeoutMs: number;
  /** All-reduces begun; and, by peer, partials that have arrived, with the size of the last two. */
  #sequence = 0;
  readonly #arrived: number[];
  readonly #arrivedCounts: readonly [number[], number[]];
  #wake: (() => void) | null = null;
  #error: CaravanError | null = null;

  /** @param calls one open stream per rank, null at our own place. */
  constructor(
    rank: number,
    calls: readonly (PeerCall | null)[],
    capacity: number,
    timeoutMs: number,
    pacer: Pacer,
  ) {
    this.#rank = rank;
    this.#calls = calls;
    this.#pacer = pacer;
    this.#timeoutMs = timeoutMs;
    const buffers = () => calls.map(() => allocate(capacity));
    this.partials = [buffers(), buffers()];
    this.#arrived = calls.map(() => 0);
    this.#arrivedCounts = [calls.map(() => 0), calls.map(() => 0)];
    calls.forEach((call, peer) => {
      if (call === null) return;
      call.on('data', (partial: RankPartial) => {
        this.#receive(peer, partial);
      });
      const lost = (): void => {
        this.abort(new CaravanError('rank_failed', `rank ${peer} left the group`));
      };
      call.on('error', lost);
      call.on('end', lost);
      call.on('cancelled', lost);
    });
  }

  async exchange(turn: Turn, count: number): Promise<void> {
    const own = this.partials[turn]![this.#rank]!;
    const partial: RankPartial = {
      sequence: this.#sequence >>> 0,
      data: Buffer.from(own.buffer, own.byteOffset, 4 * count),
    };
    this.#sequence += 1;
    // The message is serialized (copied) within write(): the buffer is free again after it.
    for (const call of this.#calls) call?.write(partial);
    const deadlineMs = performance.now() + this.#timeoutMs;
    // One turn of the event loop at least, or our own partials would stay in the socket's queue.
    do {
      await this.#pacer.yield();
      if (this.#error !== null) throw this.#error;
      if (!this.#isWhole()) await this.#waitForArrival(deadlineMs);
    } while (!this.#isWhole());
    for (let peer = 0; peer < this.#calls.length; peer += 1) {
      const got = this.#arrivedCounts[turn][peer]!;
      if (this.#calls[peer] !== null && got !== count) {
        throw new CaravanError('internal', `rank ${peer} sent ${got} elements, not ${count}`);
      }
    }
  }

  abort(error: CaravanError): void {
    this.#error ??= error;
    this.#wake?.();
  }

  close(): void {
    this.abort(new CaravanError('cancelled', 'the group was dissolved'));
    for (const call of this.#calls) {
      if (call === null) continue;
      // A stream that was cancelled reports it as an error: nobody is interested.
      call.on('error', () => undefined);
      if ('cancel' in call) call.cancel();
      else call.end();
    }
  }

  #isWhole(): boolean {
    return this.#arrived.every((n, peer) => peer === this.#rank || n >= this.#sequence);
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
      const late = this.#arrived.findIndex((n, peer) => peer !== this.#rank && n < this.#sequence);
      throw new CaravanError(
        'rank_failed',
        `rank ${late} sent no partial for ${this.#timeoutMs} ms`,
      );
    }
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

/** Options of every stream between ranks: large messages, large windows, dead peers noticed. */
export const peerChannelOptions = {
  'grpc.max_receive_message_length': -1,
  'grpc.max_send_message_length': -1,
  'grpc-node.flow_control_window': 32 * 1024 * 1024,
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 10_000,
};

export const GROUP_KEY = 'caravan-group';
export const RANK_KEY = 'caravan-rank';

/** Opens the stream to a lower rank, and waits until that rank has taken us into the group. */
export async function dialPeer(
  address: string,
  group: string,
  rank: number,
  signal: AbortSignal,
): Promise<PeerCall> {
  const client = new PeerClient(address, credentials.createInsecure(), {
    ...peerChannelOptions,
    'grpc.use_local_subchannel_pool': 1,
  });
  const metadata = new Metadata({ waitForReady: true });
  metadata.set(GROUP_KEY, group);
  metadata.set(RANK_KEY, String(rank));
  const call = client.exchange(metadata);
  call.on('close', () => {
    client.close();
  });
  return new Promise((resolve, reject) => {
    const cancel = (): void => {
      call.cancel();
    };
    signal.addEventListener('abort', cancel, { once: true });
    call.once('metadata', () => {
      signal.removeEventListener('abort', cancel);
      resolve(call);
    });
    call.on('error', (cause: Error) => {
      const message = `the peer at ${address} does not answer: ${cause.message}`;
      reject(new CaravanError('rank_unavailable', message, { cause }));
    });
  });
}
