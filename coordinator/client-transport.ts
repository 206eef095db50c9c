/** Calls of a gateway over HTTP: what is sent, what comes back, and failures as typed errors. Needs no Node but for uploads. */
import { CaravanError, isErrorCode } from '../proto/errors.js';

/** A stream or a file that does not move for this long is given up; the gateway says something every ten seconds. */
const SILENCE_MS = 120_000;

export interface TransportOptions {
  /** Address of the gateway. */
  readonly url: string;
  readonly apiKey?: string | undefined;
  readonly fetch?: typeof fetch | undefined;
}

/** What a call may be given. */
export interface CallOptions {
  /** Withdraws the call; it throws the signal's reason if that is a CaravanError, else one of code `cancelled`. */
  readonly signal?: AbortSignal | undefined;
}

export class Transport {
  readonly #url: string;
  readonly #headers: Readonly<Record<string, string>>;
  readonly #fetch: typeof fetch;

  constructor({ url, apiKey, fetch: own }: TransportOptions) {
    this.#url = url.replace(/\/$/, '');
    this.#headers = apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` };
    this.#fetch = own ?? fetch;
  }

  /** @param timeoutMs for the whole answer. @throws CaravanError as the gateway says, `gateway_unavailable`, `timeout`. */
  async json(
    method: 'GET' | 'POST' | 'DELETE',
    route: string,
    body: unknown,
    timeoutMs: number,
    { signal }: CallOptions = {},
  ): Promise<unknown> {
    const timeout = AbortSignal.timeout(timeoutMs);
    const signals = signal === undefined ? [timeout] : [signal, timeout];
    try {
      const response = await this.#ask(route, {
        method,
        ...(body === undefined
          ? {}
          : { body: JSON.stringify(body), headers: { 'content-type': 'application/json' } }),
        signal: AbortSignal.any(signals),
      });
      return await response.json();
    } catch (thrown) {
      if (timeout.aborted && signal?.aborted !== true) {
        throw new CaravanError('timeout', `${method} ${route}: no answer within ${timeoutMs} ms`);
      }
      throw this.#asError(thrown, signal);
    }
  }

  /**
   * A call whose answer is a stream: the answer, and its bytes as they come.
   *
   * @throws CaravanError as the gateway says, `gateway_unavailable` also when the stream breaks off or is silent.
   */
  async open(
    route: string,
    init: Omit<RequestInit, 'signal'>,
    { signal }: CallOptions = {},
  ): Promise<{ readonly headers: Headers; readonly bytes: AsyncGenerator<Uint8Array> }> {
    const silence = new Silence();
    const signals = signal === undefined ? [silence.signal] : [signal, silence.signal];
    try {
      const response = await this.#ask(route, { ...init, signal: AbortSignal.any(signals) });
      const bytes = this.#bytes(response, silence, signal);
      return { headers: response.headers, bytes };
    } catch (thrown) {
      silence.end();
      throw this.#asError(thrown, signal);
    }
  }

  async *#bytes(
    { body }: Response,
    silence: Silence,
    signal: AbortSignal | undefined,
  ): AsyncGenerator<Uint8Array> {
    try {
      for await (const piece of body ?? []) {
        silence.refresh();
        yield piece as Uint8Array;
      }
    } catch (thrown) {
      throw this.#asError(thrown, signal);
    } finally {
      silence.end();
    }
  }

  /**
   * Uploads a form with one file, as a stream.
   *
   * @param onBytes hears of every piece that is sent.
   */
  async upload(
    route: string,
    fields: Readonly<Record<string, string>>,
    file: { readonly name: string; readonly content: Blob },
    onBytes: (count: number) => void,
    { signal }: CallOptions = {},
  ): Promise<unknown> {
    const silence = new Silence();
    const boundary = `caravan-${crypto.randomUUID()}`;
    const part = (disposition: string): string =>
      `--${boundary}\r\ncontent-disposition: form-data; ${disposition}\r\n`;
    const named = Object.entries(fields).map(
      ([name, value]) => `${part(`name="${name}"`)}\r\n${value}\r\n`,
    );
    const fileName = file.name.replace(/[\r\n"]/g, '_');
    const head =
      `${named.join('')}${part(`name="file"; filename="${fileName}"`)}` +
      'content-type: application/octet-stream\r\n\r\n';
    const encoder = new TextEncoder();
    const [first, last] = [encoder.encode(head), encoder.encode(`\r\n--${boundary}--\r\n`)];
    async function* body(): AsyncGenerator<Uint8Array> {
      yield first;
      for await (const piece of file.content.stream() as unknown as AsyncIterable<Uint8Array>) {
        yield piece;
        silence.refresh();
        onBytes(piece.length);
      }
      yield last;
    }
    try {
      const response = await this.#ask(route, {
        method: 'POST',
        headers: {
          'content-type': `multipart/form-data; boundary=${boundary}`,
          'content-length': String(first.length + file.content.size + last.length),
        },
        body: ReadableStream.from(body()),
        duplex: 'half',
        signal: AbortSignal.any(signal === undefined ? [silence.signal] : [signal, silence.signal]),
      });
      return await response.json();
    } catch (thrown) {
      throw this.#asError(thrown, signal);
    } finally {
      silence.end();
    }
  }

  async #ask(route: string, init: RequestInit): Promise<Response> {
    const headers = { ...this.#headers, ...(init.headers as Record<string, string> | undefined) };
    const response = await this.#fetch(`${this.#url}${route}`, { ...init, headers });
    if (response.ok) return response;
    throw refusalOf(response.status, await response.text().catch(() => ''));
  }

  #asError(thrown: unknown, signal: AbortSignal | undefined): CaravanError {
    if (signal?.aborted === true) {
      const { reason } = signal as { reason: unknown };
      if (reason instanceof CaravanError) return reason;
      return new CaravanError('cancelled', 'the call was withdrawn', { cause: reason });
    }
    if (thrown instanceof CaravanError) return thrown;
    const { message, cause: inner } = thrown as Error;
    const reason = inner instanceof Error && inner.message !== '' ? inner.message : message;
    const words = `the gateway at ${this.#url} cannot be reached: ${reason}`;
    return new CaravanError('gateway_unavailable', words, { cause: thrown });
  }
}

interface ErrorBody {
  readonly error: {
    readonly code: string;
    readonly message: string;
    readonly param?: string | null;
  };
}

/** What the gateway said, with its own code. */
export function errorOf({ error: { code, message, param } }: ErrorBody): CaravanError {
  const options = param == null ? {} : { param };
  return new CaravanError(isErrorCode(code) ? code : 'internal', message, options);
}

function refusalOf(status: number, body: string): CaravanError {
  try {
    return errorOf(JSON.parse(body) as ErrorBody);
  } catch {
    return new CaravanError('gateway_unavailable', `the gateway answered ${status}`);
  }
}

/** Aborts its signal when nothing moves. */
class Silence {
  readonly #controller = new AbortController();
  readonly #timer = setTimeout(() => {
    this.#controller.abort(new Error(`nothing moved for ${SILENCE_MS / 1000} s`));
  }, SILENCE_MS);

  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  refresh(): void {
    this.#timer.refresh();
  }

  end(): void {
    clearTimeout(this.#timer);
  }
}
