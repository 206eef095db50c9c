/**
 * The jobs whose ends clients of this gateway wait for. A Redis that was killed may have lost the last second: what it
 * had answered for, and what no engine had taken yet, would never run. The gateway still knows these jobs, and
 * writes down and queues again those that are gone, under the same ids.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Journal } from './journal.js';
import type { JobTerms, Request } from './request.js';

/** What is needed to submit a job again. */
export interface KnownJob {
  readonly request: Request;
  readonly terms: JobTerms;
}

/** How often Redis is asked, should it be gone again or full. */
const ATTEMPTS = 20;
const PAUSE_MS = 500;
/** How often jobs are looked for in the queue. */
const SWEEP_EVERY_MS = 5_000;
/** Between being written down and being queued nothing is lost yet. */
const ON_ITS_WAY_MS = 3_000;

/** How jobs are submitted. */
export interface SubmitCalls {
  /** Whether the queue knows it. */
  has(id: string, model: string): Promise<boolean>;
  submit(id: string, job: KnownJob): Promise<unknown>;
  onError(error: Error): void;
}

interface Awaited extends KnownJob {
  clientCount: number;
}

export class AwaitedJobs {
  readonly #journal: Journal;
  readonly #calls: SubmitCalls;
  readonly #jobs = new Map<string, Awaited>();
  readonly #unlisten: () => void;
  readonly #sweep: NodeJS.Timeout;

  constructor(journal: Journal, calls: SubmitCalls) {
    this.#journal = journal;
    this.#calls = calls;
    this.#unlisten = journal.onReconnect(() => {
      for (const id of this.#jobs.keys()) void this.#renew(id);
    });
    // Whoever saw Redis come back may be dead itself: clients that came here since are looked after too.
    this.#sweep = setInterval(() => {
      for (const id of this.#jobs.keys()) void this.#renewLost(id);
    }, SWEEP_EVERY_MS);
    this.#sweep.unref();
  }

  /** From now on the job is looked after. @returns how to stop. */
  add(id: string, job: KnownJob): () => void {
    const awaited = this.#jobs.get(id) ?? { ...job, clientCount: 0 };
    awaited.clientCount += 1;
    this.#jobs.set(id, awaited);
    return () => {
      awaited.clientCount -= 1;
      if (awaited.clientCount === 0) this.#jobs.delete(id);
    };
  }

  close(): void {
    this.#unlisten();
    clearInterval(this.#sweep);
    this.#jobs.clear();
  }

  async #renewLost(id: string): Promise<void> {
    try {
      const record = await this.#journal.job(id);
      if (record !== null) {
        if (record.ending !== null || Date.now() - record.createdMs < ON_ITS_WAY_MS) return;
        if (await this.#calls.has(id, record.model)) return;
      }
      await this.#renew(id);
    } catch {
      // Redis is away: the next sweep looks again.
    }
  }

  async #renew(id: string): Promise<void> {
    for (let attempt = 0; attempt < ATTEMPTS; attempt += 1) {
      const job = this.#jobs.get(id);
      if (job === undefined) return;
      try {
        const record = await this.#journal.job(id);
        if (record !== null) {
          if (record.ending !== null) return;
          if (await this.#calls.has(id, record.model)) return;
        }
        await this.#calls.submit(id, job);
        return;
      } catch (error) {
        this.#calls.onError(error as Error);
        await delay(PAUSE_MS);
      }
    }
  }
}
