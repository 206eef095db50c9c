/**
 * The adjustments of every slot: penalties for tokens that were there before, biases, and masks, over this rank's slice of
 * the vocabulary. The rank counts the tokens that it is fed, so that a sequence which another engine took over
 * has the counts that it had.
 */
import { CaravanError } from '../proto/errors.js';
import type { Join, Masking } from '../proto/gen/cluster.js';

/** What a rank knows of an adjusted slot. */
interface SlotAdjustment {
  readonly promptLength: number;
  readonly repetitionPenalty: number;
  readonly presencePenalty: number;
  readonly frequencyPenalty: number;
  /** By place in the slice: how often it was generated. Tokens that stand in the prompt alone have 0. */
  readonly counts: Map<number, number>;
  /** By place in the slice. */
  readonly biases: ReadonlyMap<number, number>;
  /** Tokens of the slot so far. */
  readonly tokens: number[];
}

const MAX_MASK_NUMBER = 0xffff;

export class AdjustedLogits {
  readonly #sliceStart: number;
  readonly #sliceCount: number;
  readonly #slots = new Map<number, SlotAdjustment>();
  /** By number: bits over the whole vocabulary. */
  readonly #masks = new Map<number, Uint8Array>();
  /** By sampled row of the last step. */
  readonly #masked = new Map<number, Uint8Array>();
  /** (slice) */
  readonly #row: Float32Array<ArrayBuffer>;

  /** @param slice of the vocabulary: its first id and its size. */
  constructor(slice: { readonly start: number; readonly count: number }) {
    this.#sliceStart = slice.start;
    this.#sliceCount = slice.count;
    this.#row = new Float32Array(slice.count);
  }

  /** A sequence begins: what was known of its slot is forgotten. */
  join({ slot, adjustment, kept }: Join): void {
    this.#slots.delete(slot);
    if (adjustment === undefined) return;
    const biases = new Map<number, number>();
    adjustment.biasIds.forEach((id, i) => {
      const place = id - this.#sliceStart;
      if (place >= 0 && place < this.#sliceCount) biases.set(place, adjustment.biases[i] ?? 0);
    });
    this.#slots.set(slot, { ...adjustment, biases, counts: new Map(), tokens: [] });
    if ((kept?.length ?? 0) !== (kept?.tokens.length ?? 0)) {
      throw new CaravanError('invalid_request', `slot ${slot}: the kept tokens are not told`);
    }
    for (const token of kept?.tokens ?? []) this.feed(slot, token);
  }

  /**
   * A step begins: only the rows that it names are masked.
   *
   * @throws CaravanError `invalid_request` for a mask that was never sent, or a number that is too large.
   */
  mask(masking: Masking | undefined): void {
    this.#masked.clear();
    if (masking === undefined) return;
    for (const { number, allowed } of masking.newMasks) {
      if (number > MAX_MASK_NUMBER) {
        throw new CaravanError('invalid_request', `mask ${number}: at most ${MAX_MASK_NUMBER}`);
      }
      this.#masks.set(number, allowed);
    }
    masking.rows.forEach((row, i) => {
      const number = masking.maskNumbers[i];
      const mask = number === undefined ? undefined : this.#masks.get(number);
      if (mask === undefined) {
        throw new CaravanError('invalid_request', `row ${row}: mask ${number ?? '-'} is not known`);
      }
      this.#masked.set(row, mask);
    });
  }

  /** The slot has been fed one more token. */
  feed(slot: number, token: number): void {
    const known = this.#slots.get(slot);
    if (known === undefined) return;
    this.#count(known, token, 1);
    known.tokens.push(token);
  }

  /** The slot's last `count` tokens were not to be. */
  rewind(slot: number, count: number): void {
    const known = this.#slots.get(slot);
    for (let i = 0; known !== undefined && i < count; i += 1) {
      this.#count(known, known.tokens.pop()!, -1);
    }
  }

  /** Counts a token at the end of the slot's, or takes it out again when it was the last. */
  #count({ tokens, promptLength, counts }: SlotAdjustment, token: number, change: 1 | -1): void {
    const place = token - this.#sliceStart;
    if (place < 0 || place >= this.#sliceCount) return;
    const generated = tokens.length >= promptLength ? change : 0;
    const count = (counts.get(place) ?? 0) + generated;
    // What stands in the prompt counts 0; what stood in drafts alone is forgotten.
    if (change === -1 && count === 0 && !tokens.includes(token)) counts.delete(place);
    else counts.set(place, count);
  }

  /** Whether the slot's logits in a sampled row of the step are not sampled from as they are. */
  adjusts(slot: number, sampledRow: number): boolean {
    return this.#slots.has(slot) || this.#masked.has(sampledRow);
  }

  /**
   * The slot's next logits as they are sampled from.
   *
   * @param sampledRow of the step: masks are by row. @param raw (slice) is left as it is.
   * @param later tokens that the slot was fed after the row: they do not count yet.
   * @returns (slice) `raw` itself where nothing is adjusted, else a row that the next call overwrites.
   */
  of(
    slot: number,
    sampledRow: number,
    raw: Float32Array<ArrayBuffer>,
    later: readonly number[],
  ): Float32Array<ArrayBuffer> {
    const known = this.#slots.get(slot);
    const mask = this.#masked.get(sampledRow);
    if (known === undefined && mask === undefined) return raw;
    const row = this.#row;
    row.set(raw);
    if (known !== undefined) {
      this.rewind(slot, later.length);
      adjust(row, raw, known);
      for (const token of later) this.feed(slot, token);
    }
    if (mask !== undefined) {
      for (let place = 0, id = this.#sliceStart; place < row.length; place += 1, id += 1) {
        if ((mask[id >> 3]! & (1 << (id & 7))) === 0) row[place] = -Infinity;
      }
    }
    return row;
  }
}

/** Writes the adjusted logits of all places that an adjustment changes. `row` and `raw`: (slice). */
function adjust(row: Float32Array, raw: Float32Array, adjustment: SlotAdjustment): void {
  const { repetitionPenalty, presencePenalty, frequencyPenalty, counts, biases } = adjustment;
  for (const [place, count] of counts) {
    const logit = raw[place]!;
    const repeated = logit > 0 ? logit / repetitionPenalty : logit * repetitionPenalty;
    const penalty = count > 0 ? presencePenalty + count * frequencyPenalty : 0;
    row[place] = repeated - penalty + (biases.get(place) ?? 0);
  }
  for (const [place, bias] of biases) if (!counts.has(place)) row[place] = raw[place]! + bias;
}
