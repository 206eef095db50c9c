/** Server-sent events over a Fastify reply. */
import type { ServerResponse } from 'node:http';
import type { FastifyReply } from 'fastify';

const HEARTBEAT_MS = 10_000;

/** One event stream. The client's end of it closes at any time: then `isOpen` is false. */
export class EventStream {
  readonly #raw: ServerResponse;
  readonly #heartbeat: NodeJS.Timeout;

  /** Takes the reply over and sends the headers at once. */
  constructor(reply: FastifyReply, headers: Readonly<Record<string, string>>) {
    reply.hijack();
    this.#raw = reply.raw;
    this.#raw.writeHead(200, {
      'content-type': 'text/event-stream; charset=utf-8',
      'cache-control': 'no-cache, no-transform',
      'x-accel-buffering': 'no',
      ...headers,
    });
    this.#raw.flushHeaders();
    // Proxies close connections that say nothing.
    this.#heartbeat = setInterval(() => this.#raw.write(': waiting\n\n'), HEARTBEAT_MS);
  }

  get isOpen(): boolean {
    return !this.#raw.destroyed && !this.#raw.writableEnded;
  }

  /** Sends one event, and waits when the client reads more slowly than we write. @param event its name, if any. */
  async send(
    data: unknown,
    { id, event: name }: { id?: string; event?: string } = {},
  ): Promise<void> {
    if (!this.isOpen) return;
    const text = typeof data === 'string' ? data : JSON.stringify(data);
    const named = name === undefined ? '' : `event: ${name}\n`;
    const event = `${id === undefined ? '' : `id: ${id}\n`}${named}data: ${text}\n\n`;
    if (this.#raw.write(event)) return;
    await new Promise<void>((resolve) => {
      const done = (): void => {
        this.#raw.removeListener('drain', done);
        this.#raw.removeListener('close', done);
        resolve();
      };
      this.#raw.once('drain', done);
      this.#raw.once('close', done);
    });
  }

  end(): void {
    clearInterval(this.#heartbeat);
    this.#raw.end();
  }
}
