/**
 * Tells clients that their jobs and batches have ended.
 *
 *   added ──look──> not ended: later again
 *             └───> ended ──post──> 2xx: done
 *                             └───> anything else: later again, at most RETRY_S.length times
 *
 * Gateways share the work; what one of them had in hand when it died comes up again after LEASE_MS. An event may arrive
 * twice, with the same id.
 */
import { CaravanError } from '../proto/errors.js';
import { Bell } from './bell.js';
import { isEnded } from './batch.js';
import type { Journal } from './journal.js';
import { batchBody } from './openai-batch.js';
import { jobBody } from './openai-job.js';
import type { BatchRecords } from './store-batches.js';
import type { Delivery, WebhookRecords } from './store-webhooks.js';
import { postWebhook } from './webhook-post.js';
import type { WebhookPolicy } from './webhook-target.js';

/** A gateway that has a delivery in hand for longer is dead. */
const LEASE_MS = 12_000;
const AT_ONCE = 32;
/** How often gateways look for what is due. */
const LOOK_EVERY_MS = 1_000;
/** How often jobs are looked at whose ending nobody has told, and batches, whose ending nobody tells. */
const JOB_LOOK_MS = 20_000;
const BATCH_LOOK_MS = 2_000;
/** A delivery about nothing: its job was never written down, or is forgotten. */
const ORPHAN_MS = 60_000;
/** Pauses before each further attempt. */
const RETRY_S = [1, 5, 30, 120, 600, 1800, 3600, 7200, 14_400, 28_800];

export interface WebhookLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

interface Needs {
  readonly records: WebhookRecords;
  readonly journal: Journal;
  readonly batchRecords: BatchRecords;
  readonly policy: WebhookPolicy;
  readonly secret: string;
  readonly log: WebhookLog;
}

export class Webhooks {
  readonly #needs: Needs;
  readonly #woken = new Bell();
  readonly #inHand = new Set<Promise<void>>();

  constructor(needs: Needs) {
    this.#needs = needs;
  }

  /** Delivers until the signal aborts; what is in hand then is left to others. */
  async run(stopping: AbortSignal): Promise<void> {
    const { records, journal, log } = this.#needs;
    const wake = (): void => {
      this.#woken.ring();
    };
    const unlisten = journal.onWebhookDue((id) => {
      if (id === '') wake();
      else records.hurry(id).then(wake, wake);
    });
    stopping.addEventListener('abort', wake);
    try {
      while (!stopping.aborted) {
        const nowMs = Date.now();
        try {
          const room = AT_ONCE - this.#inHand.size;
          const due = room > 0 ? await records.claim(nowMs, nowMs + LEASE_MS, room) : [];
          for (const delivery of due) this.#take(delivery, stopping);
        } catch (error) {
          log.warn({}, `webhooks: ${String(error)}`);
        }
        await this.#woken.wait(LOOK_EVERY_MS);
      }
      await Promise.all(this.#inHand);
    } finally {
      unlisten();
      stopping.removeEventListener('abort', wake);
    }
  }

  #take(delivery: Delivery, stopping: AbortSignal): void {
    const taking = this.#deliver(delivery, stopping)
      .catch((error: unknown) => {
        // Redis does not answer: it comes up again when the lease is over.
        this.#needs.log.warn({ webhook: delivery.id }, `webhooks: ${String(error)}`);
      })
      .finally(() => {
        this.#inHand.delete(taking);
        this.#woken.ring();
      });
    this.#inHand.add(taking);
  }

  async #deliver(delivery: Delivery, stopping: AbortSignal): Promise<void> {
    const { records, policy, secret, log } = this.#needs;
    const { id, url, createdMs, failures } = delivery;
    const event = await this.#eventOf(id);
    if (event === 'unknown') {
      if (Date.now() - createdMs > ORPHAN_MS) await records.remove(id);
      else await records.postpone(delivery, Date.now() + LOOK_EVERY_MS);
      return;
    }
    if (event === 'running') {
      const lookMs = id.startsWith('batch_') ? BATCH_LOOK_MS : JOB_LOOK_MS;
      await records.postpone(delivery, Date.now() + lookMs);
      return;
    }
    let outcome: string;
    try {
      const body = JSON.stringify(event);
      const status = await postWebhook({ url, id: event.id, body, secret }, policy, stopping);
      if (status >= 200 && status < 300) {
        await records.remove(id);
        log.info({ webhook: id, failures }, 'webhook delivered');
        return;
      }
      outcome = `the receiver answered ${status}`;
    } catch (error) {
      stopping.throwIfAborted();
      outcome = error instanceof Error ? error.message : String(error);
    }
    const pauseS = RETRY_S[failures];
    if (pauseS === undefined) await records.remove(id);
    else
      await records.postpone({ ...delivery, failures: failures + 1 }, Date.now() + 1000 * pauseS);
    const next = pauseS === undefined ? 'given up' : `again in ${pauseS} s`;
    log.warn({ webhook: id, failures: failures + 1 }, `webhook: ${outcome}: ${next}`);
  }

  /** What is to be told; the same at every attempt. */
  async #eventOf(id: string) {
    const { journal, batchRecords } = this.#needs;
    if (!id.startsWith('batch_')) {
      const job = await journal.job(id);
      if (job === null) return 'unknown';
      if (job.ending === null) return 'running';
      return eventBody(id, `job.${job.ending.status}`, job.createdMs, jobBody(job));
    }
    try {
      const state = await batchRecords.get(id);
      if (!isEnded(state.status)) return 'running';
      return eventBody(id, `batch.${state.status}`, state.order.createdMs, batchBody(state));
    } catch (error) {
      if (error instanceof CaravanError && error.code === 'not_found') return 'unknown';
      throw error;
    }
  }
}

/** As OpenAI's events are: `data` names what ended, and here tells the rest of it too. */
const eventBody = (id: string, type: string, createdMs: number, data: object) => ({
  id: `evt_${id}`,
  object: 'event',
  type,
  created_at: Math.floor(createdMs / 1000),
  data,
});
