/**
 * Where calls of peers wait for the group that they name: a peer can be ready before us.
 */
import { Metadata, status, type ServerWritableStream } from '@grpc/grpc-js';
import type { DirectWord } from './direct-exchange.js';
import type { Membership } from '../proto/gen/cluster.js';

/** A peer's call for our partials, on which we write them encoded. */
export type PeerCall = ServerWritableStream<Membership, Buffer>;

const MAX_WAITING = 256;

export class Lobby {
  readonly #waiting = new Map<string, PeerCall>();
  readonly #expected = new Map<string, (call: PeerCall) => void>();

  /** A peer's call has come in. */
  enter(call: PeerCall): void {
    const key = keyOf(call.request);
    const expecting = this.#expected.get(key);
    if (expecting !== undefined) {
      this.#expected.delete(key);
      expecting(call);
      return;
    }
    if (this.#waiting.size >= MAX_WAITING || this.#waiting.has(key)) {
      call.emit('error', {
        code: status.RESOURCE_EXHAUSTED,
        details: 'too many peers are waiting',
      });
      return;
    }
    this.#waiting.set(key, call);
    call.on('cancelled', () => {
      if (this.#waiting.get(key) === call) this.#waiting.delete(key);
    });
  }

  /**
   * Waits for the call of one peer and takes it into the group, telling it where we live, the name of our
   * shared memory and the handle of our device's, if any. @throws the signal's reason.
   */
  async meet(
    membership: Pick<Membership, 'group' | 'rank'>,
    own: { readonly host: string; readonly segment: string; readonly direct: DirectWord },
    signal: AbortSignal,
  ): Promise<PeerCall> {
    const key = keyOf(membership);
    let call = this.#waiting.get(key);
    this.#waiting.delete(key);
    call ??= await this.#arrival(key, signal);
    const metadata = new Metadata();
    metadata.set('caravan-host', own.host);
    metadata.set('caravan-segment', own.segment);
    metadata.set('caravan-direct', own.direct.handle);
    metadata.set('caravan-direct-fault', own.direct.fault.replace(/[^ -~]/g, '?'));
    call.sendMetadata(metadata);
    return call;
  }

  async #arrival(key: string, signal: AbortSignal): Promise<PeerCall> {
    let onAbort: () => void = () => undefined;
    try {
      return await new Promise<PeerCall>((resolve, reject) => {
        this.#expected.set(key, resolve);
        onAbort = () => {
          this.#expected.delete(key);
          reject(signal.reason as Error);
        };
        signal.addEventListener('abort', onAbort);
      });
    } finally {
      signal.removeEventListener('abort', onAbort);
    }
  }
}

const keyOf = ({ group, rank }: Pick<Membership, 'group' | 'rank'>): string => `${group}/${rank}`;
