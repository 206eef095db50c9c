/** What regular expressions and grammars are read into, and sets of code points. */
import { CaravanError } from '../proto/errors.js';

/** Code points, rising and apart from each other: [first, last]. */
export type Ranges = readonly (readonly [first: number, last: number])[];

export type Expression =
  | { readonly kind: 'class'; readonly ranges: Ranges }
  | { readonly kind: 'sequence'; readonly parts: readonly Expression[] }
  | { readonly kind: 'choice'; readonly options: readonly Expression[] }
  | {
      readonly kind: 'repeat';
      readonly of: Expression;
      readonly least: number;
      /** Null for no limit. */
      readonly most: number | null;
    }
  /** Another rule of a grammar. */
  | { readonly kind: 'rule'; readonly name: string };

/** The most that `{m,n}` may say. */
export const MAX_REPEAT = 10_000;

/** Every code point that stands in a well-formed text. */
export const ANY: Ranges = [
  [0, 0xd7ff],
  [0xe000, 0x10ffff],
];

export const EMPTY: Expression = { kind: 'sequence', parts: [] };

export const classOf = (ranges: Ranges): Expression => ({ kind: 'class', ranges });

export const literal = (text: string): Expression => ({
  kind: 'sequence',
  parts: Array.from(text.toWellFormed(), (character) => {
    const code = character.codePointAt(0)!;
    return classOf([[code, code]]);
  }),
});

export function repeat(of: Expression, least: number, most: number | null): Expression {
  const tooMuch = [least, most ?? 0].find((count) => count > MAX_REPEAT);
  if (tooMuch !== undefined) {
    throw new CaravanError(
      'invalid_request',
      `repeats something ${tooMuch} times; at most ${MAX_REPEAT}`,
    );
  }
  if (most !== null && most < least) {
    throw new CaravanError('invalid_request', `repeats something ${least} to ${most} times`);
  }
  return { kind: 'repeat', of, least, most };
}

/** Sorted, merged, without surrogates. */
export function union(ranges: Ranges): Ranges {
  const sorted = [...ranges].sort((a, b) => a[0] - b[0]);
  const merged: [number, number][] = [];
  for (const [first, last] of sorted) {
    const previous = merged.at(-1);
    if (previous !== undefined && first <= previous[1] + 1) {
      previous[1] = Math.max(previous[1], last);
    } else {
      merged.push([first, last]);
    }
  }
  return intersection(merged, ANY);
}

export function intersection(a: Ranges, b: Ranges): Ranges {
  const shared: [number, number][] = [];
  for (let i = 0, j = 0; i < a.length && j < b.length;) {
    const first = Math.max(a[i]![0], b[j]![0]);
    const last = Math.min(a[i]![1], b[j]![1]);
    if (first <= last) shared.push([first, last]);
    if (a[i]![1] < b[j]![1]) i += 1;
    else j += 1;
  }
  return shared;
}

export function complement(ranges: Ranges): Ranges {
  const gaps: [number, number][] = [];
  let next = 0;
  for (const [first, last] of [...ranges].sort((a, b) => a[0] - b[0])) {
    if (first > next) gaps.push([next, first - 1]);
    next = Math.max(next, last + 1);
  }
  if (next <= 0x10ffff) gaps.push([next, 0x10ffff]);
  return intersection(gaps, ANY);
}
