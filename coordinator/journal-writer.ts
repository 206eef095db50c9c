/**
 * Writes one take of a job into the journal: its sequences as they grow, and its ending when all of them are there.
 * Redis that refuses (full, or still loading) is asked again.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Journal, Take, Written } from './journal.js';
import type { Ending } from './request.js';
import { SequenceWriter } from './sequence-writer.js';

/** Between attempts when Redis refuses. */
const RETRY_MS = 200;

export class JournalWriter {
  readonly #journal: Journal;
  readonly #take: Take;
  /** In the order of the job's sequences. */
  readonly sequences: readonly SequenceWriter[];
  #isStale = false;
  #isStopped = false;
  readonly #onStale: () => void;
  readonly #onCancel: () => void;
  readonly #onRestored: () => Promise<void>;
  readonly #onRefusal: (error: unknown) => void;

  /**
   * @param onStale another engine has taken the job: nothing of ours is written any more.
   * @param onRefusal hears of every refusal of Redis; the write is tried again.
   * @param onCancel somebody wants the job gone; may be called again.
   * @param onRestored Redis had lost the job, and has it again in the journal, but in no queue.
   */
  constructor(
    journal: Journal,
    take: Take,
    onStale: () => void,
    onRefusal: (error: unknown) => void,
    onCancel: () => void = () => undefined,
    onRestored: () => Promise<void> = () => Promise.resolve(),
  ) {
    this.#journal = journal;
    this.#take = take;
    this.#onStale = onStale;
    this.#onCancel = onCancel;
    this.#onRestored = onRestored;
    this.#onRefusal = onRefusal;
    this.sequences = take.sequences.map(
      (progress, index) =>
        new SequenceWriter(
          {
            appendPrompt: (start, logprobs) => journal.appendPrompt(take, index, start, logprobs),
            append: (start, tokenIds, texts, logprobs) =>
              journal.append(take, start, tokenIds, texts, {
                index,
                ...(logprobs === undefined ? {} : { logprobs }),
              }),
            finish: (count, reason, text) => journal.finish(take, index, count, reason, text),
          },
          this,
          progress,
        ),
    );
  }

  /** Whether nothing is to be written any more. */
  get isOver(): boolean {
    return this.#isStale || this.#isStopped;
  }

  /** Tokens of all sequences, those of earlier takes included. */
  get tokenCount(): number {
    return this.sequences.reduce((sum, { tokenCount }) => sum + tokenCount, 0);
  }

  /**
   * Writes what is left, then the ending.
   *
   * @param heldText of the only sequence; those of several bring theirs when they finish.
   * @returns false when the job is no longer ours to end.
   */
  async end(ending: Ending, heldText: string): Promise<boolean> {
    for (;;) {
      await this.#flushAll();
      if (this.#isStale) return false;
      const counts = this.sequences.map(({ tokenCount, isFinished }) => ({
        tokens: tokenCount,
        isFinished,
      }));
      const outcome = await this.#attempt(() =>
        this.#journal.end(this.#take, counts, ending, heldText),
      );
      if (outcome === null || outcome.kind === 'stale') return false;
      if (outcome.kind === 'missing') await this.#restore();
      // Redis came back without its last second: the missing tokens are written again.
      else if (outcome.kind === 'offset') this.sequences[outcome.index]!.rewind(outcome.offset);
      else return true;
    }
  }

  /**
   * Writes what is left and gives the job back for another take.
   *
   * @returns deaths of engines that the job is suspected of, should this be one.
   */
  async release(isEngineDead = false): Promise<number> {
    await this.#flushAll();
    if (this.#isStale) return 0;
    return (await this.#attempt(() => this.#journal.release(this.#take, isEngineDead))) ?? 0;
  }

  /** Does something else until Redis takes it. */
  async insist(write: () => Promise<void>): Promise<void> {
    await this.#attempt(write);
  }

  /** Stops trying. */
  stop(): void {
    this.#isStopped = true;
  }

  /** One write of a sequence, until Redis takes it. @returns null when stopped, or another engine has the job. */
  async attempt(write: () => Promise<Written>): Promise<Written | null> {
    const outcome = await this.#attempt(write);
    if (outcome?.kind === 'missing') await this.#restore();
    if (outcome?.kind === 'written' && outcome.isCancelRequested) this.#onCancel();
    if (outcome?.kind !== 'stale') return outcome;
    if (!this.#isStale) {
      this.#isStale = true;
      this.#onStale();
    }
    return null;
  }

  async #flushAll(): Promise<void> {
    await Promise.all(this.sequences.map((sequence) => sequence.flush()));
  }

  async #restore(): Promise<void> {
    await this.#attempt(() => this.#journal.restore(this.#take));
    await this.#attempt(() => this.#onRestored());
  }

  async #attempt<T>(write: () => Promise<T>): Promise<T | null> {
    while (!this.#isStopped) {
      try {
        return await write();
      } catch (error) {
        this.#onRefusal(error);
        await delay(RETRY_MS);
      }
    }
    return null;
  }
}
