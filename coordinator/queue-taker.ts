/** Takes jobs for an engine: the order says which, BullMQ locks it, and the lock is renewed for as long as it is held. */
import { randomUUID } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { Queue, Worker, type Job } from 'bullmq';
import { Redis } from 'ioredis';
import { Bell } from './bell.js';
import { graceAfter } from './grace.js';
import { chooseJob, type Choice, type HeldJob, type OrderRules } from './order.js';
import { bullJob } from './queue.js';
import { connectionOf, queueName } from './queue-connection.js';
import { QueueOrder, wakeChannelOf, type LostJob } from './queue-order.js';
import type { TakenJob } from './taken-job.js';

const DEFAULT_LOCK_MS = 6_000;
/** Renewals, and checks for locks that have run out, while a lock lasts. */
const RENEWALS = 3;
const STALLED_CHECKS = 4;
/** A taker looks at the queue this often even when nobody wakes it. */
const LOOK_EVERY_MS = 500;
/** BullMQ and the order may differ for so long: a job may be on its way from one to the other. */
const UNEVEN_MS = 1_000;
/** Reconciling may take this share of the time. */
const RECONCILE_SHARE = 0.05;
const RECONCILE_EVERY_MS = 2_000;
const RECONCILE_AT_LEAST_EVERY_MS = 15_000;
export const DEFAULT_AGED_AFTER_MS = 600_000;
const ERROR_DELAY_MS = 500;

export interface TakerRules extends OrderRules {
  /** A job whose engine is gone moves again after this and at most two checks. */
  readonly lockMs?: number;
}

/** The side that works on jobs. Locks are renewed for as long as a job is held. */
export class JobTaker {
  readonly #worker: Worker;
  /** For jobs that BullMQ has lost. */
  readonly #queue: Queue;
  readonly #redis: Redis;
  readonly #subscriber: Redis;
  readonly #order: QueueOrder;
  readonly #rules: OrderRules;
  readonly #lockMs: number;
  readonly #name = randomUUID();
  readonly #held = new Map<string, string>();
  readonly #renewal: NodeJS.Timeout;
  readonly #onError: (error: Error) => void;
  readonly #delayMs: () => number;
  readonly #woken = new Bell();
  readonly #listeners = new Set<() => void>();
  #isRenewing = false;
  /** Whether a job stands promoted for this engine's next fetch. */
  #hasPromoted = false;
  #unevenSinceMs: number | null = null;
  /** When BullMQ and the order may be compared again: at once at the start. */
  #reconcileFromMs = 0;
  /** When they are compared though they have as many jobs: not the same ones, perhaps. */
  #reconcileByMs = 0;
  #isNew = true;

  /** @param delayMs that the next fetch leaves to engines of lower ordinals. */
  constructor(
    url: string,
    model: string,
    onError: (error: Error) => void = () => undefined,
    { agedAfterMs, lockMs = DEFAULT_LOCK_MS }: TakerRules = { agedAfterMs: DEFAULT_AGED_AFTER_MS },
    delayMs: () => number = () => 0,
  ) {
    this.#onError = onError;
    this.#delayMs = delayMs;
    this.#rules = { agedAfterMs };
    this.#lockMs = lockMs;
    this.#redis = new Redis(connectionOf(url, 'patient'));
    this.#redis.on('error', onError);
    this.#order = new QueueOrder(this.#redis, queueName(model));
    this.#queue = new Queue(queueName(model), { connection: this.#redis });
    this.#queue.on('error', onError);
    this.#subscriber = this.#redis.duplicate();
    this.#subscriber.on('error', onError);
    this.#subscriber.on('message', () => {
      this.#wake();
    });
    this.#subscriber.subscribe(wakeChannelOf(queueName(model))).catch(() => undefined);
    this.#worker = new Worker(queueName(model), null, {
      connection: connectionOf(url, 'patient'),
      lockDuration: lockMs,
      stalledInterval: lockMs / STALLED_CHECKS,
      // A job is not to blame for the engines that died with it.
      maxStalledCount: Number.MAX_SAFE_INTEGER,
      autorun: false,
    });
    this.#worker.on('error', onError);
    this.#renewal = setInterval(() => void this.#renew(), lockMs / RENEWALS);
    void this.#worker.startStalledCheckTimer();
  }

  /** Hears of jobs that can be taken; some may be missed. @returns how to stop. */
  onWake(listener: () => void): () => void {
    this.#listeners.add(listener);
    return () => this.#listeners.delete(listener);
  }

  /** The next job, or null when the signal aborts first. */
  async take(signal: AbortSignal): Promise<TakenJob | null> {
    const isOver = (): boolean => signal.aborted;
    const ring = (): void => {
      this.#woken.ring();
    };
    signal.addEventListener('abort', ring);
    try {
      while (!isOver()) {
        const { late, dispose } = graceAfter(signal);
        try {
          const delayMs = this.#delayMs();
          if (delayMs > 0) await delay(delayMs, undefined, { signal }).catch(() => undefined);
          if (isOver()) return null;
          const fetching = this.#fetch();
          const taken = await Promise.race([fetching, late]);
          if (taken === 'again') continue;
          if (taken === 'none') {
            await this.#woken.wait(LOOK_EVERY_MS);
            continue;
          }
          if (taken !== 'late' && !isOver()) return taken;
          // What the fetch brings after all goes back to the queue.
          const givingBack = fetching
            .then((job) => (typeof job === 'string' ? undefined : job.giveBack()))
            .catch(this.#onError);
          if (taken !== 'late') await Promise.race([givingBack, late]);
        } catch (error) {
          this.#onError(error as Error);
          await delay(ERROR_DELAY_MS);
        } finally {
          dispose();
        }
      }
      return null;
    } finally {
      signal.removeEventListener('abort', ring);
    }
  }

  /** Looks which job comes next. */
  async choose(): Promise<Choice | null> {
    const nowMs = Date.now();
    if (this.#isNew) await this.#reconcile(nowMs);
    let look = await this.#order.look(nowMs);
    if (look.kind === 'paused') return null;
    if (look.hasStrays) {
      await this.#order.adopt(nowMs);
      look = await this.#order.look(nowMs);
      if (look.kind === 'paused') return null;
    }
    if (!look.isUneven) this.#unevenSinceMs = null;
    else this.#unevenSinceMs ??= nowMs;
    const isUneven = this.#unevenSinceMs !== null && nowMs - this.#unevenSinceMs >= UNEVEN_MS;
    if (nowMs >= (isUneven ? this.#reconcileFromMs : this.#reconcileByMs)) {
      await this.#reconcile(nowMs);
    }
    return chooseJob(look.view, nowMs, this.#rules);
  }

  /** Makes the chosen job the one that the next `take` fetches. @returns false when another engine was first. */
  async claim(choice: Choice): Promise<boolean> {
    const nowMs = Date.now();
    const outcome = await this.#order.promote(choice, nowMs);
    // BullMQ, which had it before the order did, has it no more: it must not be chosen again and again.
    if (outcome === 'absent')
      await this.#addLost(await this.#order.mend([choice.job.id], nowMs, 0));
    this.#hasPromoted ||= outcome === 'promoted';
    return outcome === 'promoted';
  }

  /** @returns `none` when nothing waits, `again` when another engine was first. */
  async #fetch(): Promise<TakenJob | 'none' | 'again'> {
    if (!this.#hasPromoted) {
      const choice = await this.choose();
      if (choice === null) return 'none';
      if (!(await this.claim(choice))) return 'again';
    }
    this.#hasPromoted = false;
    const token = randomUUID();
    const job = (await this.#worker.getNextJob(token, { block: false })) as Job | undefined;
    if (job === undefined) return 'none';
    const held = await this.#order.confirm(job.id!, this.#name, Date.now());
    if (held !== null) return this.#hold(job, token, held);
    // Another engine fetched what was promoted, and this is what BullMQ itself would do next.
    await job.moveToWait(token);
    return 'again';
  }

  async #reconcile(nowMs: number): Promise<void> {
    const startMs = performance.now();
    await this.#addLost(await this.#order.reconcile(nowMs));
    const pauseMs = Math.max(RECONCILE_EVERY_MS, (performance.now() - startMs) / RECONCILE_SHARE);
    this.#reconcileFromMs = nowMs + pauseMs;
    this.#reconcileByMs = nowMs + RECONCILE_AT_LEAST_EVERY_MS + pauseMs;
    this.#isNew = false;
  }

  async #addLost(jobs: readonly LostJob[]): Promise<void> {
    for (const { id, terms } of jobs) {
      await bullJob(this.#queue, id, terms).addJob(await this.#queue.backend.client);
    }
  }

  #wake(): void {
    this.#woken.ring();
    for (const listener of this.#listeners) listener();
  }

  async close(): Promise<void> {
    clearInterval(this.#renewal);
    await Promise.race([this.#worker.close(true).catch(() => undefined), delay(2000)]);
    this.#subscriber.disconnect();
    this.#redis.disconnect();
  }

  #hold(job: Job, token: string, held: HeldJob): TakenJob {
    const id = job.id!;
    this.#held.set(id, token);
    const drop = (): void => {
      if (this.#held.get(id) === token) this.#held.delete(id);
    };
    const letGo = async (move: () => Promise<unknown>, then: () => Promise<void>) => {
      drop();
      try {
        await move();
        await then();
      } catch (error) {
        // The lock ran out, or another engine was first: the journal decides what the job came to.
        this.#onError(error as Error);
      }
    };
    return {
      id,
      held,
      finish: (isFailed, unusedTokens) =>
        letGo(
          () =>
            isFailed
              ? job.moveToFailed(new Error('see the journal'), token, false)
              : job.moveToCompleted({}, token, false),
          () => this.#order.forget(id, unusedTokens),
        ),
      giveBack: (left, isPreempted = false) =>
        letGo(
          () => job.moveToWait(token),
          () => this.#order.putBack(id, left ?? null, isPreempted),
        ),
      // The order takes it in again when it is due.
      giveBackLater: (delayMs) =>
        letGo(
          () => job.moveToDelayed(Date.now() + delayMs, token),
          () => Promise.resolve(),
        ),
      keep: () => this.#order.hold(held, this.#name),
      drop,
    };
  }

  async #renew(): Promise<void> {
    // While Redis is away one renewal waits for it, not one for every tick.
    if (this.#held.size === 0 || this.#isRenewing) return;
    this.#isRenewing = true;
    try {
      await this.#worker.extendJobLocks(
        [...this.#held.keys()],
        [...this.#held.values()],
        this.#lockMs,
      );
    } catch (error) {
      this.#onError(error as Error);
    } finally {
      this.#isRenewing = false;
    }
  }
}
