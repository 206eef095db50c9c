/**
 * Where calls of peers wait for the group that they name: a peer can be ready before us.
 */
import { status, type ServerDuplexStream } from '@grpc/grpc-js';
import { Metadata } from '@grpc/grpc-js';
import type { RankPartial } from '../proto/gen/cluster.js';
import { GROUP_KEY, RANK_KEY, type PeerCall } from './all-reduce.js';

type Call = ServerDuplexStream<RankPartial, RankPartial>;

const MAX_WAITING = 256;

export class Lobby {
  readonly #waiting = new Map<string, Call>();
  readonly #expected = new Map<string, (call: Call) => void>();

  /** A peer's call has come in. */
  enter(call: Call): void {
    const key = `${first(call.metadata, GROUP_KEY)}/${first(call.metadata, RANK_KEY)}`;
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
    const forget = (): void => {
      if (this.#waiting.get(key) === call) this.#waiting.delete(key);
    };
    call.on('cancelled', forget);
    call.on('error', forget);
  }

  /** Waits for the call of one peer and takes it into the group. */
  async meet(group: string, rank: number, signal: AbortSignal): Promise<PeerCall> {
    const key = `${group}/${rank}`;
    let call = this.#waiting.get(key);
    this.#waiting.delete(key);
    call ??= await new Promise<Call>((resolve, reject) => {
      this.#expected.set(key, resolve);
      signal.addEventListener(
        'abort',
        () => {
          this.#expected.delete(key);
          reject(signal.reason as Error);
        },
        { once: true },
      );
    });
    call.sendMetadata(new Metadata());
    return call;
  }
}

const first = (metadata: Metadata, key: string): string => String(metadata.get(key)[0] ?? '');
