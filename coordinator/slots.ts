/**
 * Slots of an engine, and which tokens each one's KV cache holds: a finished sequence leaves its positions behind, and
 * the next one with the same beginning does not compute them again. Pure.
 *
 *   slot 0   [s y s t e m | u s e r 1 | answer 1]      taken
 *   slot 1   [s y s t e m | u s e r 2]                 free, remembered
 *   slot 2   []                                        free
 *
 * A sequence takes over a free slot where that loses little, else it takes the one that was used longest ago and copies
 * the beginning from another slot, taken or not. Tenants do not see each other's slots.
 */

/** What a slot's KV cache holds. */
interface Slot {
  isTaken: boolean;
  tenant: string;
  /** Of the sequence that was there last; it may go on growing. */
  tokens: readonly number[];
  /** Of the tokens, those whose positions others may use. */
  length: number;
  /** Rises with every use: the smallest was used longest ago. */
  usedAt: number;
}

/** A sequence that wants its beginning. */
export interface PrefixRequest {
  readonly tenant: string;
  readonly tokens: readonly number[];
  /** Most positions that it may be given: some are computed in any case, for their logits. */
  readonly limit: number;
}

/** Positions that a sequence need not compute; copied first, where they are another slot's. */
export interface Prefix {
  readonly length: number;
  /** Null where they are the slot's own. */
  readonly copiedFrom: number | null;
}

/** Shorter beginnings, BOS alone above all, are not worth the bookkeeping. */
export const LEAST_PREFIX = 8;

export class Slots {
  readonly count: number;
  /** Whether a beginning can be copied from another slot; else a slot must be taken over. */
  readonly copies: boolean;
  readonly #slots: readonly Slot[];
  #freeCount: number;
  #clock = 0;

  constructor(count: number, copies = true) {
    this.count = count;
    this.copies = copies;
    this.#slots = Array.from({ length: count }, () => ({
      ...{ isTaken: false, tenant: '', tokens: [], length: 0, usedAt: 0 },
    }));
    this.#freeCount = count;
  }

  get freeCount(): number {
    return this.#freeCount;
  }

  /**
   * A free slot, or null: the one that holds the beginning, if it holds not much else; then the lowest empty one, so
   * that those in use are neighbours; then that which was used longest ago.
   */
  take(request: PrefixRequest): number | null {
    if (this.#freeCount === 0) return null;
    const best = this.#longest(request);
    const free = [...this.#slots.keys()].filter((slot) => !this.#slots[slot]!.isTaken);
    const order = (slot: number): number =>
      this.#slots[slot]!.length === 0 ? 0 : this.#slots[slot]!.usedAt;
    const oldest = free.reduce((a, b) => (order(b) < order(a) ? b : a));
    const source = this.#slots[best.slot];
    const isTakenOver =
      source !== undefined &&
      !source.isTaken &&
      (!this.copies || best.length * 2 >= source.length || free.length === 1);
    const slot = isTakenOver ? best.slot : oldest;
    this.#slots[slot]!.isTaken = true;
    this.#freeCount -= 1;
    return slot;
  }

  /** The beginning that is there now for a sequence in `slot`. Changes nothing. */
  find(slot: number, request: PrefixRequest): Prefix {
    const best = this.#longest(request, this.copies ? null : slot);
    if (best.length === 0) return { length: 0, copiedFrom: null };
    const isOwn = this.#common(slot, request) === best.length;
    return { length: best.length, copiedFrom: isOwn ? null : best.slot };
  }

  /** A sequence begins in the slot that it took: what else was there is lost. */
  begin(slot: number, { tenant, tokens }: PrefixRequest, prefix: Prefix): void {
    const own = this.#slots[slot]!;
    if (prefix.copiedFrom !== null) this.#touch(this.#slots[prefix.copiedFrom]!);
    own.tenant = tenant;
    own.tokens = tokens;
    own.length = prefix.length;
    this.#touch(own);
  }

  /** The first `length` of the sequence's tokens are in the slot's cache for others to use. */
  hold(slot: number, tokens: readonly number[], length: number): void {
    const own = this.#slots[slot]!;
    // It left, and another one has begun there.
    if (own.tokens !== tokens) return;
    own.length = length;
  }

  /** The slot is free again; what it holds stays. */
  release(slot: number): void {
    const own = this.#slots[slot];
    if (own?.isTaken !== true) return;
    own.isTaken = false;
    this.#freeCount += 1;
    this.#touch(own);
  }

  #touch(slot: Slot): void {
    this.#clock += 1;
    slot.usedAt = this.#clock;
  }

  /** The slot with the longest beginning, or length 0. */
  #longest(request: PrefixRequest, only: number | null = null): { slot: number; length: number } {
    let best = { slot: -1, length: 0 };
    for (let slot = 0; slot < this.count; slot += 1) {
      if (only !== null && slot !== only) continue;
      const length = this.#common(slot, request);
      if (length > best.length) best = { slot, length };
    }
    return best.length < LEAST_PREFIX ? { slot: -1, length: 0 } : best;
  }

  #common(slot: number, { tenant, tokens, limit }: PrefixRequest): number {
    const own = this.#slots[slot]!;
    if (own.tenant !== tenant) return 0;
    return commonLength(own.tokens, tokens, Math.min(own.length, limit));
  }
}

/** How many of the first `most` tokens are the same. */
export function commonLength(a: readonly number[], b: readonly number[], most: number): number {
  const end = Math.min(a.length, b.length, most);
  let length = 0;
  while (length < end && a[length] === b[length]) length += 1;
  return length;
}
