/** Files and batches over HTTP, as any client of the gateway would: for `caravan batch`. */
import { openAsBlob } from 'node:fs';
import fs from 'node:fs/promises';
import path from 'node:path';
import { CaravanError, isErrorCode } from '../proto/errors.js';

/** An answer that is not a file comes within this. */
const CALL_TIMEOUT_MS = 30_000;
/** A file that does not move for this long is given up. */
const SILENCE_MS = 120_000;

/** A batch, as far as commands look at it. */
export interface BatchView {
  readonly id: string;
  readonly status: string;
  readonly endpoint: string;
  readonly input_file_id: string;
  readonly output_file_id?: string;
  readonly error_file_id?: string;
  readonly created_at: number;
  readonly expires_at?: number;
  readonly request_counts: {
    readonly total: number;
    readonly completed: number;
    readonly failed: number;
  };
  readonly errors?: {
    readonly data: readonly {
      readonly code: string;
      readonly message: string;
      readonly line: number | null;
    }[];
  };
}

export class GatewayClient {
  readonly #url: string;
  readonly #headers: Readonly<Record<string, string>>;
  readonly #signal: AbortSignal;

  /** @param signal ends every call. */
  constructor(url: string, apiKey: string | undefined, signal: AbortSignal) {
    this.#url = url.replace(/\/$/, '');
    this.#headers = apiKey === undefined ? {} : { authorization: `Bearer ${apiKey}` };
    this.#signal = signal;
  }

  /**
   * Uploads a file for a batch, as a stream.
   *
   * @param onBytes hears of every piece that is sent.
   * @returns the id of the file.
   * @throws CaravanError `bad_usage` when the file cannot be read, or what the gateway says.
   */
  async upload(file: string, onBytes: (count: number) => void): Promise<string> {
    const blob = await readable(file);
    const silence = new Silence();
    const boundary = `caravan-${crypto.randomUUID()}`;
    const name = path.basename(file).replace(/[\r\n"]/g, '_');
    const head =
      `--${boundary}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n` +
      `--${boundary}\r\ncontent-disposition: form-data; name="file"; filename="${name}"\r\n` +
      `content-type: application/jsonl\r\n\r\n`;
    const tail = `\r\n--${boundary}--\r\n`;
    async function* body(): AsyncGenerator<Uint8Array> {
      yield Buffer.from(head);
      for await (const piece of blob.stream() as unknown as AsyncIterable<Uint8Array>) {
        yield piece;
        silence.refresh();
        onBytes(piece.length);
      }
      yield Buffer.from(tail);
    }
    try {
      const { id } = (await this.#json('/v1/files', silence.signal, {
        method: 'POST',
        headers: {
          'content-type': `multipart/form-data; boundary=${boundary}`,
          'content-length': String(Buffer.byteLength(head + tail) + blob.size),
        },
        body: ReadableStream.from(body()),
        duplex: 'half',
      })) as { id: string };
      return id;
    } finally {
      silence.end();
    }
  }

  /** @throws CaravanError as the gateway says. */
  async createBatch(fileId: string, endpoint: string, window: string): Promise<BatchView> {
    const body = { input_file_id: fileId, endpoint, completion_window: window };
    return (await this.#json('/v1/batches', AbortSignal.timeout(CALL_TIMEOUT_MS), {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify(body),
    })) as BatchView;
  }

  async batch(id: string): Promise<BatchView> {
    const route = `/v1/batches/${encodeURIComponent(id)}`;
    return (await this.#json(route, AbortSignal.timeout(CALL_TIMEOUT_MS))) as BatchView;
  }

  async cancelBatch(id: string): Promise<BatchView> {
    const route = `/v1/batches/${encodeURIComponent(id)}/cancel`;
    const call = { method: 'POST' };
    return (await this.#json(route, AbortSignal.timeout(CALL_TIMEOUT_MS), call)) as BatchView;
  }

  /** The latest batches. */
  async batches(limit: number): Promise<readonly BatchView[]> {
    const route = `/v1/batches?limit=${limit}`;
    const { data } = (await this.#json(route, AbortSignal.timeout(CALL_TIMEOUT_MS))) as {
      data: readonly BatchView[];
    };
    return data;
  }

  /** The bytes of a file, as they come. @throws CaravanError as the gateway says, `gateway_unavailable`. */
  async *content(fileId: string): AsyncGenerator<Uint8Array> {
    const silence = new Silence();
    try {
      const route = `/v1/files/${encodeURIComponent(fileId)}/content`;
      const { body } = await this.#fetch(route, silence.signal, {});
      if (body === null) return;
      try {
        for await (const piece of body) {
          silence.refresh();
          yield piece;
        }
      } catch (cause) {
        throw this.#unavailable(cause);
      }
    } finally {
      silence.end();
    }
  }

  async #json(route: string, timeout: AbortSignal, init: RequestInit = {}): Promise<unknown> {
    const response = await this.#fetch(route, timeout, init);
    try {
      return await response.json();
    } catch (cause) {
      throw this.#unavailable(cause);
    }
  }

  async #fetch(route: string, timeout: AbortSignal, init: RequestInit): Promise<Response> {
    let response: Response;
    try {
      response = await fetch(`${this.#url}${route}`, {
        ...init,
        headers: { ...this.#headers, ...(init.headers as Record<string, string> | undefined) },
        signal: AbortSignal.any([this.#signal, timeout]),
      });
    } catch (cause) {
      throw this.#unavailable(cause);
    }
    if (!response.ok) throw refusalOf(response.status, await response.text().catch(() => ''));
    return response;
  }

  #unavailable(cause: unknown): CaravanError {
    if (this.#signal.aborted) return this.#signal.reason as CaravanError;
    const { message, cause: inner } = cause as Error;
    const reason = inner instanceof Error && inner.message !== '' ? inner.message : message;
    const words = `the gateway at ${this.#url} cannot be reached: ${reason}`;
    return new CaravanError('gateway_unavailable', words, { cause });
  }
}

/** What the gateway said, with its own code. */
function refusalOf(status: number, body: string): CaravanError {
  try {
    const { error } = JSON.parse(body) as { error: { code: string; message: string } };
    return new CaravanError(isErrorCode(error.code) ? error.code : 'internal', error.message);
  } catch {
    return new CaravanError('gateway_unavailable', `the gateway answered ${status}`);
  }
}

async function readable(file: string): Promise<Blob> {
  try {
    await fs.access(file, fs.constants.R_OK);
    return await openAsBlob(file);
  } catch (cause) {
    throw new CaravanError('bad_usage', `${file}: cannot be read`, { cause });
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
