/**
 * One running generation.
 *
 *   prefill ──> decode ──> finished
 *
 * Its tokens are the prompt, then what was generated. The first `fed` of them are in the KV cache. Tokens that
 * an earlier take generated are known from the start: they are fed like the prompt, or, in exact mode,
 * one by one as forced decode rows, because attention over one row takes another kernel than over many.
 */
import type { FinishReason, TokenLogprobs } from './request.js';
import type { SequenceSink, SequenceSpec } from './engine.js';
import type { GrammarWalk } from './grammar.js';
import { PromptLookup } from './prompt-lookup.js';
import { commonLength, type PrefixRequest } from './slots.js';
import type { TokenMask } from './token-masks.js';
import type { Schedulable } from './scheduler.js';
import type { TextStream } from './text-stream.js';

export interface SequenceLimits {
  readonly maxSeqLen: number;
  readonly eosTokenIds: ReadonlySet<number>;
  readonly isExact: boolean;
  /** The shape of the answer, after the tokens of earlier takes; null for any. */
  readonly walk: GrammarWalk | null;
  /** Whether tokens are guessed, for a vocabulary of this size; null for no. */
  readonly guessesOf: number | null;
}

/** A beginning that is being computed is waited for when it is at least this much longer than what is there. */
const LEAST_WAIT = 32;

const NOTHING: readonly never[] = [];

export class Sequence implements Schedulable {
  /** Given once, when it is known what the sequence would share. */
  slot = -1;
  readonly spec: SequenceSpec;
  readonly sink: SequenceSink;
  readonly #limits: SequenceLimits;
  readonly #text: TextStream;
  readonly #tokens: number[];
  readonly #promptLength: number;
  /** Tokens that are fed in chunks. */
  readonly #prefillEnd: number;
  #fed = 0;
  /** Null where nothing is guessed. */
  readonly #lookup: PromptLookup | null;
  /** Guessed tokens that the next step computes, by what may come at each place; see `guess`. */
  draft: readonly number[] = NOTHING;
  /** (1 + draft) what may come after each row's token; none for an answer of any shape. */
  draftMasks: readonly TokenMask[] = NOTHING;
  /** Tokens that the sink is yet to be told of, with their text where that is known. */
  readonly #untold: {
    readonly token: number;
    readonly text: string | null;
    readonly logprobs: TokenLogprobs | undefined;
  }[] = [];
  /** True until a step has told the ranks of it. */
  isNew = true;
  /** Set when somebody wants it gone: it leaves before the next step. */
  isCancelled = false;

  /** @param text a fresh stream; resumed tokens are pushed through it silently. */
  constructor(spec: SequenceSpec, sink: SequenceSink, text: TextStream, limits: SequenceLimits) {
    this.spec = spec;
    this.sink = sink;
    this.#text = text;
    this.#limits = limits;
    this.#promptLength = spec.request.promptTokenIds.length;
    this.#tokens = [...spec.request.promptTokenIds, ...spec.resumeTokenIds];
    for (const token of spec.resumeTokenIds) this.#text.push(token);
    this.#prefillEnd = limits.isExact ? this.#promptLength : this.#tokens.length;
    this.#lookup =
      limits.guessesOf === null
        ? null
        : new PromptLookup(this.#tokens, this.#promptLength, limits.guessesOf);
  }

  /**
   * What others may share with it: its beginning, but for the last two tokens that are fed in chunks. Two, since attention
   * over one row takes another kernel. Where the prompt's logprobs are wanted all of it is computed.
   */
  get prefixRequest(): PrefixRequest {
    const limit = this.spec.reportsPrompt === true ? 0 : Math.max(0, this.#prefillEnd - 2);
    return { tenant: this.spec.tenant ?? '', tokens: this.#tokens, limit };
  }

  /** The first step: `length` positions are there already. */
  begin(length: number): void {
    this.isNew = false;
    this.#fed = length;
    this.sink.begin?.(Math.min(length, this.#promptLength));
  }

  /** Positions whose keys and values another sequence may use. In exact mode, those that were fed in chunks. */
  get sharedLength(): number {
    return this.#limits.isExact ? Math.min(this.#fed, this.#prefillEnd) : this.#fed;
  }

  /** Whether it will soon hold more of the other's beginning than `length` positions. */
  isPreparing(other: PrefixRequest, length: number): boolean {
    if (this.prefillLeft === 0 || (this.spec.tenant ?? '') !== other.tenant) return false;
    const most = Math.min(this.#prefillEnd, other.limit);
    return (
      most >= length + LEAST_WAIT &&
      commonLength(this.#tokens, other.tokens, most) >= length + LEAST_WAIT
    );
  }

  chance(index: number): number {
    return this.#lookup?.chance(index) ?? 0;
  }

  /** Guessed tokens that there is room for, in the slot and in the answer. */
  get draftLimit(): number {
    if (this.#lookup === null) return 0;
    const { maxSeqLen } = this.#limits;
    const answerLeft = this.spec.request.maxTokens - this.position;
    return Math.max(0, Math.min(answerLeft, maxSeqLen - this.#tokens.length) - 1);
  }

  /** Guesses at most `count` tokens for the next step: none that cannot come. */
  guess(count: number): void {
    const proposed = count > 0 ? (this.#lookup?.propose(count) ?? NOTHING) : NOTHING;
    const { walk } = this.#limits;
    if (walk === null || proposed.length === 0) {
      this.draft = proposed;
      this.draftMasks = NOTHING;
      return;
    }
    const ahead = walk.fork();
    const draft: number[] = [];
    const masks: TokenMask[] = [walk.mask()];
    for (const token of proposed) {
      if ((masks.at(-1)!.bits[token >> 3]! & (1 << (token & 7))) === 0) break;
      try {
        ahead.take(token);
        if (ahead.isComplete) break;
        masks.push(ahead.mask());
      } catch {
        // A grammar that takes too much there: the sequence may never come to it.
        break;
      }
      draft.push(token);
    }
    this.draft = draft;
    this.draftMasks = masks;
  }

  get prefillLeft(): number {
    return Math.max(0, this.#prefillEnd - this.#fed);
  }

  get urgency(): number {
    return this.spec.urgency ?? 0;
  }

  /** Number of the token that is generated next, from 0. */
  get position(): number {
    return this.#tokens.length - this.#promptLength;
  }

  /** Prompt and answer, as they grow. */
  get tokens(): readonly number[] {
    return this.#tokens;
  }

  /** The token of the next decode row. */
  get decodeToken(): number {
    return this.#tokens[this.#fed]!;
  }

  /** Tokens that are in the KV cache. */
  get fed(): number {
    return this.#fed;
  }

  /** The next `count` tokens to be fed. */
  nextTokens(count: number): number[] {
    return this.#tokens.slice(this.#fed, this.#fed + count);
  }

  /** How many of the likeliest tokens are reported with each token. */
  get topLogprobCount(): number {
    return this.spec.reportsLogprobs === true ? (this.spec.request.logprobs ?? 0) : 0;
  }

  /** Tokens of the prompt whose logprobs are wanted of the next `count` rows; from the first row on. */
  promptTargets(count: number): number[] {
    if (this.spec.reportsPrompt !== true) return [];
    return this.#tokens.slice(this.#fed + 1, Math.min(this.#fed + count + 1, this.#promptLength));
  }

  /** Whether the row after the next `count` tokens says something new. */
  isSampledAfter(count: number): boolean {
    return this.#fed + count === this.#tokens.length;
  }

  /** `count` tokens more are in the KV cache. */
  markFed(count: number): void {
    this.#fed += count;
  }

  /** Why a resumed sequence is over before its first step, or null. */
  get resumedEnding(): FinishReason | null {
    const last = this.spec.resumeTokenIds.at(-1);
    return last === undefined ? null : this.#endingAfter(last);
  }

  /** Tokens that may be generated next; null for all. */
  get mask(): TokenMask | null {
    return this.#limits.walk?.mask() ?? null;
  }

  /**
   * Takes the next token. The sink is told by `tell`.
   *
   * @returns why the sequence is over, or null.
   * @throws CaravanError `invalid_request` when what may follow takes too much to tell.
   */
  accept(token: number, logprobs?: TokenLogprobs): FinishReason | null {
    this.#tokens.push(token);
    // Only where a text can end the sequence is it needed before the next step.
    const text = this.spec.request.stop.length > 0 ? this.#text.push(token) : null;
    this.#untold.push({ token, text, logprobs });
    this.#limits.walk?.take(token);
    const ending = this.#endingAfter(token);
    // Told now, where it can fail, and kept for the step.
    if (ending === null) this.#limits.walk?.mask();
    return ending;
  }

  /** Tells the sink of the tokens that it has not heard of: while the next step is computed. */
  tell(): void {
    for (const { token, text, logprobs } of this.#untold) {
      this.sink.token(token, text ?? this.#text.push(token), logprobs);
    }
    this.#untold.length = 0;
  }

  /** Text that was held back; all tokens must be told. */
  endText(): string {
    return this.#text.end();
  }

  #endingAfter(token: number): FinishReason | null {
    const { request } = this.spec;
    if (this.#text.isStopped) return 'stop';
    if (this.#limits.walk?.isComplete === true) return 'stop';
    if (!request.ignoreEos && this.#limits.eosTokenIds.has(token)) return 'stop';
    if (this.position >= request.maxTokens) return 'length';
    return this.#tokens.length >= this.#limits.maxSeqLen ? 'length' : null;
  }
}
