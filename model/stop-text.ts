/**
 * Finds stop texts in text that comes in pieces. Linear time; the result does not depend on the pieces.
 *
 * The stop text that ends first wins; of several that end together, the one that begins first. Text that
 * may be the beginning of a stop text is held back until that is settled.
 * D. Knuth, J. Morris, V. Pratt, "Fast pattern matching in strings", 1977.
 */
export class StopText {
  readonly #patterns: readonly { readonly text: string; readonly fallback: Int32Array }[];
  /** By pattern: how much of it the text so far ends with. */
  readonly #matched: Int32Array;
  #held = '';
  #isStopped = false;

  /** @param stops none empty. */
  constructor(stops: readonly string[]) {
    this.#patterns = stops.map((text) => ({ text, fallback: fallbackOf(text) }));
    this.#matched = new Int32Array(stops.length);
  }

  /** True once a stop text was met; nothing is released from then on. */
  get isStopped(): boolean {
    return this.#isStopped;
  }

  /** @returns text that is certainly not part of a stop text. */
  push(text: string): string {
    if (this.#isStopped) return '';
    const start = this.#held.length;
    this.#held += text;
    for (let i = start; i < this.#held.length; i += 1) {
      const length = this.#advance(this.#held.charCodeAt(i));
      if (length > 0) {
        this.#isStopped = true;
        const released = this.#held.slice(0, i + 1 - length);
        this.#held = '';
        return released;
      }
    }
    const keep = this.#matched.reduce((most, n) => Math.max(most, n), 0);
    const released = this.#held.slice(0, this.#held.length - keep);
    this.#held = this.#held.slice(released.length);
    return released;
  }

  /** What was held back, when the text is over. */
  end(): string {
    const released = this.#held;
    this.#held = '';
    return released;
  }

  /** Takes one code unit. @returns the length of the longest stop text that ends with it, or 0. */
  #advance(unit: number): number {
    let longest = 0;
    this.#patterns.forEach(({ text, fallback }, p) => {
      let matched = this.#matched[p]!;
      while (matched > 0 && text.charCodeAt(matched) !== unit) matched = fallback[matched - 1]!;
      if (text.charCodeAt(matched) === unit) matched += 1;
      this.#matched[p] = matched;
      if (matched === text.length) longest = Math.max(longest, matched);
    });
    return longest;
  }
}

/** For each prefix: the length of its longest proper suffix that is a prefix too. */
function fallbackOf(text: string): Int32Array {
  const fallback = new Int32Array(text.length);
  for (let i = 1, matched = 0; i < text.length; i += 1) {
    while (matched > 0 && text.charCodeAt(i) !== text.charCodeAt(matched)) {
      matched = fallback[matched - 1]!;
    }
    if (text.charCodeAt(i) === text.charCodeAt(matched)) matched += 1;
    fallback[i] = matched;
  }
  return fallback;
}
