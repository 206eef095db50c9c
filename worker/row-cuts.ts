/**
 * How the rows of a step are cut into those of its attention groups, and put together again: in several cuts where there are
 * many, since a kernel of WebGPU takes but so many tensors (12 on some devices).
 */

/** Groups `first` to `first + count - 1`. */
export interface GroupRange {
  readonly first: number;
  readonly count: number;
}

/** One range, cut into those of `parts`. */
export interface RowCut extends GroupRange {
  readonly parts: readonly GroupRange[];
}

/** With the whole, and the sizes, these are ten tensors. */
const MOST_PARTS = 8;

/** All cuts, each before those of its parts; none for one group. */
export function rowCuts({ first, count }: GroupRange): RowCut[] {
  if (count <= 1) return [];
  // As large as parts of parts can be, so that few cuts do.
  let size = 1;
  while (size * MOST_PARTS < count) size *= MOST_PARTS;
  const parts = Array.from({ length: Math.ceil(count / size) }, (_, i) => ({
    first: first + i * size,
    count: Math.min(size, count - i * size),
  }));
  return [{ first, count, parts }, ...parts.flatMap(rowCuts)];
}

/** The graph's input with the rows of each part. */
export const cutInput = ({ first, count }: RowCut): string => `groupRows.${first}.${count}`;
