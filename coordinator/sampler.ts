/**
 * Picks a token from what the ranks tell of a row: the largest logits of each vocabulary slice, and each
 * slice's log-sum-exp. Exact: whenever the answer could lie outside what is known, it asks for the whole
 * row instead of guessing. Pure.
 */
import type { StepResult } from '../proto/gen/cluster.js';
import type { Sampling } from './request.js';

/** The most likely tokens of one row. */
export interface Candidates {
  /** By falling logit; ties by rising id. */
  readonly ids: readonly number[];
  readonly logits: readonly number[];
  /** log Σ exp(logit / temperature) over the whole vocabulary; unused when temperature is 0. */
  readonly lse: number;
  /** True when the whole vocabulary is here. */
  readonly isWhole: boolean;
}

/** How many of the largest logits to ask every rank for when a row is sampled. */
export const SAMPLED_TOP_K = 64;

/**
 * Merges the ranks' lists of one row. The result ends where a rank's list ends while that rank has more:
 * what comes next is not known.
 *
 * @param results one per rank. @param vocabCounts sizes of the ranks' vocabulary slices.
 * @param row of the step's sampled rows.
 */
export function mergeCandidates(
  results: readonly StepResult[],
  vocabCounts: readonly number[],
  row: number,
): Candidates {
  const widths = results.map((result) => result.topIds.length / result.lseRaw.length);
  const heads = results.map(() => 0);
  const ids: number[] = [];
  const logits: number[] = [];
  for (;;) {
    let best = -1;
    let bestId = 0;
    let bestLogit = -Infinity;
    let isAnyLeft = false;
    for (let rank = 0; rank < results.length; rank += 1) {
      const width = widths[rank]!;
      const head = heads[rank]!;
      if (head === width) {
        if (width < vocabCounts[rank]!)
          return { ids, logits, lse: lseOf(results, row), isWhole: false };
        continue;
      }
      isAnyLeft = true;
      const logit = results[rank]!.topLogits[row * width + head]!;
      const id = results[rank]!.topIds[row * width + head]!;
      if (best === -1 || logit > bestLogit || (logit === bestLogit && id < bestId)) {
        best = rank;
        bestId = id;
        bestLogit = logit;
      }
    }
    // What is left is masked: it is as if it were not there.
    if (!isAnyLeft || bestLogit === -Infinity)
      return { ids, logits, lse: lseOf(results, row), isWhole: true };
    ids.push(bestId);
    logits.push(bestLogit);
    heads[best]! += 1;
  }
}

/** Candidates of a whole row of logits, (vocabulary), but for masked ones. @param lse as in Candidates. */
export function wholeRowCandidates(row: Float32Array, lse: number): Candidates {
  const ids = Array.from(row, (_, id) => id)
    .filter((id) => row[id]! > -Infinity)
    .sort((a, b) => row[b]! - row[a]! || a - b);
  return { ids, logits: ids.map((id) => row[id]!), lse, isWhole: true };
}

const lseOf = (results: readonly StepResult[], row: number): number =>
  logSumExp(results.map((result) => result.lseAdjusted[row]!));

/** log Σ exp(x). */
export function logSumExp(xs: readonly number[]): number {
  const max = Math.max(...xs);
  if (max === -Infinity) return max;
  return max + Math.log(xs.reduce((sum, x) => sum + Math.exp(x - max), 0));
}

/**
 * The token that the coin falls on, or null when it cannot be told without the whole row.
 *
 * Temperature 0 takes the largest logit. Otherwise probabilities are softmax(logit / temperature); top_k
 * keeps the K largest, min_p those that are not too far below the largest, and both renormalise; top_p then
 * keeps a token while the sum before it is ≤ p (the token that crosses p stays), as Meta's reference does; the
 * CDF of what is left is inverted in falling order.
 *
 * @param coin in [0, 1).
 */
export function pickToken(
  candidates: Candidates,
  { temperature, topP, topK, minP }: Omit<Sampling, 'seed'>,
  coin: number,
): number | null {
  const { ids, logits, lse, isWhole } = candidates;
  if (temperature === 0) return ids[0]!;
  const probability = (i: number): number => Math.exp(logits[i]! / temperature - lse);

  // What top_k and min_p keep: candidates 0 to limit - 1.
  const isCutByTopK = topK > 0 && topK <= ids.length;
  let limit = isCutByTopK ? topK : ids.length;
  let isCut = isCutByTopK;
  if (minP !== undefined) {
    const leastLogit = logits[0]! + temperature * Math.log(minP);
    const first = logits.findIndex((logit, i) => i < limit && logit < leastLogit);
    if (first !== -1) {
      limit = first;
      isCut = true;
    }
  }
  const mayBeCut = topK > 0 || minP !== undefined;
  if (mayBeCut && !isCut && !isWhole) return null;

  let keptMass = 1;
  if (mayBeCut) {
    keptMass = 0;
    for (let i = 0; i < limit; i += 1) keptMass += probability(i);
  }
  // The support: candidates 0 to count - 1, with their mass.
  let count = limit;
  let mass = keptMass;
  if (topP < 1) {
    count = 0;
    mass = 0;
    while (count < limit && mass <= topP * keptMass) {
      mass += probability(count);
      count += 1;
    }
    const isCrossed = mass > topP * keptMass;
    if (!isCrossed && !mayBeCut && !isWhole) return null;
  }
  let sum = 0;
  for (let i = 0; i < count; i += 1) {
    sum += probability(i);
    if (sum > coin * mass) return ids[i]!;
  }
  // The coin fell beyond what is known, or (a whole support) beyond the last rounding error.
  const isSupportKnown = isWhole || mayBeCut || topP < 1;
  return isSupportKnown ? ids[count - 1]! : null;
}
