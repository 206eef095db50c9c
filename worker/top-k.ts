/**
 * What a rank tells of a row of its vocabulary slice: the k largest logits and log-sum-exps.
 */

/**
 * Writes the `k` largest of `logits[start … start + count - 1]` to `ids` and `values` from index `at`,
 * falling; equal logits by rising id. `firstId` is the id of the first logit. k ≤ count. NaN never wins.
 */
export function selectTopK(
  logits: Float32Array,
  start: number,
  count: number,
  firstId: number,
  k: number,
  ids: number[],
  values: number[],
  at: number,
): void {
  if (k === 1) {
    let best = 0;
    for (let i = 1; i < count; i += 1) if (logits[start + i]! > logits[start + best]!) best = i;
    ids[at] = firstId + best;
    values[at] = logits[start + best]!;
    return;
  }
  // A min-heap of the k best so far in ids/values[at …]; its root is the one to beat. Ids rise during the
  // scan, so an equal logit never replaces an earlier one.
  for (let i = 0; i < k; i += 1) {
    ids[at + i] = firstId + i;
    values[at + i] = logits[start + i]!;
  }
  for (let i = (k >> 1) - 1; i >= 0; i -= 1) siftDown(ids, values, at, k, i);
  for (let i = k; i < count; i += 1) {
    const value = logits[start + i]!;
    if (value > values[at]!) {
      ids[at] = firstId + i;
      values[at] = value;
      siftDown(ids, values, at, k, 0);
    }
  }
  // Heapsort: the worst goes to the end, again and again.
  for (let size = k - 1; size > 0; size -= 1) {
    swap(ids, values, at, at + size);
    siftDown(ids, values, at, size, 0);
  }
}

function siftDown(ids: number[], values: number[], at: number, size: number, from: number): void {
  for (let parent = from; ;) {
    const left = 2 * parent + 1;
    if (left >= size) return;
    const right = left + 1;
    const child = right < size && isWorse(ids, values, at + right, at + left) ? right : left;
    if (!isWorse(ids, values, at + child, at + parent)) return;
    swap(ids, values, at + child, at + parent);
    parent = child;
  }
}

const isWorse = (ids: readonly number[], values: readonly number[], a: number, b: number) =>
  values[a]! < values[b]! || (values[a] === values[b] && ids[a]! > ids[b]!);

function swap(ids: number[], values: number[], a: number, b: number): void {
  const id = ids[a]!;
  const value = values[a]!;
  ids[a] = ids[b]!;
  values[a] = values[b]!;
  ids[b] = id;
  values[b] = value;
}

/** The largest logit of a slice. */
export function largestOf(logits: Float32Array): number {
  let max = -Infinity;
  for (const logit of logits) if (logit > max) max = logit;
  return max;
}

/** log Σ exp(logit / temperature) over a slice, in float64. `max` is the slice's largest logit; -∞ where all are masked. */
export function logSumExp(
  logits: Float32Array,
  start: number,
  count: number,
  max: number,
  temperature: number,
): number {
  if (max === -Infinity) return max;
  let sum = 0;
  for (let i = start; i < start + count; i += 1) {
    sum += Math.exp((logits[i]! - max) / temperature);
  }
  return max / temperature + Math.log(sum);
}
