/**
 * An answer as it is streamed, over connections that break.
 *
 *   open ──> events ──> [DONE]
 *              │  ^
 *              └──┘ the connection broke: asked again for what comes after the last event
 *
 * A gateway that dies does not take jobs with it, so another one can go on with the stream. One that lives takes a broken
 * connection for a client that left, and cancels the job: then the stream says so.
 */
import { createParser, type EventSourceMessage } from 'eventsource-parser';
import { CaravanError } from '../proto/errors.js';
import { errorOf, type CallOptions, type Transport } from './client-transport.js';

/** How long a gateway may be away. */
const RESUME_WITHIN_MS = 30_000;
const MAX_PAUSE_MS = 2_000;

/** How a stream is asked for, and asked for again. */
export interface StreamCall {
  readonly route: string;
  readonly init: Omit<RequestInit, 'signal'>;
  /** Where a job's stream goes on; null for streams that cannot be resumed. */
  readonly resume: ((jobId: string) => string) | null;
  /** An event to go on after. */
  readonly after?: string | undefined;
}

/** Leaving the loop, by `break` or an error, withdraws the job. */
export class AnswerStream<T> implements AsyncIterable<T> {
  readonly #transport: Transport;
  readonly #call: StreamCall;
  readonly #signal: AbortSignal | undefined;
  readonly #leaving = new AbortController();
  #jobId: string | null = null;
  #lastEventId: string | null;

  constructor(transport: Transport, call: StreamCall, { signal }: CallOptions = {}) {
    this.#transport = transport;
    this.#call = call;
    this.#signal = signal;
    this.#lastEventId = call.after ?? null;
  }

  /** The job that is answered; null before the first event. */
  get jobId(): string | null {
    return this.#jobId;
  }

  /** Names the last event that was read: a later stream of the job can begin after it. */
  get lastEventId(): string | null {
    return this.#lastEventId;
  }

  /**
   * Every event's data, once.
   *
   * @throws CaravanError as the gateway says, also in the middle; `cancelled` by the signal; `gateway_unavailable`.
   */
  async *[Symbol.asyncIterator](): AsyncGenerator<T, void, undefined> {
    try {
      let brokenMs: number | null = null;
      let pauseMs = 50;
      for (;;) {
        try {
          for await (const event of this.#events()) {
            brokenMs = null;
            pauseMs = 50;
            if (event.id !== undefined) this.#lastEventId = event.id;
            if (event.data === '[DONE]') return;
            const body = JSON.parse(event.data) as T | Parameters<typeof errorOf>[0];
            if (isError(body)) throw errorOf(body);
            yield body;
            // A stream of another kind says by its type that it is over.
            if (this.#call.resume === null && isLast(body)) return;
          }
          throw new CaravanError('gateway_unavailable', 'the stream broke off before its end');
        } catch (thrown) {
          const isBroken = thrown instanceof CaravanError && thrown.code === 'gateway_unavailable';
          if (!isBroken || this.#jobId === null || this.#call.resume === null) throw thrown;
          brokenMs ??= performance.now();
          if (performance.now() - brokenMs > RESUME_WITHIN_MS) throw thrown;
          await pause(pauseMs, this.#signal);
          pauseMs = Math.min(2 * pauseMs, MAX_PAUSE_MS);
        }
      }
    } finally {
      this.#leaving.abort();
    }
  }

  async *#events(): AsyncGenerator<EventSourceMessage> {
    const { route, init, resume } = this.#call;
    const isResumed = this.#jobId !== null && resume !== null;
    const after: Record<string, string> =
      this.#lastEventId === null ? {} : { 'last-event-id': this.#lastEventId };
    const { headers, bytes } = await this.#transport.open(
      isResumed ? resume(this.#jobId!) : route,
      isResumed ? { headers: after } : { ...init, headers: { ...headersOf(init), ...after } },
      { signal: this.#joined() },
    );
    this.#jobId ??= headers.get('x-caravan-job');
    const read: EventSourceMessage[] = [];
    const parser = createParser({ onEvent: (event) => read.push(event) });
    const decoder = new TextDecoder();
    for await (const piece of bytes) {
      parser.feed(decoder.decode(piece, { stream: true }));
      yield* read.splice(0);
    }
  }

  #joined(): AbortSignal {
    const own = this.#leaving.signal;
    return this.#signal === undefined ? own : AbortSignal.any([this.#signal, own]);
  }
}

const headersOf = ({ headers }: Omit<RequestInit, 'signal'>): Record<string, string> =>
  (headers ?? {}) as Record<string, string>;

const isError = (body: unknown): body is Parameters<typeof errorOf>[0] =>
  typeof (body as { error?: { message?: unknown } | null }).error?.message === 'string' &&
  !('type' in (body as object));

const isLast = (body: unknown): boolean =>
  /^response\.(completed|incomplete|failed)$/.test(String((body as { type?: unknown }).type));

function pause(ms: number, signal: AbortSignal | undefined): Promise<void> {
  return new Promise((resolve) => {
    const timer = setTimeout(done, ms);
    function done(): void {
      clearTimeout(timer);
      signal?.removeEventListener('abort', done);
      resolve();
    }
    signal?.addEventListener('abort', done);
  });
}
