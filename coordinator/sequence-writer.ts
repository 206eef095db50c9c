/**
 * Writes one sequence into the journal, off the step path: tokens are handed over at once and written in
 * as few appends as Redis's pace allows, one under way at a time. The prompt's logprobs, where asked for, come
 * before the first token.
 */
import type { Written } from './journal.js';
import type { FinishEntry, SequenceProgress } from './journal-entry.js';
import type { FinishReason, TokenLogprobs } from './request.js';

/** The journal as one sequence of a take writes it. */
export interface SequenceJournal {
  appendPrompt(start: number, logprobs: readonly TokenLogprobs[]): Promise<Written>;
  append(
    start: number,
    tokenIds: readonly number[],
    texts: readonly string[],
    logprobs: readonly TokenLogprobs[] | undefined,
  ): Promise<Written>;
  finish(count: number, reason: FinishReason, heldText: string): Promise<Written>;
}

/** What the writer needs of its job. */
export interface SequenceWriterJob {
  /** Tries until Redis takes it, and writes down again a job that Redis lost. @returns null when it must stop. */
  attempt(write: () => Promise<Written>): Promise<Written | null>;
  /** Whether nothing is to be written any more. */
  readonly isOver: boolean;
}

/** Prompt logprobs of one append: a long prompt is written in pieces. */
const PROMPT_PIECE = 256;

export class SequenceWriter {
  readonly #journal: SequenceJournal;
  readonly #job: SequenceWriterJob;
  readonly #tokenIds: number[];
  readonly #texts: string[];
  /** Of each token, where the request asks for them; else empty. */
  readonly #logprobs: TokenLogprobs[];
  readonly #promptLogprobs: TokenLogprobs[] = [];
  #promptWritten: number;
  #finish: Pick<FinishEntry, 'finishReason' | 'text'> | null;
  /** Tokens that Redis has, and whether it has the finish. */
  #written: number;
  #isFinishWritten: boolean;
  #flushing: Promise<void> | null = null;

  /** @param progress what earlier takes wrote. */
  constructor(journal: SequenceJournal, job: SequenceWriterJob, progress: SequenceProgress) {
    this.#journal = journal;
    this.#job = job;
    this.#tokenIds = [...progress.tokenIds];
    this.#texts = [...progress.texts];
    this.#logprobs = [...(progress.logprobs ?? [])];
    this.#promptWritten = progress.promptCount;
    this.#written = progress.tokenIds.length;
    this.#finish = progress.finish;
    this.#isFinishWritten = progress.finish !== null;
  }

  /** Tokens of the sequence, those of earlier takes included. */
  get tokenCount(): number {
    return this.#tokenIds.length;
  }

  get isFinished(): boolean {
    return this.#finish !== null;
  }

  /** Hands over logprobs of the prompt, from its second token on, in order; returns at once. */
  prompt(logprobs: readonly TokenLogprobs[]): void {
    this.#promptLogprobs.push(...logprobs);
    void this.flush();
  }

  /** Hands over one token; returns at once. */
  token(tokenId: number, text: string, logprobs?: TokenLogprobs): void {
    this.#tokenIds.push(tokenId);
    this.#texts.push(text);
    if (logprobs !== undefined) this.#logprobs.push(logprobs);
    void this.flush();
  }

  /** One of several sequences is over; returns at once. */
  finish(finishReason: FinishReason, heldText: string): void {
    this.#finish = { finishReason, text: heldText };
    void this.flush();
  }

  /** Redis came back without its last second: what is missing is written again. */
  rewind(offset: number): void {
    this.#written = offset;
    this.#isFinishWritten = false;
  }

  /** Returns when Redis has all that was handed over, or nothing is to be written any more. */
  flush(): Promise<void> {
    this.#flushing ??= this.#writeAll().finally(() => {
      this.#flushing = null;
      // A token may have come between the last look and now.
      if (this.#hasMore && !this.#job.isOver) void this.flush();
    });
    return this.#flushing;
  }

  get #hasMore(): boolean {
    return (
      this.#promptWritten < this.#promptLogprobs.length ||
      this.#written < this.#tokenIds.length ||
      (this.#finish !== null && !this.#isFinishWritten)
    );
  }

  async #writeAll(): Promise<void> {
    while (this.#hasMore && !this.#job.isOver) {
      if (this.#promptWritten < this.#promptLogprobs.length) await this.#writePrompt();
      else if (this.#written < this.#tokenIds.length) await this.#writeTokens();
      else await this.#writeFinish();
    }
  }

  async #writePrompt(): Promise<void> {
    const start = this.#promptWritten;
    const piece = this.#promptLogprobs.slice(start, start + PROMPT_PIECE);
    const outcome = await this.#job.attempt(() => this.#journal.appendPrompt(start, piece));
    if (outcome?.kind === 'offset') this.#promptWritten = outcome.offset;
    else if (outcome?.kind === 'written') this.#promptWritten = start + piece.length;
  }

  async #writeTokens(): Promise<void> {
    const start = this.#written;
    const end = this.#tokenIds.length;
    const logprobs = this.#logprobs.length > 0 ? this.#logprobs.slice(start, end) : undefined;
    const outcome = await this.#job.attempt(() =>
      this.#journal.append(
        start,
        this.#tokenIds.slice(start, end),
        this.#texts.slice(start, end),
        logprobs,
      ),
    );
    if (outcome?.kind === 'offset') this.#written = outcome.offset;
    else if (outcome?.kind === 'written') this.#written = end;
  }

  async #writeFinish(): Promise<void> {
    const { finishReason, text } = this.#finish!;
    const outcome = await this.#job.attempt(() =>
      this.#journal.finish(this.#tokenIds.length, finishReason, text),
    );
    if (outcome?.kind === 'offset') this.rewind(outcome.offset);
    else if (outcome?.kind === 'written' || outcome?.kind === 'already') {
      this.#isFinishWritten = true;
    }
  }
}
