/**
 * A client that means to have its answer: it asks again with the same key when it does not know whether its request
 * arrived, and comes back with Last-Event-ID when its stream breaks. It checks that no event comes twice.
 */
import assert from 'node:assert/strict';
import { setTimeout as delay } from 'node:timers/promises';
import type { ChaosJob } from './chaos-jobs.js';
import { sseEvents } from './gateway.js';

/** What came of a job: text and reason of each of its answers. */
export type ChaosAnswer = readonly { readonly text: string; readonly reason: string | null }[];

interface Chunk {
  readonly choices?: readonly {
    readonly index: number;
    readonly text?: string;
    readonly message?: { readonly content: string | null };
    readonly delta?: { readonly content?: string | null };
    readonly finish_reason: string | null;
  }[];
  readonly error?: { readonly code: string; readonly message: string };
}

/** Nothing helps a client that waits for longer. */
const PATIENCE_MS = 300_000;
const PAUSE_MS = 60;
/** Answers that a client should ask again after. */
const passing = new Set([408, 429, 500, 502, 503, 504]);

/** How often clients came back, and why. */
export interface ClientFigures {
  readonly reconnects: Record<'asked again' | 'stream resumed', number>;
  readonly refusals: Record<string, number>;
}

export class ChaosClient {
  readonly #job: ChaosJob;
  readonly #key: string;
  readonly #urls: () => readonly string[];
  readonly #figures: ClientFigures;
  readonly #texts: string[];
  readonly #reasons: (string | null)[];
  #jobId: string | null = null;
  #lastId = '';
  #attempts = 0;
  isOver = false;

  constructor(job: ChaosJob, key: string, urls: () => readonly string[], figures: ClientFigures) {
    this.#job = job;
    this.#key = key;
    this.#urls = urls;
    this.#figures = figures;
    this.#texts = Array<string>(job.sequences).fill('');
    this.#reasons = Array<string | null>(job.sequences).fill(null);
  }

  /** Some of the answer is here, and not all of it. */
  get isInTheMiddle(): boolean {
    return !this.isOver && this.#lastId !== '';
  }

  async run(): Promise<ChaosAnswer> {
    const giveUpMs = performance.now() + PATIENCE_MS;
    for (;;) {
      try {
        if (await this.#attempt()) break;
      } catch (error) {
        // What this test holds against the server is no broken connection.
        if (error instanceof assert.AssertionError) throw error;
        const cause = error instanceof Error ? error.message : String(error);
        assert.ok(performance.now() < giveUpMs, `job ${this.#job.number} waits for ever: ${cause}`);
      }
      assert.ok(performance.now() < giveUpMs, `job ${this.#job.number} (${this.#jobId}) waits`);
      await delay(PAUSE_MS);
    }
    this.isOver = true;
    return this.#texts.map((text, i) => ({ text, reason: this.#reasons[i]! }));
  }

  /** @returns whether the whole answer is here. */
  async #attempt(): Promise<boolean> {
    const urls = this.#urls();
    if (urls.length === 0) return false;
    const url = urls[(this.#job.number + this.#attempts) % urls.length]!;
    this.#attempts += 1;
    if (this.#attempts > 1) {
      this.#figures.reconnects[this.#jobId === null ? 'asked again' : 'stream resumed'] += 1;
    }
    const response = await this.#ask(url);
    if (!response.ok) {
      const said = await response.text();
      assert.ok(
        passing.has(response.status),
        `job ${this.#job.number}: ${response.status} ${said}`,
      );
      this.#refused(String(response.status));
      return false;
    }
    if (!this.#job.isStream) {
      this.#take((await response.json()) as Chunk);
      return true;
    }
    this.#jobId = response.headers.get('x-caravan-job');
    for await (const { id, data } of sseEvents(response)) {
      if (data === '[DONE]') return true;
      const chunk = JSON.parse(data) as Chunk;
      if (chunk.error !== undefined) {
        const { code, message } = chunk.error;
        assert.equal(code, 'redis_unavailable', `${code}: ${message}`);
        this.#refused(code);
        return false;
      }
      if (id !== null) this.#follow(id);
      this.#take(chunk);
    }
    return false;
  }

  #ask(url: string): Promise<Response> {
    const { route, body, isStream } = this.#job;
    if (this.#jobId !== null) {
      return fetch(`${url}/v1/jobs/${this.#jobId}/events`, {
        headers: { 'last-event-id': this.#lastId },
      });
    }
    return fetch(`${url}${route}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json', 'idempotency-key': this.#key },
      body: JSON.stringify({ ...body, stream: isStream }),
    });
  }

  /** Every event's id is beyond the last one's. */
  #follow(id: string): void {
    const places = (text: string): number[] =>
      text.split('_').map((part) => {
        const [tokens, end] = part.split('-').map(Number);
        return 10 * tokens! + end!;
      });
    const before = this.#lastId === '' ? places(id).map(() => 0) : places(this.#lastId);
    const now = places(id);
    const isBeyond = now.every((at, i) => at >= before[i]!) && now.some((at, i) => at > before[i]!);
    assert.ok(isBeyond, `job ${this.#job.number}: ${id} after ${this.#lastId}`);
    this.#lastId = id;
  }

  #take({ choices = [] }: Chunk): void {
    for (const { index, text, message, delta, finish_reason: reason } of choices) {
      this.#texts[index]! += text ?? message?.content ?? delta?.content ?? '';
      this.#reasons[index] ??= reason;
    }
  }

  #refused(code: string): void {
    this.#figures.refusals[code] = (this.#figures.refusals[code] ?? 0) + 1;
  }
}
