/** One row of a step's result as all ranks together tell of it. Pure. */
import type { StepResult } from '../proto/gen/cluster.js';
import type { TokenLogprobs } from './request.js';
import { logSumExp, mergeCandidates, type Candidates } from './sampler.js';

/** Six digits are more than float32 logits have. */
const rounded = (logprob: number): number => Number(logprob.toPrecision(7));

export class SampledRow {
  readonly #results: readonly StepResult[];
  readonly #vocabCounts: readonly number[];
  /** Number among the step's sampled rows. */
  readonly number: number;
  /** Number among the rows that come with raw logits; null for others. */
  readonly #rawNumber: number | null;

  constructor(
    results: readonly StepResult[],
    vocabCounts: readonly number[],
    number: number,
    rawNumber: number | null,
  ) {
    this.#results = results;
    this.#vocabCounts = vocabCounts;
    this.number = number;
    this.#rawNumber = rawNumber;
  }

  /** What is sampled from. */
  candidates(): Candidates {
    return mergeCandidates(this.#results, this.#vocabCounts, this.number);
  }

  /** The logit of a token before adjustments, or null when no rank named it. */
  rawLogitOf(token: number): number | null {
    if (this.#rawNumber === null) return null;
    for (const { topIds, raw, lseRaw } of this.#results) {
      const width = topIds.length / lseRaw.length;
      const start = this.number * width;
      const at = topIds.indexOf(token, start);
      if (at !== -1 && at < start + width) {
        return raw!.adjustedTopLogits[this.#rawNumber * width + at - start]!;
      }
    }
    return null;
  }

  /** Logprobs of the token with this raw logit, and of the `count` likeliest. */
  logprobs(rawLogit: number, count: number): TokenLogprobs {
    const lse = logSumExp(this.#results.map(({ lseRaw }) => lseRaw[this.number]!));
    return { logprob: rounded(rawLogit - lse), top: this.#rawTop(count, lse) };
  }

  /** As `logprobs`, of the row's target. */
  targetLogprobs(count: number): TokenLogprobs {
    const logits = this.#results.map(({ targetLogits }) => targetLogits[this.number] ?? NaN);
    const logit = logits.find((each) => !Number.isNaN(each));
    return this.logprobs(logit ?? NaN, count);
  }

  /** Every rank names as many as are wanted, or its whole slice: none is missed. */
  #rawTop(count: number, lse: number): [number, number][] {
    const named = this.#results.flatMap(({ raw }) => {
      const { topIds, topLogits, rowCount } = raw!;
      const width = topIds.length / rowCount;
      const start = this.#rawNumber! * width;
      return Array.from(
        { length: width },
        (_, i) => [topIds[start + i]!, topLogits[start + i]!] as const,
      );
    });
    return named
      .sort(([idA, a], [idB, b]) => b - a || idA - idB)
      .slice(0, count)
      .map(([id, logit]) => [id, rounded(logit - lse)]);
  }
}

/** Hands out the sampled rows of a step in their order. */
export class SampledRowReader {
  readonly #results: readonly StepResult[];
  readonly #vocabCounts: readonly number[];
  #number = 0;
  #rawNumber = 0;

  constructor(results: readonly StepResult[], vocabCounts: readonly number[]) {
    this.#results = results;
    this.#vocabCounts = vocabCounts;
  }

  /** @param isRaw whether the row's slot reports raw logits. */
  next(isRaw: boolean): SampledRow {
    const rawNumber = isRaw ? this.#rawNumber : null;
    const row = new SampledRow(this.#results, this.#vocabCounts, this.#number, rawNumber);
    this.#number += 1;
    if (isRaw) this.#rawNumber += 1;
    return row;
  }
}
