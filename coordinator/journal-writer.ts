/**
 * Writes one sequence into the journal, off the step path: tokens are handed over at once and written in
 * as few appends as Redis's pace allows, one under way at a time.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Journal, Take, Written } from './journal.js';
import type { Ending } from './request.js';

/** Between attempts when Redis refuses (full, or still loading). */
const RETRY_MS = 200;

export class JournalWriter {
  readonly #journal: Journal;
  readonly #take: Take;
  readonly #tokenIds: number[];
  readonly #texts: string[];
  /** Tokens that Redis has. */
  #written: number;
  #flushing: Promise<void> | null = null;
  #isStale = false;
  #isStopped = false;
  readonly #onStale: () => void;
  readonly #onRefusal: (error: unknown) => void;

  /**
   * @param onStale another engine has taken the job: nothing of ours is written any more.
   * @param onRefusal hears of every refusal of Redis; the append is tried again.
   */
  constructor(
    journal: Journal,
    take: Take,
    onStale: () => void,
    onRefusal: (error: unknown) => void,
  ) {
    this.#journal = journal;
    this.#take = take;
    this.#tokenIds = [...take.tokenIds];
    this.#texts = [...take.texts];
    this.#written = take.tokenIds.length;
    this.#onStale = onStale;
    this.#onRefusal = onRefusal;
  }

  /** Tokens of the sequence, those of earlier takes included. */
  get tokenCount(): number {
    return this.#tokenIds.length;
  }

  /** Hands over one token; returns at once. */
  token(tokenId: number, text: string): void {
    this.#tokenIds.push(tokenId);
    this.#texts.push(text);
    void this.#flush();
  }

  /** Writes what is left, then the ending. @returns false when the job is no longer ours to end. */
  async end(ending: Ending, heldText: string): Promise<boolean> {
    for (;;) {
      await this.#flush();
      if (this.#isStale) return false;
      const outcome = await this.#attempt(() =>
        this.#journal.end(this.#take, this.#tokenIds.length, ending, heldText),
      );
      if (outcome === null || outcome.kind === 'stale') return false;
      if (outcome.kind === 'missing') await this.#attempt(() => this.#journal.restore(this.#take));
      // Redis came back without its last second: the missing tokens are written again.
      else if (outcome.kind === 'offset') this.#written = outcome.offset;
      else return true;
    }
  }

  /** Writes what is left and gives the job back for another take. */
  async release(): Promise<void> {
    await this.#flush();
    if (!this.#isStale) await this.#attempt(() => this.#journal.release(this.#take));
  }

  /** Stops trying. */
  stop(): void {
    this.#isStopped = true;
  }

  #flush(): Promise<void> {
    this.#flushing ??= this.#writeAll().finally(() => {
      this.#flushing = null;
      // A token may have come between the last look and now.
      const hasMore = this.#written < this.#tokenIds.length;
      if (hasMore && !this.#isStale && !this.#isStopped) void this.#flush();
    });
    return this.#flushing;
  }

  async #writeAll(): Promise<void> {
    while (this.#written < this.#tokenIds.length && !this.#isStale) {
      const start = this.#written;
      const end = this.#tokenIds.length;
      const outcome: Written | null = await this.#attempt(() =>
        this.#journal.append(
          this.#take,
          start,
          this.#tokenIds.slice(start, end),
          this.#texts.slice(start, end),
        ),
      );
      if (outcome === null) return;
      if (outcome.kind === 'stale') {
        this.#isStale = true;
        this.#onStale();
      } else if (outcome.kind === 'missing') {
        await this.#attempt(() => this.#journal.restore(this.#take));
      } else {
        this.#written = outcome.kind === 'offset' ? outcome.offset : end;
      }
    }
  }

  /** Until Redis takes it. @returns null when stopped. */
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
