/**
 * The queue of one model: which jobs wait, and who works on which. BullMQ keeps it; which job comes next is said by
 * the order beside it, and the job itself is in the journal.
 *
 *   submit ──> prioritized ──take──> active ──finish──> completed, failed
 *                   ^                  │
 *                   └── giveBack, or its lock ran out (the engine died)
 */
import { randomUUID } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { Queue, Worker, type Job, type JobType } from 'bullmq';
import { Redis } from 'ioredis';
import { Bell } from './bell.js';
import { graceAfter } from './grace.js';
import { chooseJob, type Choice, type HeldJob, type OrderRules } from './order.js';
import { connectionOf, queueName } from './queue-connection.js';
import {
  QueueOrder,
  wakeChannelOf,
  type JobSize,
  type QueueLimits,
  type Reserved,
  type StandOfQueue,
} from './queue-order.js';
import type { JobTerms } from './request.js';
import { asCall, unavailable } from './store-connection.js';
import type { TakenJob } from './taken-job.js';

/** A job whose engine is gone moves again after this and at most two checks. */
const LOCK_MS = 6_000;
const RENEW_EVERY_MS = 2_000;
const STALLED_CHECK_MS = 1_500;
/** A taker looks at the queue this often even when nobody wakes it. */
const LOOK_EVERY_MS = 500;
/** BullMQ and the order may differ for so long: a job may be on its way from one to the other. */
const UNEVEN_MS = 1_000;
/** Reconciling may take this share of the time. */
const RECONCILE_SHARE = 0.05;
const RECONCILE_EVERY_MS = 2_000;
/** What jobs are reckoned with whose size nobody says. */
const UNKNOWN_SIZE: JobSize = { tokens: 0, outputTokens: 0 };
export const DEFAULT_AGED_AFTER_MS = 600_000;
const ERROR_DELAY_MS = 500;
/** Ended jobs that BullMQ's own tools can still list. */
const KEPT_ENDED = { age: 24 * 3600, count: 10_000 };

export { queueName } from './queue-connection.js';
export type { TakenJob } from './taken-job.js';

export interface QueueCounts {
  readonly waiting: number;
  readonly active: number;
  readonly completed: number;
  readonly failed: number;
}

/** The side that adds jobs and looks at them. */
export class JobQueue {
  readonly #url: string;
  readonly #queue: Queue;
  readonly #redis: Redis;
  readonly #order: QueueOrder;

  constructor(url: string, model: string, onError: (error: Error) => void = () => undefined) {
    this.#url = url;
    this.#redis = new Redis(connectionOf(url, 'impatient'));
    this.#redis.on('error', onError);
    this.#order = new QueueOrder(this.#redis, queueName(model));
    this.#queue = new Queue(queueName(model), {
      connection: connectionOf(url, 'impatient'),
      defaultJobOptions: { removeOnComplete: KEPT_ENDED, removeOnFail: KEPT_ENDED },
    });
    this.#queue.on('error', onError);
  }

  /** Adds a job that the journal knows. @throws CaravanError `redis_unavailable`. */
  async submit(id: string, terms: JobTerms, size = UNKNOWN_SIZE): Promise<void> {
    await this.reserve(id, terms, size);
    await this.add(id, terms);
  }

  /** Makes room for a job, within limits, before anything else of it is written. @throws CaravanError `redis_unavailable`. */
  async reserve(
    id: string,
    terms: JobTerms,
    size: JobSize,
    check?: { readonly limits: QueueLimits; readonly version?: number },
  ): Promise<Reserved> {
    return this.#call(() => this.#order.reserve(id, terms, size, Date.now(), check));
  }

  /** Adds a job for which there is room. @throws CaravanError `redis_unavailable`. */
  async add(id: string, { priority, retentionS }: JobTerms): Promise<void> {
    const kept = { ...KEPT_ENDED, ...(retentionS === undefined ? {} : { age: retentionS }) };
    const removal = { removeOnComplete: kept, removeOnFail: kept };
    // Jobs without a priority would outrank all others: every job has one.
    await this.#call(() => this.#queue.add('generate', {}, { jobId: id, priority, ...removal }));
    await this.#call(() => this.#order.enter(id));
  }

  /** Gives up the room of a job that was not added. */
  async forget(id: string): Promise<void> {
    await this.#call(() => this.#order.forget(id));
  }

  /** What stands in it, for an estimate. */
  async stand(): Promise<StandOfQueue> {
    return this.#call(() => this.#order.stand());
  }

  async counts(): Promise<QueueCounts> {
    const counts = await this.#call(() => this.#queue.getJobCounts());
    const count = (name: string): number => counts[name] ?? 0;
    return {
      waiting: count('waiting') + count('prioritized') + count('delayed'),
      active: count('active'),
      completed: count('completed'),
      failed: count('failed'),
    };
  }

  /** Ids of jobs, the most recent `limit` of each state. */
  async ids(limit: number): Promise<string[]> {
    const states: JobType[] = [
      'active',
      'prioritized',
      'waiting',
      'delayed',
      'completed',
      'failed',
    ];
    const jobs = await this.#call(() => this.#queue.getJobs(states, 0, limit - 1));
    return jobs.flatMap((job: Job | undefined) => (job?.id === undefined ? [] : [job.id]));
  }

  /** Whether BullMQ has the job in a list; one that is in none would never run, nor be added anew: it goes. */
  async has(id: string): Promise<boolean> {
    if ((await this.#call(() => this.#queue.getJobState(id))) !== 'unknown') return true;
    await this.#call(async () => (await this.#queue.getJob(id))?.remove());
    return false;
  }

  /** Takes a waiting job out. @returns false when it is not there or is being worked on. */
  async remove(id: string): Promise<boolean> {
    const job = await this.#call(() => this.#queue.getJob(id));
    if (job === undefined) return false;
    try {
      await job.remove();
      await this.#call(() => this.#order.forget(id));
      return true;
    } catch {
      // BullMQ refuses to remove a locked job: an engine has it, and will see the journal.
      return false;
    }
  }

  async close(): Promise<void> {
    await Promise.race([this.#queue.close().catch(() => undefined), delay(1000)]);
    this.#redis.disconnect();
  }

  async #call<T>(call: () => Promise<T>): Promise<T> {
    return asCall(this.#url, async () => {
      const timeout = new AbortController();
      const late = delay(2_500, undefined, { signal: timeout.signal }).then(() => {
        throw unavailable(this.#url, new Error('no answer'));
      });
      late.catch(() => undefined);
      try {
        return await Promise.race([call(), late]);
      } finally {
        timeout.abort();
      }
    });
  }
}

/** The side that works on jobs. Locks are renewed for as long as a job is held. */
export class JobTaker {
  readonly #worker: Worker;
  readonly #redis: Redis;
  readonly #subscriber: Redis;
  readonly #order: QueueOrder;
  readonly #rules: OrderRules;
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
  #isNew = true;

  /** @param delayMs that the next fetch leaves to engines of lower ordinals. */
  constructor(
    url: string,
    model: string,
    onError: (error: Error) => void,
    rules: OrderRules = { agedAfterMs: DEFAULT_AGED_AFTER_MS },
    delayMs: () => number = () => 0,
  ) {
    this.#onError = onError;
    this.#delayMs = delayMs;
    this.#rules = rules;
    this.#redis = new Redis(connectionOf(url, 'patient'));
    this.#redis.on('error', onError);
    this.#order = new QueueOrder(this.#redis, queueName(model));
    this.#subscriber = this.#redis.duplicate();
    this.#subscriber.on('error', onError);
    this.#subscriber.on('message', () => {
      this.#wake();
    });
    this.#subscriber.subscribe(wakeChannelOf(queueName(model))).catch(() => undefined);
    this.#worker = new Worker(queueName(model), null, {
      connection: connectionOf(url, 'patient'),
      lockDuration: LOCK_MS,
      stalledInterval: STALLED_CHECK_MS,
      // A job is not to blame for the engines that died with it.
      maxStalledCount: Number.MAX_SAFE_INTEGER,
      autorun: false,
    });
    this.#worker.on('error', onError);
    this.#renewal = setInterval(() => void this.#renew(), RENEW_EVERY_MS);
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
    if (look.isUneven) {
      this.#unevenSinceMs ??= nowMs;
      const isDue = nowMs - this.#unevenSinceMs >= UNEVEN_MS && nowMs >= this.#reconcileFromMs;
      if (isDue) await this.#reconcile(nowMs);
    } else this.#unevenSinceMs = null;
    return chooseJob(look.view, nowMs, this.#rules);
  }

  /** Makes the chosen job the one that the next `take` fetches. @returns false when another engine was first. */
  async claim(choice: Choice): Promise<boolean> {
    const outcome = await this.#order.promote(choice, Date.now());
    // BullMQ, which had it before the order did, has it no more.
    if (outcome === 'absent') await this.#order.forget(choice.job.id);
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
    await this.#order.reconcile(nowMs);
    const pauseMs = Math.max(RECONCILE_EVERY_MS, (performance.now() - startMs) / RECONCILE_SHARE);
    this.#reconcileFromMs = nowMs + pauseMs;
    this.#unevenSinceMs = null;
    this.#isNew = false;
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
      drop,
    };
  }

  async #renew(): Promise<void> {
    // While Redis is away one renewal waits for it, not one for every tick.
    if (this.#held.size === 0 || this.#isRenewing) return;
    this.#isRenewing = true;
    try {
      await this.#worker.extendJobLocks([...this.#held.keys()], [...this.#held.values()], LOCK_MS);
    } catch (error) {
      this.#onError(error as Error);
    } finally {
      this.#isRenewing = false;
    }
  }
}
