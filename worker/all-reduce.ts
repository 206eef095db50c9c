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
import { Client, credentials, type ClientReadableStream } from '@grpc/grpc-js';
import { CaravanError } from '../proto/errors.js';
import type { RankPartial } from '../proto/gen/cluster.js';
import type { PeerCall } from './lobby.js';
import type { Pacer } from './pacer.js';
import { decodePartial, encodePartial, partialsMethod } from './partial-codec.js';
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

/** The two streams that join us to a peer: one it sends on, one we send on. */
export interface PeerStreams {
  readonly incoming: ClientReadableStream<RankPartial>;
  readonly outgoing: PeerCall;
}

/** Partials over gRPC: each rank calls each other rank, and receives on the call that it made. */
export class GrpcAllReduce implements AllReduce {
  readonly partials: readonly (readonly Float32Array[])[];
  readonly #rank: number;
  readonly #peers: readonly (PeerStreams | null)[];
  readonly #pacer: Pacer;
  readonly #timeoutMs: number;
  /** All-reduces begun; and, by peer, partials that have arrived, with the size of the last two. */
  #sequence = 0;
  readonly #arrived: number[];
  readonly #arrivedCounts: readonly [number[], number[]];
  #wake: (() => void) | null = null;
  #error: CaravanError | null = null;

  /** @param peers one pair of streams per rank, null at our own place. */
  constructor(
    rank: number,
    peers: readonly (PeerStreams | null)[],
    capacity: number,
    timeoutMs: number,
    pacer: Pacer,
  ) {
    this.#rank = rank;
    this.#peers = peers;
    this.#pacer = pacer;
    this.#timeoutMs = timeoutMs;
    const buffers = () => peers.map(() => allocate(capacity));
    this.partials = [buffers(), buffers()];
    this.#arrived = peers.map(() => 0);
    this.#arrivedCounts = [peers.map(() => 0), peers.map(() => 0)];
    peers.forEach((streams, peer) => {
      if (streams === null) return;
      const lost = (): void => {
        this.abort(new CaravanError('rank_failed', `rank ${peer} left the group`));
      };
      streams.incoming.on('data', (partial: RankPartial) => {
        this.#receive(peer, partial);
      });
      streams.incoming.on('error', lost);
      streams.incoming.on('end', lost);
      streams.outgoing.on('cancelled', lost);
      streams.outgoing.on('error', lost);
    });
  }

  async exchange(turn: Turn, count: number): Promise<void> {
    const own = this.partials[turn]![this.#rank]!;
    // The message is a copy: the buffer is free again.
    const bytes = new Uint8Array(own.buffer, own.byteOffset, 4 * count);
    const message = encodePartial(this.#sequence, bytes);
    this.#sequence += 1;
    for (const streams of this.#peers) streams?.outgoing.write(message);
    const deadlineMs = performance.now() + this.#timeoutMs;
    // One turn of the event loop at least, or our own partials would stay in the socket's queue.
    do {
      await this.#pacer.yield();
      if (this.#error !== null) throw this.#error;
      if (!this.#isWhole()) await this.#waitForArrival(deadlineMs);
    } while (!this.#isWhole());
    for (let peer = 0; peer < this.#peers.length; peer += 1) {
      const got = this.#arrivedCounts[turn][peer]!;
      if (this.#peers[peer] !== null && got !== count) {
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
    for (const streams of this.#peers) {
      if (streams === null) continue;
      // Streams that are cut report it as an error: nobody is interested.
      streams.incoming.on('error', () => undefined);
      streams.incoming.cancel();
      streams.outgoing.end();
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
  // Honoured by the calling side only, which is why the receiver of partials is the caller.
  'grpc-node.flow_control_window': 64 * 1024 * 1024,
  'grpc.keepalive_time_ms': 10_000,
  'grpc.keepalive_timeout_ms': 10_000,
};

/** How often an address is tried again until the signal aborts. */
const RETRY_MS = 100;

/**
 * Calls a peer for its partials, and waits until it has taken us into the group.
 *
 * @throws CaravanError `rank_unavailable` when the signal aborts before.
 */
export async function callPeer(
  address: string,
  group: string,
  rank: number,
  signal: AbortSignal,
): Promise<ClientReadableStream<RankPartial>> {
  for (;;) {
    const outcome = await callOnce(address, group, rank, signal);
    if (!(outcome instanceof Error)) return outcome;
    if (signal.aborted) {
      throw new CaravanError(
        'rank_unavailable',
        `the peer at ${address} does not answer: ${outcome.message}`,
        { cause: outcome },
      );
    }
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

async function callOnce(
  address: string,
  group: string,
  rank: number,
  signal: AbortSignal,
): Promise<ClientReadableStream<RankPartial> | Error> {
  const client = new Client(address, credentials.createInsecure(), {
    ...peerChannelOptions,
    'grpc.use_local_subchannel_pool': 1,
  });
  const call = client.makeServerStreamRequest(
    partialsMethod.path,
    partialsMethod.requestSerialize,
    decodePartial,
    { group, rank },
  );
  call.on('close', () => {
    client.close();
  });
  return new Promise((resolve) => {
    const cancel = (): void => {
      call.cancel();
    };
    signal.addEventListener('abort', cancel, { once: true });
    call.once('metadata', () => {
      signal.removeEventListener('abort', cancel);
      resolve(call);
    });
    call.on('error', (error: Error) => {
      signal.removeEventListener('abort', cancel);
      client.close();
      resolve(error);
    });
  });
}
