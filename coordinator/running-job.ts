/**
 * One job in an engine: its sequences, what they write, and how it leaves. Whatever happens to it happens once: the
 * first event that decides does, and later ones find it decided.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError, errorTable, toCaravanError } from '../proto/errors.js';
import type { Engine, SequenceHandle } from './engine.js';
import {
  needsLogprobs,
  needsPromptLogprobs,
  promptTokenCount,
  sequenceRequest,
  sequencesPerPrompt,
} from './job-sequences.js';
import type { Journal, Take } from './journal.js';
import { JournalWriter } from './journal-writer.js';
import type { TakenJob } from './queue.js';
import type { JobSize } from './queue-order.js';
import type { Ending, FinishReason } from './request.js';

/** How long a job that is given back may wait for Redis; its lock runs out soon after anyway. */
const GIVE_BACK_TIMEOUT_MS = 2_000;

export interface RunnerLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

/** Tokens that earlier takes wrote. */
export const resumedTokenCount = ({ sequences }: Take): number =>
  sequences.reduce((sum, { tokenIds }) => sum + tokenIds.length, 0);

/** A job that lacks no more than this is let end. */
const NEARLY_DONE_TOKENS = 8;
/** The longest delay that a timer takes. */
const MAX_TIMER_MS = 2 ** 31 - 1;

export class RunningJob {
  readonly #engine: Engine;
  readonly #taken: TakenJob;
  readonly #take: Take;
  readonly #writer: JournalWriter;
  readonly #log: RunnerLog;
  readonly #onSlotFree: () => void;
  readonly #handles: SequenceHandle[] = [];
  /** Tokens of all sequences when the job was taken. */
  readonly #resumedTokens: number;
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
    this.#resumedTokens = resumedTokenCount(take);
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

  get held(): TakenJob['held'] {
    return this.#taken.held;
  }

  /** Whether it is worth its slot to somebody else: not when it is as good as done. */
  get mayLeave(): boolean {
    return !this.#isDecided && this.#left.outputTokens > NEARLY_DONE_TOKENS;
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

  /** Back to the queue, with what is in the journal. @param isPreempted to make room for another. */
  giveBack(isPreempted = false): void {
    if (!this.#isFirst()) return;
    const giveBack = async (): Promise<string> => {
      await this.#writer.release();
      await this.#taken.giveBack(this.#left, isPreempted);
      return isPreempted ? 'made room' : 'given back';
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
      if (isOurs) await this.#taken.finish(ending.status === 'failed', this.#unusedTokens);
      else this.#taken.drop();
      this.#resolve(isOurs ? ending.status : 'abandoned');
    })();
  }

  get #newTokens(): number {
    return this.#writer.tokenCount - this.#resumedTokens;
  }

  /** What another take would have to compute: the prompt anew, and what is not written. */
  get #left(): JobSize {
    const { tokens, outputTokens } = this.#taken.held;
    const perSequence = Math.floor(this.#newTokens / this.#reasons.length);
    return {
      tokens: Math.max(0, tokens - this.#newTokens),
      outputTokens: Math.max(0, outputTokens - perSequence),
    };
  }

  /** Of the tokens that the job was reckoned with: an answer may end before its limit. */
  get #unusedTokens(): number {
    const { request } = this.#take;
    const prompts = promptTokenCount(request) * sequencesPerPrompt(request);
    return Math.max(0, this.#taken.held.tokens - prompts - this.#newTokens);
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
