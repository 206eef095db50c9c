/**
 * The numbers under which ranks keep masks, so that each travels once while it is in use. Numbers are given out in turn; one
 * that the present step uses is passed over.
 */
import type { Masking } from '../proto/gen/cluster.js';
import type { TokenMask } from './token-masks.js';

export class MaskTable {
  readonly #capacity: number;
  readonly #numbers = new Map<TokenMask, number>();
  /** By number. */
  readonly #holders: (TokenMask | undefined)[] = [];
  /** By number: the last step that used it. */
  readonly #usedIn: number[] = [];
  #next = 0;
  #step = 0;

  /** @param capacity masks that ranks keep; more than rows of a step. */
  constructor(capacity: number) {
    this.#capacity = capacity;
  }

  /** What ranks are told of a step's masks; undefined where there are none. */
  masking(
    rows: readonly { readonly row: number; readonly mask: TokenMask }[],
  ): Masking | undefined {
    if (rows.length === 0) return undefined;
    this.#step += 1;
    // First what ranks have: none of it may be given away for a new one.
    for (const { mask } of rows) {
      const number = this.#numbers.get(mask);
      if (number !== undefined) this.#usedIn[number] = this.#step;
    }
    const masking: Masking = { newMasks: [], rows: [], maskNumbers: [] };
    for (const { row, mask } of rows) {
      let number = this.#numbers.get(mask);
      if (number === undefined) {
        number = this.#give(mask);
        masking.newMasks.push({ number, allowed: mask.bits });
      }
      masking.rows.push(row);
      masking.maskNumbers.push(number);
    }
    return masking;
  }

  #give(mask: TokenMask): number {
    while (this.#usedIn[this.#next] === this.#step) this.#next = (this.#next + 1) % this.#capacity;
    const number = this.#next;
    this.#next = (number + 1) % this.#capacity;
    const previous = this.#holders[number];
    if (previous !== undefined) this.#numbers.delete(previous);
    this.#holders[number] = mask;
    this.#numbers.set(mask, number);
    this.#usedIn[number] = this.#step;
    return number;
  }
}
