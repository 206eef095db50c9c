/**
 * Guesses what a sequence says next by looking up what followed the same few tokens before, in its prompt or answer:
 * answers that copy, summarise or edit repeat long stretches. Pure.
 *
 * A. Saxena, "Prompt Lookup Decoding", 2023. Here the guess is also kept up where nobody computes with it, which tells
 * for nothing how often it comes true.
 */

/** Tokens that must be the same; longer ones are looked up first. */
const LONGEST = 3;
const SHORTEST = 1;

/**
 * How often a guess comes true grows with the number of tokens before it that are the same: each class of such numbers is
 * counted by itself. By number, 8 and more alike.
 */
const CLASS_OF = [0, 0, 1, 2, 3, 3, 3, 3, 4];
const MOST_MATCHED = CLASS_OF.length - 1;
const classOf = (matched: number): number => CLASS_OF[Math.min(matched, MOST_MATCHED)]!;
/** By class: what answers to questions of MT-Bench showed, believed until a sequence shows its own. */
const FIRST_RATES = [0.2, 0.45, 0.65, 0.85, 0.88];
/** Of how many guesses the rates of the beginning are believed to come. */
const BELIEVED = 4;
/** What a guess counts for once the next one of its class is known. */
const FADING = 0.95;

export class PromptLookup {
  /** Of the sequence; it grows. */
  readonly #tokens: readonly number[];
  readonly #promptLength: number;
  readonly #vocabSize: number;
  /** By length − SHORTEST: the place behind the last occurrence of those tokens. */
  readonly #places: readonly Map<number, number>[];
  /** By class: guesses, and those that came true. */
  readonly #guesses = FIRST_RATES.map(() => BELIEVED);
  readonly #hits = FIRST_RATES.map((rate) => rate * BELIEVED);
  /** Tokens whose occurrences are known. */
  #indexed = 0;
  /** Place of the token that is guessed to come next; null where nothing is. */
  #guess: number | null = null;
  /** How many tokens before the guess are those before the next one's place, as far as classes tell. */
  #matched = 0;

  /** @param promptLength tokens that are not guessed. */
  constructor(tokens: readonly number[], promptLength: number, vocabSize: number) {
    this.#tokens = tokens;
    this.#promptLength = promptLength;
    this.#vocabSize = vocabSize;
    this.#places = Array.from({ length: LONGEST - SHORTEST + 1 }, () => new Map<number, number>());
  }

  /** How likely token `index` of a draft is right when those before it are, as far as was seen: 0 where nothing is guessed. */
  chance(index: number): number {
    this.#catchUp();
    if (this.#guess === null) return 0;
    const which = classOf(this.#matched + index);
    return this.#hits[which]! / this.#guesses[which]!;
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
        this.#count(classOf(this.#matched), isHit);
        this.#guess = isHit ? this.#guess + 1 : null;
        this.#matched += 1;
      }
      // Before it is indexed itself. The prompt is not guessed.
      if (this.#guess === null && this.#indexed >= this.#promptLength) {
        this.#guess = this.#find(this.#indexed);
        if (this.#guess !== null) this.#matched = this.#matchedBefore(this.#guess, this.#indexed);
      }
      this.#index(this.#indexed);
    }
  }

  #count(which: number, isHit: boolean): void {
    this.#guesses[which] = FADING * this.#guesses[which]! + 1;
    this.#hits[which] = FADING * this.#hits[which]! + Number(isHit);
  }

  /** How many tokens before the two places are the same, as far as classes tell. */
  #matchedBefore(place: number, end: number): number {
    const most = Math.min(place, MOST_MATCHED);
    let count = 0;
    while (count < most && this.#tokens[place - 1 - count] === this.#tokens[end - 1 - count]) {
      count += 1;
    }
    return count;
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
