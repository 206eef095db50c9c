/**
 * Feeds an engine from the queue, and the journal from the engine.
 *
 *   take ──> running ──> ended        by itself, by a failure, cancelled or expired: written once
 *               │
 *               └──────> given back   the engine stops or fails in a way that a retry can mend, or the job makes room
 *                                     for a more urgent one
 *
 * A job is taken only when a slot is free. Whatever happens to it happens once: the first of the events
 * above decides, and later ones find it decided.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError } from '../proto/errors.js';
import { Bell } from './bell.js';
import type { Engine } from './engine.js';
import type { Journal, Take } from './journal.js';
import { chooseVictim, type HeldJob } from './order.js';
import type { JobTaker } from './queue-taker.js';
import type { TakenJob } from './taken-job.js';
import type { JobSize } from './queue-order.js';
import { resumedTokenCount, RunningJob, type RunnerLog } from './running-job.js';

/** Hears how jobs left the engine: completed, failed, cancelled, expired, given back, abandoned, … */
export type JobLeft = (outcome: string, job: RunJob) => void;

/** A job as it was in this engine. */
export interface RunJob {
  readonly held: HeldJob;
  /** What this engine computed of it. */
  readonly done: JobSize;
}

/** How often the flags of running jobs are looked at, should a message have been lost. */
const CANCEL_POLL_MS = 2_000;
/** How often an engine without a free slot looks whether a job has become so urgent that another makes room for it. */
const PREEMPT_EVERY_MS = 500;
/** Redis has what it was told on its disk by then, unless it is gone. */
const ENDED_KEPT_MS = 3_000;
/** Redis that refused a take (full, say) is given time. */
const REFUSED_TAKE_PAUSE_MS = 500;
/** Until a job of a later release is offered again; later engines may have come by then. */
const LATER_RELEASE_PAUSE_MS = 3_000;

export class JobRunner {
  readonly #engine: Engine;
  readonly #journal: Journal;
  readonly #taker: JobTaker;
  readonly #engineId: string;
  readonly #log: RunnerLog;
  readonly #onJobLeft: JobLeft;
  readonly #running = new Map<string, RunningJob>();
  readonly #changed = new Bell();
  #isReadingFlags = false;
  /** Jobs that have left, and when: those of the last seconds at least. */
  readonly #ended = new Map<RunningJob, number>();
  /** The last job that makes room, until it has left. */
  #leaving: RunningJob | null = null;
  /** A job that other engines died of: it waits until the others have left, and nothing is taken beside it. */
  #alone: RunningJob | null = null;

  constructor(
    engine: Engine,
    journal: Journal,
    taker: JobTaker,
    engineId: string,
    log: RunnerLog,
    onJobLeft: JobLeft = () => undefined,
  ) {
    this.#engine = engine;
    this.#journal = journal;
    this.#taker = taker;
    this.#engineId = engineId;
    this.#log = log;
    this.#onJobLeft = onJobLeft;
  }

  get runningCount(): number {
    return this.#running.size;
  }

  /**
   * Takes jobs until `draining` aborts, then lets the running ones end; when `stopping` aborts, they
   * are given back to the queue. Returns when none is left.
   */
  async run(draining: AbortSignal, stopping: AbortSignal): Promise<void> {
    const wake = (): void => {
      this.#changed.ring();
    };
    const giveBackAll = (): void => {
      for (const job of this.#running.values()) job.stop();
      wake();
    };
    draining.addEventListener('abort', wake);
    stopping.addEventListener('abort', giveBackAll);
    const unlisten = this.#journal.onCancel((id) => void this.#cancel(id));
    const unlistenQueue = this.#taker.onWake(wake);
    const unlistenReconnect = this.#journal.onReconnect(() => void this.#confirmEndings());
    const poll = setInterval(() => void this.#cancel(''), CANCEL_POLL_MS);
    // One signal for all takes: a signal made of others lives as long as they do.
    const over = AbortSignal.any([draining, stopping]);
    const isOver = (): boolean => over.aborted;
    try {
      while (!isOver()) {
        this.#startMore();
        if (this.#alone !== null) {
          await this.#changed.wait();
          continue;
        }
        if (this.#engine.freeSlotCount === 0) {
          await this.#makeRoom();
          await this.#changed.wait(PREEMPT_EVERY_MS);
          continue;
        }
        const taken = await this.#taker.take(over);
        if (taken !== null) await this.#start(taken);
      }
      if (stopping.aborted) giveBackAll();
      while (this.#running.size > 0) {
        this.#startMore();
        await this.#changed.wait();
      }
    } finally {
      clearInterval(poll);
      draining.removeEventListener('abort', wake);
      stopping.removeEventListener('abort', giveBackAll);
      unlisten();
      unlistenQueue();
      unlistenReconnect();
    }
  }

  /** Lets the least urgent job go when one that waits is urgent enough; the next take brings that one. */
  async #makeRoom(): Promise<void> {
    if (this.#leaving !== null) return;
    try {
      const choice = await this.#taker.choose();
      if (choice === null) return;
      const held = [...this.#running.values()].flatMap((job) => (job.mayLeave ? [job.held] : []));
      const victim = chooseVictim(choice, held, Date.now());
      const leaving = victim === null ? undefined : this.#running.get(victim.id);
      if (leaving === undefined || !(await this.#taker.claim(choice))) return;
      this.#log.info({ job: leaving.held.id, for: choice.job.id }, 'job makes room');
      this.#leaving = leaving;
      void leaving.done.then(() => {
        this.#leaving = null;
        this.#changed.ring();
      });
      leaving.giveBack('room');
    } catch (error) {
      this.#log.warn({}, `the queue was refused: ${String(error)}`);
    }
  }

  /** Sequences that wait for a slot come before other jobs. */
  #startMore(): void {
    for (const job of this.#running.values()) job.startMore();
    if (this.#running.size === 1) this.#alone?.runAlone();
  }

  async #start(taken: TakenJob): Promise<void> {
    const take = await this.#beginTake(taken);
    if (take === null) return;
    if (take.kind !== 'taken') {
      // Ended already (its engine died before BullMQ heard of it), or forgotten: nothing to run.
      await taken.finish(take.kind === 'missing');
      return;
    }
    const previous = this.#running.get(taken.id);
    previous?.abandon();
    const job = new RunningJob(this.#engine, this.#journal, taken, take, this.#log, () => {
      this.#changed.ring();
    });
    this.#running.set(taken.id, job);
    if (job.isAlone) this.#alone = job;
    this.#log.info(
      { job: taken.id, fence: take.fence, resumed: resumedTokenCount(take) },
      'job taken',
    );
    void job.done.then((outcome) => {
      if (this.#running.get(taken.id) === job) this.#running.delete(taken.id);
      if (this.#alone === job) this.#alone = null;
      this.#log.info({ job: taken.id, outcome }, 'job left');
      this.#onJobLeft(outcome, { held: job.held, done: job.computed });
      this.#keepEnded(job);
      this.#changed.ring();
    });
    job.start();
  }

  /** For a while, should Redis be killed before it has written its ending to the disk. */
  #keepEnded(job: RunningJob): void {
    const nowMs = performance.now();
    this.#ended.set(job, nowMs);
    if (!this.#journal.isConnected) return;
    for (const [each, endedMs] of this.#ended) {
      if (nowMs - endedMs > ENDED_KEPT_MS) this.#ended.delete(each);
    }
  }

  async #confirmEndings(): Promise<void> {
    await Promise.all([...this.#ended.keys()].map((job) => job.confirmEnding()));
  }

  /** @returns null when Redis refused; the job is back in the queue then. */
  async #beginTake(taken: TakenJob): Promise<Take | { kind: 'missing' | 'ended' } | null> {
    try {
      return await this.#journal.take(taken.id, this.#engineId);
    } catch (error) {
      this.#log.warn({ job: taken.id }, `the take was refused: ${String(error)}`);
      if (error instanceof CaravanError && error.code === 'protocol_mismatch') {
        // A job of a later release: it must not stand in the way of what this engine can do.
        await taken.giveBackLater(LATER_RELEASE_PAUSE_MS);
        return null;
      }
      await taken.giveBack();
      await delay(REFUSED_TAKE_PAUSE_MS);
      return null;
    }
  }

  /** @param id a job, or empty for all that run: then their flags are read. */
  async #cancel(id: string): Promise<void> {
    if (id !== '') {
      this.#running.get(id)?.cancel();
      return;
    }
    // While Redis is away one reading waits for it, not one for every tick.
    if (this.#isReadingFlags) return;
    this.#isReadingFlags = true;
    for (const [jobId, job] of this.#running) {
      const isRequested = await this.#journal.isCancelRequested(jobId).catch(() => false);
      if (isRequested) job.cancel();
    }
    this.#isReadingFlags = false;
  }
}
