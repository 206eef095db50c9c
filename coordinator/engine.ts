/**
 * An engine: the loop that turns sequences into steps of its group of ranks.
 *
 *   add ──> slots ──> scheduler ──> ranks.forward ──> sampler ──> sink
 *             ^                                          │
 *             └────────────── finished, cancelled <──────┘
 *
 * Nothing here waits for Redis or HTTP: sinks take what they hear and return at once.
 */
import type { Tokenizer } from '../model/tokenizer.js';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { SampledRows, type Step, type StepResult } from '../proto/gen/cluster.js';
import { beginSequences } from './beginnings.js';
import type { EngineLoad } from './engine-health.js';
import { GrammarCache } from './grammar.js';
import { MaskTable } from './mask-table.js';
import type { Ranks } from './ranks.js';
import type { FinishReason, Request, TokenLogprobs } from './request.js';
import { drawToken } from './row-draw.js';
import { SampledRowReader, type SampledRow } from './sampled-row.js';
import { adaptBudget, MIN_PREFILL_TOKENS, planStep, type StepPlan } from './scheduler.js';
import { announceStep } from './step-announcement.js';
import { Sequence } from './sequence.js';
import { Slots } from './slots.js';
import { guessNext, MAX_DRAFT, StepCosts } from './speculation.js';
import type { StepFigures } from './step-figures.js';
import { stepMessage } from './step-message.js';
import { TextStream } from './text-stream.js';

/** One generation to run. A job with n sequences adds n of these. */
export interface SequenceSpec {
  /** Names the sequence in logs. */
  readonly id: string;
  readonly request: Request;
  /** Number of the sequence within its job; part of every coin. */
  readonly index: number;
  /** Tokens that an earlier take generated: kept, never drawn again. */
  readonly resumeTokenIds: readonly number[];
  /** Prompts of a lower number are computed first; 0 if left out. */
  readonly urgency?: number;
  /** Whether the sink is told the logprobs of every token. */
  readonly reportsLogprobs?: boolean;
  /** Whether the sink is told the logprobs of the prompt's tokens. */
  readonly reportsPrompt?: boolean;
  /** Beginnings are shared within a tenant only; one for all where it is left out. */
  readonly tenant?: string;
}

/** Hears of a sequence, synchronously and in order; must return at once and never throw. */
export interface SequenceSink {
  /** It begins; of its prompt this many tokens are not computed again. */
  begin?(cachedTokens: number): void;
  /** One more token, and the text that it releases (may be empty). Not called for resumed tokens. */
  token(tokenId: number, text: string, logprobs?: TokenLogprobs): void;
  /** Logprobs of prompt tokens, from the second one on, in order, before the first token. Only where asked for. */
  prompt?(logprobs: readonly TokenLogprobs[]): void;
  /** A step with some of it is about to begin: said in words, for whoever wants to know of what an engine died. */
  step?(what: string): void;
  /** The sequence ended by itself; `text` was held back until now. The last call. */
  end(finishReason: FinishReason, text: string): void;
  /** The engine could not go on with it. The last call. */
  fail(error: CaravanError): void;
}

export interface SequenceHandle {
  /** Leaves the engine within two steps; the sink hears nothing more. Idempotent. */
  cancel(): void;
}

export interface Engine {
  /** Slots that no sequence holds. */
  readonly freeSlotCount: number;
  /** It has lost its ranks, or was stopped: nothing can be added any more. */
  readonly hasEnded: boolean;
  /**
   * Starts a sequence.
   * @throws CaravanError `internal` when no slot is free, `rank_failed` when the engine has ended, `invalid_request`
   *   for a grammar that passes a limit.
   */
  add(spec: SequenceSpec, sink: SequenceSink): SequenceHandle;
  /** Runs until the signal aborts or a rank fails; every sequence's sink hears `fail` then. */
  run(signal: AbortSignal): Promise<void>;
}

export interface EngineOptions {
  readonly maxSeqLen: number;
  readonly maxBatchSize: number;
  /** Most rows of a step; what the group was loaded with. */
  readonly maxStepRows: number;
  /** Most tokens of one chunk; maxStepRows when left out. */
  readonly maxChunkTokens?: number;
  readonly isExact: boolean;
  /** Tokens that are guessed for a sequence: where and as many as pay, or always this many. Never in exact mode. */
  readonly draftTokens?: 'adaptive' | number;
  /** Hears of every step, for metrics. */
  readonly onStep?: (figures: StepFigures) => void;
  /** Hears that a sequence has left and its slot can be taken. Must return at once. */
  readonly onSlotFree?: () => void;
}

/** A first guess until steps have been measured. */
const FIRST_TOKEN_BUDGET = 32;
/** Masks that ranks keep, of 4 KB each with a vocabulary of 32,000. */
const KEPT_MASKS = 512;

export class RankEngine implements Engine {
  readonly #ranks: Ranks;
  readonly #tokenizer: Tokenizer;
  readonly #options: EngineOptions;
  readonly #slots: Slots;
  readonly #grammars: GrammarCache;
  readonly #masks: MaskTable;
  /** In the order in which they came. */
  #sequences: Sequence[] = [];
  readonly #costs = new StepCosts();
  /** Sequences whose drafts did not hold: the next step takes back what was fed, unless they left and others begin there. */
  readonly #overfed = new Set<Sequence>();
  #stepNumber = 0;
  #tokenBudget: number;
  #wake: (() => void) | null = null;
  /** When a step last ended, or work came to an idle engine. */
  #movedMs = 0;
  #ended: CaravanError | null = null;

  constructor(ranks: Ranks, tokenizer: Tokenizer, options: EngineOptions) {
    this.#ranks = ranks;
    this.#tokenizer = tokenizer;
    this.#options = options;
    this.#slots = new Slots(
      options.maxBatchSize,
      ranks.loaded.every(({ copiesSlots }) => copiesSlots === true),
    );
    this.#grammars = new GrammarCache(tokenizer);
    this.#masks = new MaskTable(KEPT_MASKS + (MAX_DRAFT + 2) * options.maxBatchSize);
    this.#tokenBudget = Math.min(FIRST_TOKEN_BUDGET, options.maxStepRows);
  }

  get freeSlotCount(): number {
    return this.#ended === null ? this.#slots.freeCount : 0;
  }

  get hasEnded(): boolean {
    return this.#ended !== null;
  }

  get sequenceCount(): number {
    return this.#sequences.length;
  }

  /** What it is doing now. */
  get load(): EngineLoad {
    const sequences = this.#sequences.length;
    return {
      sequences,
      slotsUsed: this.#options.maxBatchSize - this.#slots.freeCount,
      kvPositionsUsed: this.#sequences.reduce((sum, { fed }) => sum + fed, 0),
      unmovedMs: sequences === 0 ? 0 : performance.now() - this.#movedMs,
    };
  }

  add(spec: SequenceSpec, sink: SequenceSink): SequenceHandle {
    if (this.#ended !== null) throw this.#ended;
    const { maxSeqLen, isExact, draftTokens } = this.#options;
    const promptTokens = spec.request.promptTokenIds.length;
    if (promptTokens < 1 || promptTokens >= maxSeqLen) {
      throw new CaravanError(
        'context_length_exceeded',
        `the prompt has ${promptTokens} tokens; it must have 1 to ${maxSeqLen - 1}`,
        { param: 'prompt' },
      );
    }
    const { grammar, isTextStart } = spec.request;
    const walk = grammar === undefined ? null : this.#grammars.get(grammar).begin(isTextStart);
    for (const token of spec.resumeTokenIds) walk?.take(token);
    walk?.mask();
    const text = new TextStream(this.#tokenizer, spec.request);
    const sequence = new Sequence(spec, sink, text, {
      maxSeqLen,
      isExact,
      eosTokenIds: new Set(this.#tokenizer.eosTokenIds),
      walk,
      guessesOf: draftTokens !== 0 && !isExact ? this.#tokenizer.vocabSize : null,
    });
    const slot = this.#slots.take(sequence.prefixRequest);
    if (slot === null) throw new CaravanError('internal', 'no slot is free');
    sequence.slot = slot;
    if (this.#sequences.length === 0) this.#movedMs = performance.now();
    this.#sequences.push(sequence);
    this.#wake?.();
    return {
      cancel: () => {
        sequence.isCancelled = true;
        this.#wake?.();
      },
    };
  }

  async run(signal: AbortSignal): Promise<void> {
    const stop = (): void => this.#wake?.();
    signal.addEventListener('abort', stop);
    void this.#ranks.lost.then((error) => {
      this.#end(error);
    });
    try {
      while (!signal.aborted && this.#ended === null) {
        this.#sweep();
        if (this.#sequences.length === 0) await this.#idle();
        else await this.#step();
      }
      this.#end(new CaravanError('cancelled', 'the engine was stopped'));
    } catch (thrown) {
      const error = toCaravanError(thrown);
      this.#end(error);
      throw error;
    } finally {
      signal.removeEventListener('abort', stop);
      this.#ranks.close();
    }
    if (!signal.aborted && this.#ended !== null) throw this.#ended;
  }

  /** Every sink hears what the last step gave its sequence. */
  readonly #tell = (): void => {
    for (const sequence of this.#sequences) if (!sequence.isCancelled) sequence.tell();
  };

  /** Cancelled sequences leave, and resumed ones that were already over end. */
  #sweep(): void {
    for (const sequence of [...this.#sequences]) {
      if (sequence.isCancelled) this.#leave(sequence);
      else if (sequence.isNew) {
        const reason = sequence.resumedEnding;
        if (reason !== null) this.#finish(sequence, reason);
      }
    }
  }

  async #idle(): Promise<void> {
    await new Promise<void>((resolve) => (this.#wake = resolve));
    this.#wake = null;
  }

  async #step(): Promise<void> {
    const startMs = performance.now();
    const { maxStepRows, maxChunkTokens, draftTokens = 'adaptive' } = this.#options;
    const joins = beginSequences(this.#sequences, this.#slots);
    const begun = this.#sequences.filter(({ isNew }) => !isNew);
    guessNext(begun, draftTokens, maxStepRows - MIN_PREFILL_TOKENS, this.#costs);
    const plan = planStep(begun, {
      tokenBudget: this.#tokenBudget,
      maxChunkTokens: maxChunkTokens ?? maxStepRows,
    });
    announceStep(plan);
    const { decodes, drafts, chunks } = plan;
    this.#stepNumber += 1;
    const rewinds = begun.filter((sequence) => this.#overfed.has(sequence));
    this.#overfed.clear();
    const step = stepMessage(this.#stepNumber, plan, { joins, rewinds }, this.#masks);
    const sentMs = performance.now();
    const computing = this.#ranks.forward(step);
    // Once the step is on its way: texts, journal and streams take their time beside it.
    setImmediate(this.#tell);
    const results = await computing;
    const ranksMs = performance.now() - sentMs;
    const draftRows = drafts.reduce((sum, { draft }) => sum + draft.length, 0);
    const promptTokens = chunks.reduce((sum, { count }) => sum + count, 0);
    const rows = decodes.length + drafts.length + draftRows + promptTokens;
    if (promptTokens === 0) this.#costs.add(rows, ranksMs);
    for (const sequence of decodes) sequence.markFed(1);
    for (const { sequence, count } of chunks) sequence.markFed(count);
    const acceptedTokens = await this.#sample(plan, step, results);
    for (const { slot, tokens, sharedLength } of begun) {
      this.#slots.hold(slot, tokens, sharedLength);
    }
    this.#movedMs = performance.now();

    const stepRows = this.#tokenBudget;
    const stretchUs = Math.max(...results.map((result) => result.longestStretchUs));
    this.#tokenBudget = adaptBudget(this.#tokenBudget, maxStepRows, rows, stretchUs);
    const busiest = results.reduce((a, b) => (b.computeUs > a.computeUs ? b : a));
    this.#options.onStep?.({
      ...{ rows, promptTokens, stepRows },
      sequences: decodes.length + drafts.length + chunks.length,
      draftTokens: draftRows,
      acceptedTokens,
      totalMs: performance.now() - startMs,
      ranksMs,
      waitMs: busiest.waitUs / 1000,
      stretchMs: stretchUs / 1000,
    });
  }

  /**
   * Sampled rows are the decodes, those of drafts, then those of chunks; forced rows are passed over.
   *
   * @returns guessed tokens that came true.
   */
  async #sample(
    { decodes, drafts, chunks }: StepPlan<Sequence>,
    step: Step,
    results: readonly StepResult[],
  ): Promise<number> {
    const rows = new SampledRowReader(results, this.#ranks.vocabCounts);
    const read = (count: number, { spec }: Sequence): SampledRow[] =>
      Array.from({ length: count }, () => rows.next(spec.reportsLogprobs === true));
    for (const sequence of decodes) {
      const [row] = read(1, sequence);
      if (sequence.isSampledAfter(0)) await this.#sampleRow(sequence, step.number, row!);
    }
    let accepted = 0;
    for (const sequence of drafts) {
      accepted += await this.#verify(sequence, step, read(1 + sequence.draft.length, sequence));
    }
    for (const [i, { sequence }] of chunks.entries()) {
      const { sampledRows, tokens, targets } = step.chunks[drafts.length + i]!;
      if (sampledRows === SampledRows.SAMPLED_ROWS_NONE) continue;
      const rowCount = sampledRows === SampledRows.SAMPLED_ROWS_ALL ? tokens.length : 1;
      const chunkRows = read(rowCount, sequence);
      if (targets.length > 0 && !sequence.isCancelled) {
        const count = sequence.topLogprobCount;
        sequence.sink.prompt?.(targets.map((_, at) => chunkRows[at]!.targetLogprobs(count)));
      }
      if (sequence.isSampledAfter(0)) {
        await this.#sampleRow(sequence, step.number, chunkRows.at(-1)!);
      }
    }
    return accepted;
  }

  /**
   * Each row is sampled as if it were the only one, and the next counts as long as the sample is what was guessed: so
   * tokens are the same with and without guesses, at every temperature.
   *
   * @returns guessed tokens that came true.
   */
  async #verify(sequence: Sequence, step: Step, rows: readonly SampledRow[]): Promise<number> {
    const { draft } = sequence;
    let accepted = 0;
    for (const row of rows) {
      // The row's own token was right, or the row would not be looked at.
      sequence.markFed(1);
      const token = await this.#sampleRow(sequence, step.number, row);
      if (token === null || token !== draft[accepted]) break;
      accepted += 1;
    }
    if (accepted < draft.length) this.#overfed.add(sequence);
    return accepted;
  }

  /** @returns the token, or null when the sequence is over. */
  async #sampleRow(
    sequence: Sequence,
    stepNumber: number,
    row: SampledRow,
  ): Promise<number | null> {
    if (sequence.isCancelled) return null;
    if (sequence.spec.request.maxTokens === 0) {
      this.#finish(sequence, 'length');
      return null;
    }
    const { token, logprobs } = await drawToken(this.#ranks, sequence, stepNumber, row);
    let reason: FinishReason | null;
    try {
      reason = sequence.accept(token, logprobs);
    } catch (thrown) {
      // A grammar that takes too much: its sequence alone fails.
      this.#leave(sequence);
      sequence.tell();
      sequence.sink.fail(toCaravanError(thrown));
      return null;
    }
    if (reason === null) return token;
    this.#finish(sequence, reason);
    return null;
  }

  #finish(sequence: Sequence, reason: FinishReason): void {
    this.#leave(sequence);
    sequence.tell();
    sequence.sink.end(reason, sequence.endText());
  }

  #leave(sequence: Sequence): void {
    this.#sequences = this.#sequences.filter((other) => other !== sequence);
    this.#slots.release(sequence.slot);
    this.#options.onSlotFree?.();
  }

  /** The first reason stands; every sequence hears of it. */
  #end(error: CaravanError): void {
    if (this.#ended !== null) return;
    this.#ended = error;
    for (const sequence of this.#sequences.splice(0)) {
      if (sequence.isCancelled) continue;
      sequence.tell();
      sequence.sink.fail(error);
    }
    this.#wake?.();
  }
}
