/** Holds a checkpoint to known tokens and logits, at any tp, whatever layout it has. */
import assert from 'node:assert/strict';
import { evaluate } from '../coordinator/evaluation.js';
import { readTinyGolden, sharedGolden } from './golden.js';
import { argmax, Oracle, prefill } from './oracle.js';
import type { RankPool } from './rank-pool.js';

const LIMITS = { maxSeqLen: 320, maxBatchSize: 1, maxStepRows: 320 };

export interface Golden {
  readonly ids: readonly number[];
  /** By position: (vocabulary). */
  readonly logits: ReadonlyMap<number, readonly number[]>;
  /** Most likely next token, from position `firstArgmax`. */
  readonly argmax: readonly number[];
  readonly firstArgmax: number;
}

/** Of stories260K; needs `sharedGolden.file`. */
export const storiesGoldens = (): Golden[] =>
  sharedGolden.read().map((g) => ({ ...g, firstArgmax: 0 }));

/** Of caravan-tiny. */
export const tinyGoldens = (): Golden[] =>
  readTinyGolden().map(({ promptIds, ids, firstLogits }) => ({
    ids: [...promptIds, ...ids.slice(0, -1)],
    logits: new Map([[promptIds.length - 1, firstLogits]]),
    argmax: ids,
    firstArgmax: promptIds.length - 1,
  }));

/** What the oracle makes of the weights of a folder in Hugging Face's layout, after each prompt. */
export function oracleGoldens(folder: string, prompts: readonly (readonly number[])[]): Golden[] {
  const oracle = new Oracle(folder);
  return prompts.map((ids) => {
    const logits = [...prefill(oracle, ids).logits];
    const last = ids.length - 1;
    return { ids, logits: new Map([[last, logits]]), argmax: [argmax(logits)], firstArgmax: last };
  });
}

/** The largest difference of logits, after checking the tokens. */
export async function differ(
  pool: RankPool,
  model: string,
  tp: number,
  golden: Golden,
): Promise<number> {
  const { ids, logits, argmax, firstArgmax } = golden;
  const found = await pool.withGroup(model, { tp, ...LIMITS }, ({ ranks }) =>
    evaluate(ranks, ids, ids.length, [...logits.keys()], LIMITS.maxSeqLen),
  );
  assert.deepEqual(found.argmax.slice(firstArgmax, firstArgmax + argmax.length), argmax);
  let most = 0;
  for (const [position, expected] of logits) {
    const row = found.logits.get(position)!;
    assert.equal(row.length, expected.length);
    expected.forEach((logit, id) => (most = Math.max(most, Math.abs(row[id]! - logit))));
  }
  return most;
}
