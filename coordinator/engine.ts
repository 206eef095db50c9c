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
import { SampledRows, type Chunk, type Step, type StepResult } from '../proto/gen/cluster.js';
import { adjustmentOf } from './adjustment.js';
import { coin, purpose } from './coin.js';
import type { EngineLoad } from './engine-health.js';
import { GrammarCache } from './grammar.js';
import { MaskTable } from './mask-table.js';
import type { Ranks } from './ranks.js';
import type { FinishReason, Request, TokenLogprobs } from './request.js';
import { pickToken, SAMPLED_TOP_K, wholeRowCandidates } from './sampler.js';
import { SampledRowReader, type SampledRow } from './sampled-row.js';
import { adaptBudget, planStep, type StepPlan } from './scheduler.js';
import { announceStep } from './step-announcement.js';
import { Sequence } from './sequence.js';
import { Slots } from './slots.js';
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
  /** Whether the sink is told the logprobs of every token. */
  readonly reportsLogprobs?: boolean;
  /** Whether the sink is told the logprobs of the prompt's tokens. */
  readonly reportsPrompt?: boolean;
}

/** Hears of a sequence, synchronously and in order; must return at once and never throw. */
export interface SequenceSink {
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
  /** Hears of every step, for metrics. */
  readonly onStep?: (figures: StepFigures) => void;
  /** Hears that a sequence has left and its slot can be taken. Must return at once. */
  readonly onSlotFree?: () => void;
}

export interface StepFigures {
  readonly rows: number;
  readonly sequences: number;
  /** From planning to the last sink, and what of it the ranks took (the slowest). */
  readonly totalMs: number;
  readonly ranksMs: number;
  /** Waiting for peers, of the rank that computed longest. */
  readonly waitMs: number;
  /** The longest time that a rank did not serve the network. */
  readonly stretchMs: number;
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
    this.#slots = new Slots(options.maxBatchSize);
    this.#grammars = new GrammarCache(tokenizer);
    this.#masks = new MaskTable(KEPT_MASKS + 2 * options.maxBatchSize);
    this.#tokenBudget = Math.min(FIRST_TOKEN_BUDGET, options.maxStepRows);
  }

  get freeSlotCount(): number {
    return this.#ended === null ? this.#slots.freeCount : 0;
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
      kvPositionsUsed: this.#sequences.reduce((sum, { fedCount }) => sum + fedCount, 0),
      unmovedMs: sequences === 0 ? 0 : performance.now() - this.#movedMs,
    };
  }

  add(spec: SequenceSpec, sink: SequenceSink): SequenceHandle {
    if (this.#ended !== null) throw this.#ended;
    const { maxSeqLen, isExact } = this.#options;
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
    const slot = this.#slots.take();
    if (slot === null) throw new CaravanError('internal', 'no slot is free');
    const text = new TextStream(this.#tokenizer, spec.request);
    const sequence = new Sequence(spec, slot, sink, text, {
      maxSeqLen,
      isExact,
      eosTokenIds: new Set(this.#tokenizer.eosTokenIds),
      walk,
    });
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
    const { maxStepRows, maxChunkTokens } = this.#options;
    const plan = planStep(this.#sequences, {
      tokenBudget: this.#tokenBudget,
      maxChunkTokens: maxChunkTokens ?? maxStepRows,
    });
    announceStep(plan);
    const step = this.#toStep(plan);
    const sentMs = performance.now();
    const results = await this.#ranks.forward(step);
    const ranksMs = performance.now() - sentMs;
    const rows = plan.decodes.length + plan.chunks.reduce((sum, { count }) => sum + count, 0);
    for (const sequence of plan.decodes) sequence.markFed(1);
    for (const { sequence, count } of plan.chunks) sequence.markFed(count);
    await this.#sample(plan, step, results);
    this.#movedMs = performance.now();

    const stretchUs = Math.max(...results.map((result) => result.longestStretchUs));
    this.#tokenBudget = adaptBudget(this.#tokenBudget, maxStepRows, rows, stretchUs);
    const busiest = results.reduce((a, b) => (b.computeUs > a.computeUs ? b : a));
    this.#options.onStep?.({
      rows,
      sequences: plan.decodes.length + plan.chunks.length,
      totalMs: performance.now() - startMs,
      ranksMs,
      waitMs: busiest.waitUs / 1000,
      stretchMs: stretchUs / 1000,
    });
  }

  #toStep({ decodes, chunks }: StepPlan<Sequence>): Step {
    this.#stepNumber += 1;
    const starting = chunks.map(({ sequence }) => sequence).filter((sequence) => sequence.isNew);
    for (const sequence of starting) sequence.isNew = false;
    const sequences = [...decodes, ...chunks.map(({ sequence }) => sequence)];
    const masked = [
      ...decodes.filter((sequence) => sequence.isSampledAfter(1)),
      ...chunks.flatMap(({ sequence, count }) =>
        sequence.isSampledAfter(count) ? [sequence] : [],
      ),
    ];
    const isSampling = sequences.some(({ spec }) => spec.request.sampling.temperature > 0);
    return {
      number: this.#stepNumber,
      joins: starting.map(({ slot, spec }) => ({
        slot,
        temperature: spec.request.sampling.temperature,
        adjustment: adjustmentOf(spec.request),
        reportsRaw: spec.reportsLogprobs === true,
      })),
      decodeSlots: decodes.map(({ slot }) => slot),
      decodeTokens: decodes.map(({ decodeToken }) => decodeToken),
      chunks: chunks.map(({ sequence, count }): Chunk => {
        const targets = sequence.promptTargets(count);
        const isSampled = sequence.isSampledAfter(count);
        return {
          slot: sequence.slot,
          tokens: sequence.nextTokens(count),
          sampledRows:
            targets.length > 0
              ? SampledRows.SAMPLED_ROWS_ALL
              : isSampled
                ? SampledRows.SAMPLED_ROWS_LAST
                : SampledRows.SAMPLED_ROWS_NONE,
          targets,
        };
      }),
      topK: isSampling ? SAMPLED_TOP_K : 1,
      masking: this.#masks.masking(
        masked.flatMap(({ slot, mask }) => (mask === null ? [] : [{ slot, mask }])),
      ),
      rawTopK: Math.max(...sequences.map(({ topLogprobCount }) => topLogprobCount)),
    };
  }

  /** Sampled rows are the decodes, then those of chunks; forced rows are passed over. */
  async #sample(
    { decodes, chunks }: StepPlan<Sequence>,
    step: Step,
    results: readonly StepResult[],
  ): Promise<void> {
    const rows = new SampledRowReader(results, this.#ranks.vocabCounts);
    for (const sequence of decodes) {
      const row = rows.next(sequence.spec.reportsLogprobs === true);
      if (sequence.isSampledAfter(0)) await this.#sampleRow(sequence, step.number, row);
    }
    for (const [i, { sequence }] of chunks.entries()) {
      const { sampledRows, tokens, targets } = step.chunks[i]!;
      if (sampledRows === SampledRows.SAMPLED_ROWS_NONE) continue;
      const rowCount = sampledRows === SampledRows.SAMPLED_ROWS_ALL ? tokens.length : 1;
      const isRaw = sequence.spec.reportsLogprobs === true;
      const chunkRows = Array.from({ length: rowCount }, () => rows.next(isRaw));
      if (targets.length > 0 && !sequence.isCancelled) {
        const count = sequence.topLogprobCount;
        sequence.sink.prompt?.(targets.map((_, at) => chunkRows[at]!.targetLogprobs(count)));
      }
      if (sequence.isSampledAfter(0)) {
        await this.#sampleRow(sequence, step.number, chunkRows.at(-1)!);
      }
    }
  }

  async #sampleRow(sequence: Sequence, stepNumber: number, row: SampledRow): Promise<void> {
    if (sequence.isCancelled) return;
    const { spec } = sequence;
    const { sampling } = spec.request;
    if (spec.request.maxTokens === 0) {
      this.#finish(sequence, 'length');
      return;
    }
    const drawn =
      sampling.temperature === 0
        ? 0
        : coin(sampling.seed, spec.index, sequence.position, purpose.sample);
    const candidates = row.candidates();
    const token =
      pickToken(candidates, sampling, drawn) ??
      pickToken(
        wholeRowCandidates(
          await this.#ranks.fetchRow(stepNumber, row.number, 'adjusted'),
          candidates.lse,
        ),
        sampling,
        drawn,
      );
    if (token === null) throw new CaravanError('internal', 'a whole row gave no token');
    let logprobs: TokenLogprobs | undefined;
    if (spec.reportsLogprobs === true) {
      const logit =
        row.rawLogitOf(token) ??
        (await this.#ranks.fetchRow(stepNumber, row.number, 'raw'))[token]!;
      logprobs = row.logprobs(logit, sequence.topLogprobCount);
    }
    let reason: FinishReason | null;
    try {
      reason = sequence.accept(token, logprobs);
    } catch (thrown) {
      // A grammar that takes too much: its sequence alone fails.
      this.#leave(sequence);
      sequence.sink.fail(toCaravanError(thrown));
      return;
    }
    if (reason !== null) this.#finish(sequence, reason);
  }

  #finish(sequence: Sequence, reason: FinishReason): void {
    this.#leave(sequence);
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
      if (!sequence.isCancelled) sequence.sink.fail(error);
    }
    this.#wake?.();
  }
}
