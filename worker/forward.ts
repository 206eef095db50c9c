/**
 * The steps of one rank: what is asked is checked, the pass computes it, and this rank's slice of the logits is
 * reported.
 */
import { CaravanError } from '../proto/errors.js';
import type { FetchRow, Join, RawLogits, Rewinds, Step, StepResult } from '../proto/gen/cluster.js';
import { AdjustedLogits } from './adjusted-logits.js';
import type { Pacer } from './pacer.js';
import type { Pass, Wish } from './pass.js';
import { layOutStep, type StepLayout } from './step-layout.js';
import { largestOf, logSumExp, selectTopK } from './top-k.js';

const refuse = (message: string): never => {
  throw new CaravanError('invalid_request', message);
};

export class Forward {
  readonly #pass: Pass;
  readonly #pacer: Pacer;
  /** (slots) of the sequences in them. */
  readonly #temperatures: Float64Array;
  /** (slots) whether their rows come with raw logits. */
  readonly #reportsRaw: boolean[] = [];
  readonly #adjusted: AdjustedLogits;
  #lastStep = 0;
  #lastLayout: Pick<StepLayout, 'sampledSlots' | 'laterTokens'> = {
    sampledSlots: [],
    laterTokens: [],
  };

  constructor(pass: Pass, pacer: Pacer) {
    this.#pass = pass;
    this.#pacer = pacer;
    this.#temperatures = new Float64Array(pass.slots.count);
    this.#adjusted = new AdjustedLogits(pass.vocab);
  }

  /**
   * One step. Appends to the KV cache of every slot in it.
   *
   * @throws CaravanError `invalid_request` before anything is changed; `rank_failed` when a peer is lost:
   *   then the rank's sequences are in doubt and the group must end.
   */
  async run(step: Step): Promise<StepResult> {
    const startMs = performance.now();
    this.#pacer.restart();
    const { slots } = this.#pass;
    if (step.number !== this.#lastStep + 1) {
      throw new CaravanError('internal', `step ${step.number} follows step ${this.#lastStep}`);
    }
    for (const join of step.joins) this.#join(join);
    this.#rewind(step.rewinds);
    const layout = layOutStep(step, {
      vocabSize: this.#pass.config.vocabSize,
      maxSeqLen: slots.maxSeqLen,
      slotCount: slots.count,
      maxStepRows: this.#pass.maxRows,
      headSize: this.#pass.config.headSize,
      lengths: slots.lengths,
    });
    this.#adjusted.mask(step.masking);
    this.#lastStep = step.number;
    this.#lastLayout = layout;
    const figures = await this.#pass.compute(layout, this.#wishOf(step, layout));
    for (const { firstSlot, batch, length } of layout.groups) {
      for (let slot = firstSlot; slot < firstSlot + batch; slot += 1) {
        slots.lengths[slot]! += length;
      }
    }
    this.#feedAdjustments(step);
    const result = this.#report(step, layout);
    this.#pacer.served();
    const totalUs = 1000 * (performance.now() - startMs);
    const { waitMs, copyMs, bytesToDevice, bytesToHost } = figures;
    result.waitUs = Math.round(1000 * waitMs);
    result.copyUs = Math.round(1000 * copyMs);
    result.computeUs = Math.max(0, Math.round(totalUs) - result.waitUs - result.copyUs);
    result.bytesToDevice = bytesToDevice;
    result.bytesToHost = bytesToHost;
    result.longestStretchUs = this.#pacer.takeLongestUs();
    return result;
  }

  /** A sequence begins, with what it keeps. */
  #join(join: Join): void {
    const { slots } = this.#pass;
    const { slot, temperature, kept } = join;
    if (slot >= slots.count) refuse(`slot ${slot}: there are ${slots.count}`);
    const length = kept?.length ?? 0;
    const source = kept?.copiedFrom ?? slot;
    if (length > (slots.lengths[source] ?? 0)) {
      refuse(`slot ${slot}: ${length} positions of slot ${source}, which has fewer`);
    }
    if (source !== slot && length > 0) {
      if (this.#pass.copyPositions === null) refuse(`slot ${slot}: this device copies no slots`);
      else this.#pass.copyPositions(source, slot, length);
    }
    slots.lengths[slot] = length;
    this.#temperatures[slot] = temperature;
    this.#reportsRaw[slot] = join.reportsRaw === true;
    this.#adjusted.join(join);
  }

  #rewind(rewinds: Rewinds | undefined): void {
    const { lengths } = this.#pass.slots;
    rewinds?.slots.forEach((slot, i) => {
      const length = rewinds.lengths[i] ?? 0;
      if (length > (lengths[slot] ?? 0)) refuse(`slot ${slot}: cannot be rewound to ${length}`);
      this.#adjusted.rewind(slot, lengths[slot]! - length);
      lengths[slot] = length;
    });
  }

  /** Whether a sequence can begin with what another slot holds. */
  get copiesSlots(): boolean {
    return this.#pass.copyPositions !== null;
  }

  /** This rank's slice of a sampled row's logits. @throws CaravanError `not_found` for another step. */
  row({ stepNumber, row, isAdjusted }: FetchRow): Float32Array {
    const slot = this.#lastLayout.sampledSlots[row];
    if (stepNumber !== this.#lastStep || slot === undefined) {
      throw new CaravanError('not_found', `row ${row} of step ${stepNumber} is not kept`);
    }
    const raw = this.#pass.logits(row);
    return isAdjusted ? this.#adjusted.of(slot, row, raw, this.#lastLayout.laterTokens[row]!) : raw;
  }

  #feedAdjustments({ decodeSlots, decodeTokens, chunks }: Step): void {
    decodeSlots.forEach((slot, i) => {
      this.#adjusted.feed(slot, decodeTokens[i]!);
    });
    for (const { slot, tokens } of chunks) {
      for (const token of tokens) this.#adjusted.feed(slot, token);
    }
  }

  /** The largest logits of every sampled row, as far as they are asked for. */
  #wishOf(step: Step, layout: StepLayout): Wish {
    return {
      k: Math.max(1, Math.min(step.topK, this.#pass.vocab.count)),
      temperatures: layout.sampledSlots.map((slot) => this.#temperatures[slot]!),
    };
  }

  #report(step: Step, layout: StepLayout): StepResult {
    const { start, count } = this.#pass.vocab;
    const rowCount = layout.sampledRows.length;
    const { k } = this.#wishOf(step, layout);
    const topIds = new Array<number>(rowCount * k);
    const topLogits = new Array<number>(rowCount * k);
    const lseRaw = new Array<number>(rowCount);
    const lseAdjusted = new Array<number>(rowCount);
    const targetLogits: number[] = [];
    const rawK = Math.min(step.rawTopK ?? 0, count);
    const rawLogits: RawLogits = { rowCount: 0, topIds: [], topLogits: [], adjustedTopLogits: [] };
    for (let row = 0; row < rowCount; row += 1) {
      const slot = layout.sampledSlots[row]!;
      const target = layout.targets[row]!;
      const isRaw = this.#reportsRaw[slot] === true;
      // A greedy row needs no probabilities, and raw ones are only for evaluation and logprobs.
      const needsRaw = isRaw || target >= 0;
      if (!needsRaw && !this.#adjusted.adjusts(slot, row)) {
        const { logSumExp: lse } = this.#pass.top(row, topIds, topLogits, row * k);
        lseRaw[row] = 0;
        lseAdjusted[row] = lse;
        if (layout.hasTargets) targetLogits.push(NaN);
        continue;
      }
      const raw = this.#pass.logits(row);
      const adjusted = this.#adjusted.of(slot, row, raw, layout.laterTokens[row]!);
      selectTopK(adjusted, 0, count, start, k, topIds, topLogits, row * k);
      const max = topLogits[row * k]!;
      const temperature = this.#temperatures[slot]!;
      lseRaw[row] = needsRaw ? logSumExp(raw, 0, count, largestOf(raw), 1) : 0;
      lseAdjusted[row] = temperature > 0 ? logSumExp(adjusted, 0, count, max, temperature) : 0;
      if (isRaw) {
        rawLogits.rowCount += 1;
        const at = rawLogits.topIds.length;
        if (rawK > 0) {
          selectTopK(raw, 0, count, start, rawK, rawLogits.topIds, rawLogits.topLogits, at);
        }
        for (let i = row * k; i < (row + 1) * k; i += 1) {
          rawLogits.adjustedTopLogits.push(raw[topIds[i]! - start]!);
        }
      }
      if (layout.hasTargets) {
        const own = target - start;
        targetLogits.push(target >= 0 && own >= 0 && own < count ? raw[own]! : NaN);
      }
    }
    return {
      number: step.number,
      topIds,
      topLogits,
      lseRaw,
      lseAdjusted,
      targetLogits,
      raw: rawLogits.rowCount > 0 ? rawLogits : undefined,
      computeUs: 0,
      waitUs: 0,
      longestStretchUs: 0,
      copyUs: 0,
      bytesToDevice: 0,
      bytesToHost: 0,
    };
  }
}
