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
  length: number;
}

const MAX_MASK_NUMBER = 0xffff;

export class AdjustedLogits {
  readonly #sliceStart: number;
  readonly #sliceCount: number;
  readonly #slots = new Map<number, SlotAdjustment>();
  /** By number: bits over the whole vocabulary. */
  readonly #masks = new Map<number, Uint8Array>();
  /** By slot, of the last step. */
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
  join({ slot, adjustment }: Join): void {
    this.#slots.delete(slot);
    if (adjustment === undefined) return;
    const biases = new Map<number, number>();
    adjustment.biasIds.forEach((id, i) => {
      const place = id - this.#sliceStart;
      if (place >= 0 && place < this.#sliceCount) biases.set(place, adjustment.biases[i] ?? 0);
    });
    this.#slots.set(slot, { ...adjustment, biases, counts: new Map(), length: 0 });
  }

  /**
   * A step begins: only the slots that it names are masked.
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
    masking.slots.forEach((slot, i) => {
      const number = masking.maskNumbers[i];
      const mask = number === undefined ? undefined : this.#masks.get(number);
      if (mask === undefined) {
        throw new CaravanError(
          'invalid_request',
          `slot ${slot}: mask ${number ?? '-'} is not known`,
        );
      }
      this.#masked.set(slot, mask);
    });
  }

  /** The slot has been fed one more token. */
  feed(slot: number, token: number): void {
    const known = this.#slots.get(slot);
    if (known === undefined) return;
    const place = token - this.#sliceStart;
    if (place >= 0 && place < this.#sliceCount) {
      const isGenerated = known.length >= known.promptLength;
      known.counts.set(place, (known.counts.get(place) ?? 0) + (isGenerated ? 1 : 0));
    }
    known.length += 1;
  }

  /** Whether the slot's next logits are sampled from as they are not. */
  adjusts(slot: number): boolean {
    return this.#slots.has(slot) || this.#masked.has(slot);
  }

  /**
   * The slot's next logits as they are sampled from.
   *
   * @param raw (slice) is left as it is.
   * @returns (slice) `raw` itself where nothing is adjusted, else a row that the next call overwrites.
   */
  of(slot: number, raw: Float32Array<ArrayBuffer>): Float32Array<ArrayBuffer> {
    const known = this.#slots.get(slot);
    const mask = this.#masked.get(slot);
    if (known === undefined && mask === undefined) return raw;
    const row = this.#row;
    row.set(raw);
    if (known !== undefined) adjust(row, raw, known);
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
