/**
 * Calls of several prompts each on one engine. A call's sequences run together; those that find no free slot wait for
 * one, in the order in which they came.
 */
import { CaravanError, toCaravanError } from '../proto/errors.js';
import type { Engine, SequenceHandle } from './engine.js';
import type { Request, TokenLogprobs } from './request.js';

/** What a sequence gave. */
export interface Generated {
  /** Generated tokens, EOS included. */
  readonly tokenIds: readonly number[];
  /** Of each generated token. Empty where the request asks for none. */
  readonly logprobs: readonly number[];
  /** Of each of the prompt's tokens from the second on. Empty where the request asks for none. */
  readonly promptLogprobs: readonly number[];
}

/** A sequence that waits for a slot. */
interface Waiting {
  readonly start: () => void;
  readonly fail: (error: CaravanError) => void;
}

export class LlamaCalls {
  readonly #engine: Engine;
  #waiting: Waiting[] = [];
  #ended: CaravanError | null = null;

  constructor(engine: Engine) {
    this.#engine = engine;
  }

  /**
   * Generates an answer to each request.
   *
   * @param signal withdraws the call.
   * @throws CaravanError of the first sequence that fails, `cancelled` when the signal aborts: no sequence of the call
   *   is left in the engine then.
   */
  async generate(requests: readonly Request[], signal?: AbortSignal): Promise<Generated[]> {
    if (this.#ended !== null) throw this.#ended;
    const leaving = new AbortController();
    const leave = (): void => {
      leaving.abort();
    };
    if (signal?.aborted === true) leave();
    signal?.addEventListener('abort', leave);
    try {
      const each = requests.map((request, index) => this.#one(request, index, leaving.signal));
      return await Promise.all(each);
    } finally {
      signal?.removeEventListener('abort', leave);
      leave();
    }
  }

  /** The engine runs no more: what waits fails, and so does every later call. */
  end(error: CaravanError): void {
    this.#ended ??= error;
    for (const { fail } of this.#waiting.splice(0)) fail(this.#ended);
  }

  #one(request: Request, index: number, leaving: AbortSignal): Promise<Generated> {
    const tokenIds: number[] = [];
    const logprobs: number[] = [];
    const promptLogprobs: number[] = [];
    const isReporting = request.logprobs !== undefined;
    return new Promise((resolve, reject) => {
      let handle: SequenceHandle | null = null;
      const start = (): void => {
        handle = this.#engine.add(
          {
            ...{ id: `call ${index}`, request, index, resumeTokenIds: [] },
            reportsLogprobs: isReporting,
            reportsPrompt: isReporting && request.echo === true,
          },
          {
            token: (tokenId, _text, seen) => {
              tokenIds.push(tokenId);
              if (seen !== undefined) logprobs.push(seen.logprob);
            },
            prompt: (seen: readonly TokenLogprobs[]) => {
              promptLogprobs.push(...seen.map(({ logprob }) => logprob));
            },
            end: () => {
              leaving.removeEventListener('abort', leave);
              resolve({ tokenIds, logprobs, promptLogprobs });
            },
            fail: reject,
          },
        );
      };
      const waiting: Waiting = { start, fail: reject };
      const leave = (): void => {
        this.#waiting = this.#waiting.filter((other) => other !== waiting);
        handle?.cancel();
        reject(new CaravanError('cancelled', 'the call was withdrawn'));
      };
      if (leaving.aborted) {
        leave();
        return;
      }
      leaving.addEventListener('abort', leave, { once: true });
      this.#waiting.push(waiting);
      this.startMore();
    });
  }

  /** Starts what waits, as far as there are slots: the engine says when one is free. */
  startMore(): void {
    while (this.#waiting.length > 0 && this.#engine.freeSlotCount > 0) {
      const { start, fail } = this.#waiting.shift()!;
      try {
        start();
      } catch (thrown) {
        fail(toCaravanError(thrown));
      }
    }
  }
}
