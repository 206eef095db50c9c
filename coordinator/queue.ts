/**
 * The queue of one model: which jobs wait, and who works on which. BullMQ keeps it; which job comes next is said by
 * the order beside it, and the job itself is in the journal.
 *
 *   submit ──> prioritized ──take──> active ──finish──> completed, failed
 *                   ^                  │
 *                   └── giveBack, or its lock ran out (the engine died)
 */
import { setTimeout as delay } from 'node:timers/promises';
import { Job, Queue, type JobType } from 'bullmq';
import { Redis } from 'ioredis';
import { jobKey } from './journal-keys.js';
import { connectionOf, queueName } from './queue-connection.js';
import { QueueOrder, type JobSize, type StandOfQueue } from './queue-order.js';
import { reservedOf, type ReserveCheck, type Reserved } from './queue-reservation.js';
import type { JobTerms } from './request.js';
import { asCall, CALL_TIMEOUT_MS, unavailable } from './store-connection.js';

/** What jobs are reckoned with whose size nobody says. */
const UNKNOWN_SIZE: JobSize = { tokens: 0, outputTokens: 0 };
/** Ended jobs that BullMQ's own tools can still list. */
const KEPT_ENDED = { age: 24 * 3600, count: 10_000 };

export interface QueueCounts {
  readonly waiting: number;
  readonly active: number;
  readonly completed: number;
  readonly failed: number;
}

/** BullMQ's part of a job: its data is in the journal. Adding it does nothing when BullMQ knows the id. */
export function bullJob(queue: Queue, id: string, { priority, retentionS }: JobTerms): Job {
  const kept = { ...KEPT_ENDED, ...(retentionS === undefined ? {} : { age: retentionS }) };
  // Jobs without a priority would outrank all others: every job has one.
  const options = { jobId: id, priority, removeOnComplete: kept, removeOnFail: kept };
  return new Job(queue, 'generate', {}, options, id);
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
    this.#queue = new Queue(queueName(model), { connection: this.#redis });
    this.#queue.on('error', onError);
  }

  /** Adds a job that the journal knows. @throws CaravanError `redis_unavailable`. */
  async submit(id: string, terms: JobTerms, size = UNKNOWN_SIZE): Promise<void> {
    await this.enqueue(id, terms, size);
  }

  /**
   * Makes room for a job, within limits, writes it into the journal and adds it.
   *
   * @throws CaravanError `redis_unavailable`; a Redis that did not answer may have taken it.
   */
  async enqueue(
    id: string,
    terms: JobTerms,
    size: JobSize,
    check: ReserveCheck = {},
  ): Promise<Reserved> {
    return this.#call(async () => {
      // One after the other, in one round trip: should there be no room, the later ones find nothing to do.
      const commands = (await this.#queue.backend.client).pipeline();
      this.#order.reserveWith(commands, id, terms, size, Date.now(), check);
      const adding = bullJob(this.#queue, id, terms).addJob(commands);
      this.#order.enterWith(commands, id);
      await adding;
      const [reserving, added, entering] = (await commands.exec()) as [Error | null, unknown][];
      if (reserving![0] !== null) throw reserving![0];
      const reserved = reservedOf(reserving![1]);
      const error = added![0] ?? entering![0];
      if (error !== null) {
        await this.#undo(id, reserved).catch(() => undefined);
        throw error;
      }
      // A Redis that had forgotten the first script was told it anew, and did it last.
      if (reserved.kind === 'reserved' && entering![1] === 0) await this.#order.enter(id);
      return reserved;
    });
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

  /** Whether the job waits or is worked on; one that does neither runs only if it is added anew. */
  async has(id: string): Promise<boolean> {
    return this.#call(() => this.#order.isStanding(id));
  }

  /** Whether an engine has it, or had it some seconds ago. */
  async isHeld(id: string): Promise<boolean> {
    return (await this.#call(() => this.#redis.exists(`${this.#queue.toKey(id)}:lock`))) === 1;
  }

  /** Its time is over now: should its engine not end it soon, it is among those that are overdue. */
  async hurry(id: string): Promise<void> {
    await this.#call(() => this.#order.hurry(id, Date.now()));
  }

  /** Ids of jobs whose deadline has passed and that no engine ends, at most `limit`. */
  async overdue(limit: number): Promise<string[]> {
    return this.#call(() => this.#order.overdue(Date.now(), limit));
  }

  /** Takes a waiting job out. @returns false when it is not there, or worked on: its engine will see the journal. */
  async remove(id: string): Promise<boolean> {
    if (await this.isHeld(id)) return false;
    const job = await this.#call(() => this.#queue.getJob(id));
    try {
      await job?.remove();
    } catch {
      // BullMQ refuses to remove a locked job: an engine has just taken it.
      return false;
    }
    await this.#call(() => this.#order.forget(id));
    return job !== undefined;
  }

  async close(): Promise<void> {
    await Promise.race([this.#queue.close().catch(() => undefined), delay(1000)]);
    this.#redis.disconnect();
  }

  async #undo(id: string, reserved: Reserved): Promise<void> {
    if (reserved.kind === 'reserved') await this.#order.forget(id);
    if ('isWritten' in reserved && reserved.isWritten) await this.#redis.del(jobKey(id));
  }

  async #call<T>(call: () => Promise<T>): Promise<T> {
    return asCall(this.#url, async () => {
      let timer: NodeJS.Timeout | undefined;
      const late = new Promise<never>((_, reject) => {
        timer = setTimeout(() => {
          reject(unavailable(this.#url, new Error('no answer')));
        }, CALL_TIMEOUT_MS);
      });
      try {
        return await Promise.race([call(), late]);
      } finally {
        clearTimeout(timer);
      }
    });
  }
}
