/**
 * Picks the rows of the next step: pure, synchronous, without clock or I/O.
 *
 * Every decoding sequence gets its one row, and rows for the tokens that it guesses. What is left of the token budget
 * goes to prompts: the most urgent first, and those of equal urgency in the order in which their sequences came. A
 * chunk has at least two tokens, and leaves none or at least two behind, since
 * attention over a single row takes another kernel: so the chunking cannot be seen in the result.
 */

export interface Schedulable {
  readonly slot: number;
  /** Tokens that are still to be fed in chunks; 0 when it decodes. */
  readonly prefillLeft: number;
  /** Guessed tokens that are computed with its next row. */
  readonly draft: readonly number[];
  /** Prompts of a lower number go first; 0 if left out. */
  readonly urgency?: number;
}

export interface StepLimits {
  /** Rows of one step, unless there are more decodes than that. */
  readonly tokenBudget: number;
  /** Tokens of one chunk. 1 switches the rule of two off. */
  readonly maxChunkTokens: number;
}

export interface StepPlan<T extends Schedulable> {
  /** Of one row each, by rising slot. */
  readonly decodes: readonly T[];
  /** Decodes with guessed tokens behind their own. */
  readonly drafts: readonly T[];
  readonly chunks: readonly { readonly sequence: T; readonly count: number }[];
}

/** Prompts get at least this much of a step, however many sequences decode. */
export const MIN_PREFILL_TOKENS = 16;

/** @param sequences in the order in which they came. */
export function planStep<T extends Schedulable>(
  sequences: readonly T[],
  { tokenBudget, maxChunkTokens }: StepLimits,
): StepPlan<T> {
  const decoding = sequences
    .filter((sequence) => sequence.prefillLeft === 0)
    .sort((a, b) => a.slot - b.slot);
  const decodes = decoding.filter(({ draft }) => draft.length === 0);
  const drafts = decoding.filter(({ draft }) => draft.length > 0);
  const decodeRows = decoding.reduce((sum, { draft }) => sum + 1 + draft.length, 0);
  const chunks: { sequence: T; count: number }[] = [];
  let left = Math.max(tokenBudget - decodeRows, MIN_PREFILL_TOKENS);
  const prompts = sequences.filter((sequence) => sequence.prefillLeft > 0);
  prompts.sort((a, b) => (a.urgency ?? 0) - (b.urgency ?? 0));
  for (const sequence of prompts) {
    const count = chunkOf(sequence.prefillLeft, Math.min(left, maxChunkTokens), maxChunkTokens);
    if (count === 0) continue;
    chunks.push({ sequence, count });
    left -= count;
  }
  return { decodes, drafts, chunks };
}

function chunkOf(prefillLeft: number, most: number, maxChunkTokens: number): number {
  if (prefillLeft === 1) return Math.min(most, 1);
  let count = Math.min(prefillLeft, most);
  if (maxChunkTokens < 3) return count;
  if (prefillLeft - count === 1) count -= 1;
  return count < 2 ? 0 : count;
}

/** A step should not keep a rank from serving the network for longer than this: half of what is promised. */
const STRETCH_LIMIT_US = 25_000;
const MIN_TOKEN_BUDGET = 16;

/**
 * The budget for coming steps: halved when a rank was deaf for too long in a step that was full, doubled while
 * it was well within the limit.
 *
 * @param rows of the last step. @param stretchUs the longest stretch of any rank in it.
 */
export function adaptBudget(
  tokenBudget: number,
  maxTokenBudget: number,
  rows: number,
  stretchUs: number,
): number {
  if (stretchUs > STRETCH_LIMIT_US && rows > MIN_TOKEN_BUDGET) {
    return Math.max(MIN_TOKEN_BUDGET, Math.min(tokenBudget, rows) >> 1);
  }
  const isFull = rows * 2 > tokenBudget;
  if (isFull && stretchUs * 2 < STRETCH_LIMIT_US) return Math.min(maxTokenBudget, tokenBudget * 2);
  return tokenBudget;
}
