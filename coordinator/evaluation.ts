/**
 * A teacher-forced pass: the tokens are given, and what the model says at every position is reported.
 */
import { CaravanError } from '../proto/errors.js';
import { SampledRows, type StepResult } from '../proto/gen/cluster.js';
import type { Ranks } from './ranks.js';
import { logSumExp } from './sampler.js';

export interface Evaluation {
  /** (tokens) the most likely next token after each position. */
  readonly argmax: readonly number[];
  /** exp of the mean negative log-likelihood of tokens 1 and on; null for a single token. */
  readonly perplexity: number | null;
  /** By position: (vocabulary). */
  readonly logits: ReadonlyMap<number, Float32Array>;
}

/**
 * Feeds `tokens` in chunks through slot 0 of a fresh group.
 *
 * @param positions whose whole rows of logits are wanted.
 * @throws CaravanError `context_length_exceeded`, or `invalid_request` for an id out of the vocabulary.
 */
export async function evaluate(
  ranks: Ranks,
  tokens: readonly number[],
  chunkTokens: number,
  positions: readonly number[],
  maxSeqLen: number,
): Promise<Evaluation> {
  if (tokens.length > maxSeqLen) {
    throw new CaravanError(
      'context_length_exceeded',
      `${tokens.length} tokens: the context has ${maxSeqLen} positions`,
    );
  }
  const vocabSize = ranks.vocabCounts.reduce((sum, count) => sum + count, 0);
  const alien = tokens.findIndex((token) => token >= vocabSize);
  if (alien !== -1) {
    throw new CaravanError(
      'invalid_request',
      `token ${tokens[alien]!} at position ${alien}: the vocabulary has ${vocabSize}`,
    );
  }
  const wanted = new Set(positions);
  const argmax: number[] = [];
  const logits = new Map<number, Float32Array>();
  let negativeLogLikelihood = 0;
  for (let start = 0, number = 1; start < tokens.length; start += chunkTokens, number += 1) {
    const chunk = tokens.slice(start, start + chunkTokens);
    // The row of the last token of all has nothing to be compared with: its target is any id.
    const targets = chunk.map((_, i) => tokens[start + i + 1] ?? 0);
    const results = await ranks.forward({
      number,
      joins: number === 1 ? [{ slot: 0, temperature: 0 }] : [],
      decodeSlots: [],
      decodeTokens: [],
      chunks: [{ slot: 0, tokens: chunk, sampledRows: SampledRows.SAMPLED_ROWS_ALL, targets }],
      topK: 1,
    });
    for (let row = 0; row < chunk.length; row += 1) {
      const position = start + row;
      argmax.push(argmaxOf(results, row));
      if (position + 1 < tokens.length) negativeLogLikelihood += lossOf(results, row);
      if (wanted.has(position)) logits.set(position, await ranks.fetchRow(number, row));
    }
  }
  const predicted = tokens.length - 1;
  return {
    argmax,
    perplexity: predicted === 0 ? null : Math.exp(negativeLogLikelihood / predicted),
    logits,
  };
}

/** With topK 1, a result's row is one logit; equal ones go to the lower id, which is the lower rank's. */
function argmaxOf(results: readonly StepResult[], row: number): number {
  let best = results[0]!;
  for (const result of results) if (result.topLogits[row]! > best.topLogits[row]!) best = result;
  return best.topIds[row]!;
}

function lossOf(results: readonly StepResult[], row: number): number {
  const owner = results.find((result) => !Number.isNaN(result.targetLogits[row]!));
  return logSumExp(results.map((result) => result.lseRaw[row]!)) - owner!.targetLogits[row]!;
}
