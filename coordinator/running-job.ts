/**
 * One job in an engine: its sequences, what they write, and how it leaves. Whatever happens to it happens once: the
 * first event that decides does, and later ones find it decided.
 */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError, errorTable, toCaravanError } from '../proto/errors.js';
import type { Engine, SequenceHandle } from './engine.js';
import {
  cachedTokenCount,
  needsLogprobs,
  needsPromptLogprobs,
  promptTokenCount,
  sequenceRequest,
  sequencesPerPrompt,
} from './job-sequences.js';
import type { Journal, Take } from './journal.js';
import { ALONE_FROM, DEAD_FROM } from './journal-scripts.js';
import { JournalWriter } from './journal-writer.js';
import { urgencyOf } from './order.js';
import type { TakenJob } from './taken-job.js';
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
/** Before a job is tried again that its engine may have died of, doubled for every death but the first. */
const RETRY_MS = 500;
/** The longest delay that a timer takes. */
const MAX_TIMER_MS = 2 ** 31 - 1;

export class RunningJob {
  readonly #engine: Engine;
  readonly #journal: Journal;
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
  /** By sequence: tokens of its prompt that were not computed again. */
  readonly #cachedTokens: (number | undefined)[] = [];
  #deadline: NodeJS.Timeout | undefined;
  #isDecided = false;
  /** What it wrote as its ending, and the text with it; null while it has not. */
  #ended: readonly [Ending, string] | null = null;
  /** Whether it waits until the engine has no other job. */
  #isHeldBack: boolean;
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
    this.#isHeldBack = this.isAlone;
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
      () => {
        this.cancel();
      },
      () => taken.keep(),
    );
    this.#journal = journal;
  }

  /** Whether engines died with it so often that it must not take others with it. */
  get isAlone(): boolean {
    return this.#take.suspicion >= ALONE_FROM;
  }

  get held(): TakenJob['held'] {
    return this.#taken.held;
  }

  /** What this engine computed of it so far. */
  get computed(): JobSize {
    const { request } = this.#take;
    const prompts = promptTokenCount(request) * sequencesPerPrompt(request);
    const outputTokens = Math.ceil(this.#newTokens / this.#reasons.length);
    return { tokens: prompts + this.#resumedTokens + this.#newTokens, outputTokens };
  }

  /** Whether it is worth its slot to somebody else: not when it is as good as done. */
  get mayLeave(): boolean {
    if (this.#isDecided || this.isAlone) return false;
    return this.#left.outputTokens > NEARLY_DONE_TOKENS;
  }

  start(): void {
    const { terms, isCancelled, suspicion } = this.#take;
    if (isCancelled) {
      this.cancel();
      return;
    }
    if (suspicion >= DEAD_FROM) {
      this.#endAsPoison();
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

  /** The engine has no other job: one that runs alone may begin. */
  runAlone(): void {
    if (!this.#isHeldBack || this.#isDecided) return;
    this.#isHeldBack = false;
    this.#beginStep('start');
    this.startMore();
  }

  /** Starts as many of the sequences that wait as there are slots. */
  startMore(): void {
    // A job that was taken while the engine ended: no sequence of it will ever tell.
    if (this.#engine.hasEnded && this.#waiting.length > 0) {
      this.giveBack('stop');
      return;
    }
    if (this.#isHeldBack) return;
    while (!this.#isDecided && this.#waiting.length > 0 && this.#engine.freeSlotCount > 0) {
      this.#startSequence(this.#waiting.shift()!);
    }
  }

  #startSequence(index: number): void {
    const { id, request, sequences, terms } = this.#take;
    const writer = this.#writer.sequences[index]!;
    const { tokenIds, promptCount } = sequences[index]!;
    const own = sequenceRequest(request, index);
    try {
      const handle = this.#engine.add(
        {
          ...{ id, request: own, index, resumeTokenIds: tokenIds },
          ...(terms.tenant === undefined ? {} : { tenant: terms.tenant }),
          urgency: urgencyOf(this.#taken.held),
          reportsLogprobs: needsLogprobs(request),
          reportsPrompt:
            needsPromptLogprobs(request) && promptCount < own.promptTokenIds.length - 1,
        },
        {
          begin: (cachedTokens) => {
            this.#cachedTokens[index] = cachedTokens;
          },
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
          ...(this.isAlone
            ? {
                step: (what) => {
                  this.#beginStep(what);
                },
              }
            : {}),
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

  /**
   * Back to the queue, with what is in the journal.
   *
   * @param reason `room` is made for another, the engine stops, or the engine is dead, of this job perhaps.
   */
  giveBack(reason: 'room' | 'stop' | 'death' = 'stop'): void {
    if (!this.#isFirst()) return;
    const giveBack = async (): Promise<string> => {
      const suspicion = await this.#writer.release(reason === 'death');
      const delayMs = suspicion < ALONE_FROM ? 0 : RETRY_MS * 2 ** (suspicion - 1);
      if (delayMs > 0) await this.#taken.giveBackLater(delayMs);
      else await this.#taken.giveBack(this.#left, reason === 'room');
      return reason === 'room' ? 'made room' : 'given back';
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
      cachedTokens: cachedTokenCount(this.#take.request, this.#cachedTokens),
      completionTokens: this.#writer.tokenCount,
    };
    this.#decide({ status: 'completed', finishReason: this.#reasons[0]!, usage }, heldText);
  }

  #fail(error: CaravanError): void {
    // An engine that was stopped has failed nobody.
    if (error.code === 'cancelled') this.giveBack();
    else if (errorTable[error.code].isRetryable) this.giveBack('death');
    else this.#decide({ status: 'failed', code: error.code, message: error.message });
  }

  /** It ended the engines that ran it alone. */
  #endAsPoison(): void {
    const { id, suspicion, lastStep, sequences } = this.#take;
    const step = lastStep === '' ? 'before its first step' : `in the ${lastStep}`;
    const message =
      `${suspicion} engines died of it, the last two while it ran alone, ${step}, ` +
      `after ${sequences.map(({ tokenIds }) => tokenIds.length).join(', ')} tokens`;
    this.#log.warn({ job: id }, `the job is dead: ${message}`);
    // On the list first: whoever finds it there finds its ending too, soon.
    this.#decide({ status: 'failed', code: 'poisonous', message }, '', () =>
      this.#journal.markDead(id),
    );
  }

  #beginStep(what: string): void {
    // Sent before the step is; should it be refused, less is known of a death.
    this.#journal.beginStep(this.#take, what).catch(() => undefined);
  }

  /** @param before what is to be written before the ending. */
  #decide(ending: Ending, heldText = '', before?: () => Promise<void>): void {
    if (!this.#isFirst()) return;
    void (async () => {
      if (before !== undefined) await this.#writer.insist(before);
      const isOurs = await this.#writer.end(ending, heldText);
      if (isOurs) this.#ended = [ending, heldText];
      if (isOurs) await this.#taken.finish(ending.status === 'failed', this.#unusedTokens);
      else this.#taken.drop();
      this.#resolve(isOurs ? ending.status : 'abandoned');
    })();
  }

  get #newTokens(): number {
    return this.#writer.tokenCount - this.#resumedTokens;
  }

  /** What another take would have to compute: prompt and what is written anew, and what is not written. */
  get #left(): JobSize {
    const { tokens, outputTokens } = this.#taken.held;
    const perSequence = Math.floor(this.#newTokens / this.#reasons.length);
    return {
      tokens,
      outputTokens: Math.max(0, outputTokens - perSequence),
    };
  }

  /** Of the tokens that the job was reckoned with: an answer may end before its limit. */
  get #unusedTokens(): number {
    const { request } = this.#take;
    const prompts = promptTokenCount(request) * sequencesPerPrompt(request);
    return Math.max(0, this.#taken.held.tokens - prompts - this.#newTokens);
  }

  /** Redis is back, perhaps without the last second: an ending that it lost is written again, with all before it. */
  async confirmEnding(): Promise<void> {
    if (this.#ended === null) return;
    const [ending, heldText] = this.#ended;
    await this.#writer.end(ending, heldText);
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
