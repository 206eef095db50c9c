/**
 * The queue of one model: which jobs wait, and who works on which. BullMQ keeps it; the job itself is in the
 * journal.
 *
 *   submit ──> prioritized ──take──> active ──finish──> completed, failed
 *                   ^                  │
 *                   └── giveBack, or its lock ran out (the engine died)
 */
import { randomUUID } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import { Queue, Worker, type Job, type JobType } from 'bullmq';
import type { JobTerms } from './request.js';
import { asCall, redisOptions, unavailable, type Patience } from './store-connection.js';

/** A job whose engine is gone moves again after this and at most two checks. */
const LOCK_MS = 6_000;
const RENEW_EVERY_MS = 2_000;
const STALLED_CHECK_MS = 1_500;
/** How long a fetch waits for a job before it looks at its signal. */
const FETCH_WAIT_S = 1;
/** How much longer than that a fetch may take once nobody waits for it. */
const FETCH_GRACE_MS = 2_000;
const ERROR_DELAY_MS = 500;
/** Ended jobs that BullMQ's own tools can still list. */
const KEPT_ENDED = { age: 24 * 3600, count: 10_000 };

export interface QueueCounts {
  readonly waiting: number;
  readonly active: number;
  readonly completed: number;
  readonly failed: number;
}

/** BullMQ's name of a model's queue; it allows no colon. */
export const queueName = (model: string): string => `caravan-${model.replace(/[^\w.-]/g, '_')}`;

const connectionOf = (url: string, patience: Patience) => {
  const { hostname, port, username, password, pathname, protocol } = new URL(url);
  return {
    ...redisOptions(patience),
    // The URL class keeps the brackets of an IPv6 address.
    host: hostname.replace(/^\[|\]$/g, '') || '127.0.0.1',
    port: port === '' ? 6379 : Number(port),
    ...(username === '' ? {} : { username: decodeURIComponent(username) }),
    ...(password === '' ? {} : { password: decodeURIComponent(password) }),
    ...(pathname.length > 1 ? { db: Number(pathname.slice(1)) } : {}),
    ...(protocol === 'rediss:' ? { tls: {} } : {}),
  };
};

/** The side that adds jobs and looks at them. */
export class JobQueue {
  readonly #url: string;
  readonly #queue: Queue;

  constructor(url: string, model: string, onError: (error: Error) => void = () => undefined) {
    this.#url = url;
    this.#queue = new Queue(queueName(model), {
      connection: connectionOf(url, 'impatient'),
      defaultJobOptions: { removeOnComplete: KEPT_ENDED, removeOnFail: KEPT_ENDED },
    });
    this.#queue.on('error', onError);
  }

  /** Adds a job that the journal knows. @throws CaravanError `redis_unavailable`. */
  async submit(id: string, terms: JobTerms): Promise<void> {
    // Jobs without a priority would outrank all others: every job has one.
    await this.#call(() =>
      this.#queue.add('generate', {}, { jobId: id, priority: terms.priority }),
    );
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

  /** Takes a waiting job out. @returns false when it is not there or is being worked on. */
  async remove(id: string): Promise<boolean> {
    const job = await this.#call(() => this.#queue.getJob(id));
    if (job === undefined) return false;
    try {
      await job.remove();
      return true;
    } catch {
      // BullMQ refuses to remove a locked job: an engine has it, and will see the journal.
      return false;
    }
  }

  async close(): Promise<void> {
    await Promise.race([this.#queue.close().catch(() => undefined), delay(1000)]);
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

/** A job that this engine works on. */
export interface TakenJob {
  readonly id: string;
  /** BullMQ may forget it: the journal has its ending. Can be repeated. */
  finish(isFailed: boolean): Promise<void>;
  /** Back to the queue, for any engine. */
  giveBack(): Promise<void>;
  /** Another engine has it, or soon will: its lock is not renewed any more. */
  drop(): void;
}

/** Resolves a while after the signal aborts: a fetch that Redis never answers must not be waited for. */
function graceAfter(signal: AbortSignal): { late: Promise<'late'>; dispose: () => void } {
  let timer: NodeJS.Timeout | undefined;
  let onAbort = (): void => undefined;
  const late = new Promise<'late'>((resolve) => {
    onAbort = () => {
      timer = setTimeout(resolve, FETCH_GRACE_MS, 'late');
    };
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });
  });
  const dispose = (): void => {
    clearTimeout(timer);
    signal.removeEventListener('abort', onAbort);
  };
  return { late, dispose };
}

/** The side that works on jobs. Locks are renewed for as long as a job is held. */
export class JobTaker {
  readonly #worker: Worker;
  readonly #held = new Map<string, string>();
  readonly #renewal: NodeJS.Timeout;
  readonly #onError: (error: Error) => void;
  #isRenewing = false;

  constructor(url: string, model: string, onError: (error: Error) => void) {
    this.#onError = onError;
    this.#worker = new Worker(queueName(model), null, {
      connection: connectionOf(url, 'patient'),
      lockDuration: LOCK_MS,
      stalledInterval: STALLED_CHECK_MS,
      // A job is not to blame for the engines that died with it.
      maxStalledCount: Number.MAX_SAFE_INTEGER,
      drainDelay: FETCH_WAIT_S,
      autorun: false,
    });
    this.#worker.on('error', onError);
    this.#renewal = setInterval(() => void this.#renew(), RENEW_EVERY_MS);
    void this.#worker.startStalledCheckTimer();
  }

  /** The next job, or null when the signal aborts first. */
  async take(signal: AbortSignal): Promise<TakenJob | null> {
    const isOver = (): boolean => signal.aborted;
    while (!isOver()) {
      const { late, dispose } = graceAfter(signal);
      try {
        const token = randomUUID();
        const fetching = this.#fetch(token);
        const taken = await Promise.race([fetching, late]);
        if (taken === undefined) continue;
        if (taken !== 'late' && !isOver()) return taken;
        // What the fetch brings after all goes back to the queue.
        const givingBack = fetching.then((job) => job?.giveBack()).catch(this.#onError);
        if (taken !== 'late') await Promise.race([givingBack, late]);
      } catch (error) {
        this.#onError(error as Error);
        await delay(ERROR_DELAY_MS);
      } finally {
        dispose();
      }
    }
    return null;
  }

  async #fetch(token: string): Promise<TakenJob | undefined> {
    const job = (await this.#worker.getNextJob(token)) as Job | undefined;
    return job === undefined ? undefined : this.#hold(job, token);
  }

  async close(): Promise<void> {
    clearInterval(this.#renewal);
    await Promise.race([this.#worker.close(true).catch(() => undefined), delay(2000)]);
  }

  #hold(job: Job, token: string): TakenJob {
    const id = job.id!;
    this.#held.set(id, token);
    const drop = (): void => {
      if (this.#held.get(id) === token) this.#held.delete(id);
    };
    const letGo = async (move: () => Promise<unknown>): Promise<void> => {
      drop();
      try {
        await move();
      } catch (error) {
        // The lock ran out, or another engine was first: the journal decides what the job came to.
        this.#onError(error as Error);
      }
    };
    return {
      id,
      finish: (isFailed) =>
        letGo(() =>
          isFailed
            ? job.moveToFailed(new Error('see the journal'), token, false)
            : job.moveToCompleted({}, token, false),
        ),
      giveBack: () => letGo(() => job.moveToWait(token)),
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
