/**
 * Guesses what a sequence says next by looking up what followed the same few tokens before, in its prompt or answer:
 * answers that copy, summarise or edit repeat long stretches. Pure.
 *
 * A. Saxena, "Prompt Lookup Decoding", 2023. Here the guess is also kept up where nobody computes with it, which tells
 * for nothing how often it comes true.
 */

/** Tokens that must be the same; longer ones are looked up first. */
const LONGEST = 3;
const SHORTEST = 2;
/** What is believed of a sequence before its guesses have been seen to come true or not. */
const FIRST_HIT_RATE = 0.3;
/** Weight of the last guess. */
const HIT_WEIGHT = 0.15;

export class PromptLookup {
  /** Of the sequence; it grows. */
  readonly #tokens: readonly number[];
  readonly #promptLength: number;
  readonly #vocabSize: number;
  /** By length − SHORTEST: the place behind the last occurrence of those tokens. */
  readonly #places: readonly Map<number, number>[];
  /** Tokens whose occurrences are known. */
  #indexed = 0;
  /** Place of the token that is guessed to come next; null where nothing is. */
  #guess: number | null = null;
  #hitRate = FIRST_HIT_RATE;

  /** @param promptLength tokens that are not guessed. */
  constructor(tokens: readonly number[], promptLength: number, vocabSize: number) {
    this.#tokens = tokens;
    this.#promptLength = promptLength;
    this.#vocabSize = vocabSize;
    this.#places = Array.from({ length: LONGEST - SHORTEST + 1 }, () => new Map<number, number>());
  }

  /** How often the next guessed token is right, as far as was seen: 0 to 1; 0 where nothing is guessed. */
  get hitRate(): number {
    this.#catchUp();
    return this.#guess === null ? 0 : this.#hitRate;
  }

  /** At most `count` tokens that may come next; none where nothing is guessed. */
  propose(count: number): number[] {
    this.#catchUp();
    const draft: number[] = [];
    if (this.#guess === null) return draft;
    // Where the guess reaches the end of what there is, it goes on with itself.
    for (let at = this.#guess; draft.length < count; at += 1) {
      draft.push(this.#tokens[at] ?? draft[at - this.#tokens.length]!);
    }
    return draft;
  }

  /** Takes in the tokens that came since. */
  #catchUp(): void {
    const { length } = this.#tokens;
    while (this.#indexed < length) {
      const token = this.#tokens[this.#indexed]!;
      this.#indexed += 1;
      if (this.#guess !== null) {
        const isHit = this.#tokens[this.#guess] === token;
        this.#hitRate += HIT_WEIGHT * (Number(isHit) - this.#hitRate);
        this.#guess = isHit ? this.#guess + 1 : null;
      }
      // Before it is indexed itself. The prompt is not guessed.
      if (this.#guess === null && this.#indexed >= this.#promptLength) {
        this.#guess = this.#find(this.#indexed);
      }
      this.#index(this.#indexed);
    }
  }

  /** The place behind the last tokens' last occurrence before place `end`. */
  #find(end: number): number | null {
    for (let length = LONGEST; length >= SHORTEST; length -= 1) {
      const place =
        end >= length ? this.#places[length - SHORTEST]!.get(this.#key(end, length)) : undefined;
      if (place !== undefined) return place;
    }
    return null;
  }

  #index(end: number): void {
    for (let length = SHORTEST; length <= LONGEST; length += 1) {
      if (end >= length) this.#places[length - SHORTEST]!.set(this.#key(end, length), end);
    }
  }

  /** One number for the `length` tokens before place `end`; two sets of tokens may share one, which costs a wrong guess. */
  #key(end: number, length: number): number {
    let key = 0;
    for (let at = end - length; at < end; at += 1) {
      key = (key * this.#vocabSize + this.#tokens[at]!) % Number.MAX_SAFE_INTEGER;
    }
    return key;
  }
}
