/**
 * Feeds an engine from the queue, and the journal from the engine.
 *
 *   take ──> running ──> ended        by itself, by a failure, cancelled or expired: written once
 *               │
 *               └──────> given back   the engine stops or fails in a way that a retry can mend
 *
 * A job is taken only when a slot is free. Whatever happens to it happens once: the first of the events
 * above decides, and later ones find it decided.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError, errorTable, toCaravanError } from '../proto/errors.js';
import { Bell } from './bell.js';
import type { Engine, SequenceHandle } from './engine.js';
import {
  needsLogprobs,
  needsPromptLogprobs,
  promptTokenCount,
  sequenceRequest,
} from './job-sequences.js';
import type { Journal, Take } from './journal.js';
import { JournalWriter } from './journal-writer.js';
import type { JobTaker, TakenJob } from './queue.js';
import type { Ending, FinishReason } from './request.js';

export interface RunnerLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

/** Hears how jobs left the engine: completed, failed, cancelled, expired, given back, abandoned, … */
export type JobLeft = (outcome: string) => void;

/** How often the flags of running jobs are looked at, should a message have been lost. */
const CANCEL_POLL_MS = 2_000;
/** Redis that refused a take (full, say) is given time. */
const REFUSED_TAKE_PAUSE_MS = 500;
/** How long a job that is given back may wait for Redis; its lock runs out soon after anyway. */
const GIVE_BACK_TIMEOUT_MS = 2_000;

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
    const poll = setInterval(() => void this.#cancel(''), CANCEL_POLL_MS);
    // One signal for all takes: a signal made of others lives as long as they do.
    const over = AbortSignal.any([draining, stopping]);
    const isOver = (): boolean => over.aborted;
    try {
      while (!isOver()) {
        this.#startMore();
        if (this.#engine.freeSlotCount === 0) {
          await this.#changed.wait(CANCEL_POLL_MS);
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
    }
  }

  /** Sequences that wait for a slot come before other jobs. */
  #startMore(): void {
    for (const job of this.#running.values()) job.startMore();
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
    this.#log.info(
      { job: taken.id, fence: take.fence, resumed: resumedTokenCount(take) },
      'job taken',
    );
    void job.done.then((outcome) => {
      if (this.#running.get(taken.id) === job) this.#running.delete(taken.id);
      this.#log.info({ job: taken.id, outcome }, 'job left');
      this.#onJobLeft(outcome);
      this.#changed.ring();
    });
    job.start();
  }

  /** @returns null when Redis refused; the job is back in the queue then. */
  async #beginTake(taken: TakenJob): Promise<Take | { kind: 'missing' | 'ended' } | null> {
    try {
      return await this.#journal.take(taken.id, this.#engineId);
    } catch (error) {
      this.#log.warn({ job: taken.id }, `the take was refused: ${String(error)}`);
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

const resumedTokenCount = ({ sequences }: Take): number =>
  sequences.reduce((sum, { tokenIds }) => sum + tokenIds.length, 0);

/** The longest delay that a timer takes. */
const MAX_TIMER_MS = 2 ** 31 - 1;

/** One job in this engine. */
class RunningJob {
  readonly #engine: Engine;
  readonly #taken: TakenJob;
  readonly #take: Take;
  readonly #writer: JournalWriter;
  readonly #log: RunnerLog;
  readonly #onSlotFree: () => void;
  readonly #handles: SequenceHandle[] = [];
  /** Numbers of the sequences that wait for a slot. */
  readonly #waiting: number[];
  /** Why each sequence ended; null while it has not. */
  readonly #reasons: (FinishReason | null)[];
  #deadline: NodeJS.Timeout | undefined;
  #isDecided = false;
  #resolve: (outcome: string) => void = () => undefined;
  /** Resolves, with how it left, when nothing is left to write. */
  readonly done: Promise<string>;

  /** @param onSlotFree one of several sequences has left the engine. */
  constructor(
    engine: Engine,
    journal: Journal,
    taken: TakenJob,
    take: Take,
    log: RunnerLog,
    onSlotFree: () => void,
  ) {
    this.#engine = engine;
    this.#onSlotFree = onSlotFree;
    this.#reasons = take.sequences.map(({ finish }) => finish?.finishReason ?? null);
    this.#waiting = [...this.#reasons.keys()].filter((index) => this.#reasons[index] === null);
    this.#taken = taken;
    this.#take = take;
    this.#log = log;
    this.done = new Promise((resolve) => (this.#resolve = resolve));
    this.#writer = new JournalWriter(
      journal,
      take,
      () => {
        this.abandon();
      },
      (error) => {
        this.#log.warn({ job: take.id }, `the journal was refused: ${String(error)}`);
      },
    );
  }

  start(): void {
    const { terms, isCancelled } = this.#take;
    if (isCancelled) {
      this.cancel();
      return;
    }
    if (terms.deadlineMs !== null) {
      const leftMs = terms.deadlineMs - Date.now();
      if (leftMs <= 0) {
        this.#decide({ status: 'expired' });
        return;
      }
      this.#deadline = setTimeout(
        () => {
          this.#decide({ status: 'expired' });
        },
        Math.min(leftMs, MAX_TIMER_MS),
      );
    }
    if (this.#waiting.length === 0) this.#complete('');
    else this.startMore();
  }

  /** Starts as many of the sequences that wait as there are slots. */
  startMore(): void {
    while (!this.#isDecided && this.#waiting.length > 0 && this.#engine.freeSlotCount > 0) {
      this.#startSequence(this.#waiting.shift()!);
    }
  }

  #startSequence(index: number): void {
    const { id, request, sequences } = this.#take;
    const writer = this.#writer.sequences[index]!;
    const { tokenIds, promptCount } = sequences[index]!;
    const own = sequenceRequest(request, index);
    try {
      const handle = this.#engine.add(
        {
          ...{ id, request: own, index, resumeTokenIds: tokenIds },
          reportsLogprobs: needsLogprobs(request),
          reportsPrompt:
            needsPromptLogprobs(request) && promptCount < own.promptTokenIds.length - 1,
        },
        {
          token: (tokenId, text, logprobs) => {
            writer.token(tokenId, text, logprobs);
          },
          prompt: (logprobs) => {
            writer.prompt(logprobs);
          },
          end: (finishReason, heldText) => {
            this.#endSequence(index, finishReason, heldText);
          },
          fail: (error) => {
            this.#fail(error);
          },
        },
      );
      this.#handles.push(handle);
    } catch (thrown) {
      this.#fail(toCaravanError(thrown));
    }
  }

  #endSequence(index: number, finishReason: FinishReason, heldText: string): void {
    this.#reasons[index] = finishReason;
    if (this.#reasons.length === 1) {
      this.#complete(heldText);
      return;
    }
    this.#writer.sequences[index]!.finish(finishReason, heldText);
    if (!this.#reasons.includes(null)) this.#complete('');
    this.startMore();
    this.#onSlotFree();
  }

  cancel(): void {
    this.#decide({ status: 'cancelled' });
  }

  /** Back to the queue, with what is in the journal. */
  giveBack(): void {
    if (!this.#isFirst()) return;
    const giveBack = async (): Promise<string> => {
      await this.#writer.release();
      await this.#taken.giveBack();
      return 'given back';
    };
    const late = delay(GIVE_BACK_TIMEOUT_MS, 'left to its lock', { ref: false });
    void Promise.race([giveBack(), late]).then((outcome) => {
      this.#writer.stop();
      this.#resolve(outcome);
    });
  }

  /** The engine stops: the job goes back, and what is being written gets a last moment. */
  stop(): void {
    this.giveBack();
    const timer = setTimeout(() => {
      this.#writer.stop();
      this.#resolve('left to its lock');
    }, GIVE_BACK_TIMEOUT_MS);
    void this.done.then(() => {
      clearTimeout(timer);
    });
  }

  /** Another take has the job: nothing of it is ours any more. */
  abandon(): void {
    this.#taken.drop();
    if (!this.#isFirst()) return;
    this.#writer.stop();
    this.#resolve('abandoned');
  }

  /** Every sequence has ended by itself. */
  #complete(heldText: string): void {
    const usage = {
      promptTokens: promptTokenCount(this.#take.request),
      completionTokens: this.#writer.tokenCount,
    };
    this.#decide({ status: 'completed', finishReason: this.#reasons[0]!, usage }, heldText);
  }

  #fail(error: CaravanError): void {
    // An engine that was stopped has failed nobody.
    if (error.code === 'cancelled' || errorTable[error.code].isRetryable) this.giveBack();
    else this.#decide({ status: 'failed', code: error.code, message: error.message });
  }

  #decide(ending: Ending, heldText = ''): void {
    if (!this.#isFirst()) return;
    void (async () => {
      const isOurs = await this.#writer.end(ending, heldText);
      if (isOurs) await this.#taken.finish(ending.status === 'failed');
      else this.#taken.drop();
      this.#resolve(isOurs ? ending.status : 'abandoned');
    })();
  }

  /** True for the first event that decides; the sequence leaves the engine then. */
  #isFirst(): boolean {
    if (this.#isDecided) return false;
    this.#isDecided = true;
    clearTimeout(this.#deadline);
    for (const handle of this.#handles) handle.cancel();
    return true;
  }
}
