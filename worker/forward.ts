/**
 * The forward pass of one rank: segment, all-reduce, segment, all-reduce … and this rank's slice of
 * the head.
 */
import { CaravanError } from '../proto/errors.js';
import type { FetchRow, Step, StepResult } from '../proto/gen/cluster.js';
import { AdjustedLogits } from './adjusted-logits.js';
import type { AllReduce, Turn } from './all-reduce.js';
import type { KvCache } from './kv-cache.js';
import type { Tensor } from './ort.js';
import type { Pacer } from './pacer.js';
import type { Shard } from './shard.js';
import { layOutStep, type StepLayout } from './step-layout.js';
import { largestOf, logSumExp, selectTopK } from './top-k.js';
import type { GroupTensors, Workspace } from './workspace.js';

export class Forward {
  readonly #shard: Shard;
  readonly #kv: KvCache;
  readonly #workspace: Workspace;
  readonly #allReduce: AllReduce;
  readonly #pacer: Pacer;
  /** (slots) of the sequences in them. */
  readonly #temperatures: Float64Array;
  readonly #adjusted: AdjustedLogits;
  #turn: Turn = 0;
  #waitMs = 0;
  #lastStep = 0;
  /** (sampled rows) slots of the last step. */
  #lastSampledSlots: readonly number[] = [];

  constructor(shard: Shard, kv: KvCache, workspace: Workspace, allReduce: AllReduce, pacer: Pacer) {
    this.#shard = shard;
    this.#kv = kv;
    this.#workspace = workspace;
    this.#allReduce = allReduce;
    this.#pacer = pacer;
    this.#temperatures = new Float64Array(kv.slotCount);
    this.#adjusted = new AdjustedLogits(shard.plan.vocab);
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
    this.#waitMs = 0;
    if (step.number !== this.#lastStep + 1) {
      throw new CaravanError('internal', `step ${step.number} follows step ${this.#lastStep}`);
    }
    for (const join of step.joins) {
      const { slot, temperature } = join;
      if (slot >= this.#kv.slotCount) {
        throw new CaravanError('invalid_request', `slot ${slot}: there are ${this.#kv.slotCount}`);
      }
      this.#kv.lengths[slot] = 0;
      this.#temperatures[slot] = temperature;
      this.#adjusted.join(join);
    }
    const layout = layOutStep(step, {
      vocabSize: this.#shard.config.vocabSize,
      maxSeqLen: this.#kv.maxSeqLen,
      slotCount: this.#kv.slotCount,
      maxStepRows: this.#workspace.maxRows,
      headSize: this.#shard.config.headSize,
      lengths: this.#kv.lengths,
    });
    this.#lastStep = step.number;
    await this.#compute(layout);
    for (const { firstSlot, batch, length } of layout.groups) {
      for (let slot = firstSlot; slot < firstSlot + batch; slot += 1) {
        this.#kv.lengths[slot]! += length;
      }
    }
    this.#feedAdjustments(step);
    const result = this.#report(step, layout);
    this.#pacer.served();
    const totalUs = 1000 * (performance.now() - startMs);
    result.waitUs = Math.round(1000 * this.#waitMs);
    result.computeUs = Math.round(totalUs) - result.waitUs;
    result.longestStretchUs = this.#pacer.takeLongestUs();
    return result;
  }

  /** This rank's slice of a sampled row's logits. @throws CaravanError `not_found` for another step. */
  row({ stepNumber, row, isAdjusted }: FetchRow): Float32Array {
    const slot = this.#lastSampledSlots[row];
    if (stepNumber !== this.#lastStep || slot === undefined) {
      throw new CaravanError('not_found', `row ${row} of step ${stepNumber} is not kept`);
    }
    return isAdjusted ? this.#adjusted.of(slot, this.#rawRow(row)) : this.#rawRow(row);
  }

  /** (slice) of the sampled row. */
  #rawRow(row: number): Float32Array<ArrayBuffer> {
    const { count } = this.#shard.plan.vocab;
    return this.#workspace.logits.subarray(row * count, (row + 1) * count);
  }

  #feedAdjustments({ decodeSlots, decodeTokens, chunks }: Step): void {
    decodeSlots.forEach((slot, i) => {
      this.#adjusted.feed(slot, decodeTokens[i]!);
    });
    for (const { slot, tokens } of chunks) {
      for (const token of tokens) this.#adjusted.feed(slot, token);
    }
  }

  async #compute(layout: StepLayout): Promise<void> {
    const { rowCount, groups } = layout;
    const { layers, attention, plan } = this.#shard;
    const workspace = this.#workspace;
    const rows = workspace.rows(rowCount);
    this.#bindPositions(layout);
    const groupTensors = groups.map((group) => workspace.group(group));
    const kvViews = groups.map((group) => this.#kv.view(group.firstSlot, group.batch));

    this.#embed(layout);
    await this.#exchange(rowCount);
    // The residual stream: attention-in writes one buffer, ffn the other.
    const [afterAttention, afterFfn] = rows.h;
    let h: Tensor = workspace.zeros(rowCount);
    const variant = this.#shard.variantFor(rowCount);
    for (let l = 0; l < layers.length; l += 1) {
      const layer = layers[l]![variant]!;
      layer.attentionIn.run(
        [h, ...this.#received(rows.partials), rows.positions, workspace.cos, workspace.sin],
        [afterAttention, rows.q, rows.k, rows.v],
      );
      for (let g = 0; g < groups.length; g += 1) {
        const { q, k, v, lastPositions, totalLength, attended }: GroupTensors = groupTensors[g]!;
        const { keys, values } = kvViews[g]![l]!;
        attention.run(
          [q, k, v, keys, values, lastPositions, totalLength],
          [attended, keys, values],
        );
      }
      layer.attentionOut.run([rows.attended], [rows.partials[this.#turn]![plan.rank]!]);
      await this.#exchange(rowCount);

      layer.ffn.run(
        [afterAttention, ...this.#received(rows.partials)],
        [afterFfn, rows.partials[this.#turn]![plan.rank]!],
      );
      await this.#exchange(rowCount);
      h = afterFfn;
    }
    this.#lastSampledSlots = layout.sampledSlots;
    if (layout.sampledRows.length === 0) return;
    layout.sampledRows.forEach((row, i) => {
      workspace.sampledRows[i] = BigInt(row);
    });
    const sampled = workspace.sampled(layout.sampledRows.length);
    this.#shard.head.run([h, ...this.#received(rows.partials), sampled.rows], [sampled.logits]);
  }

  /** Partials of the last exchange, in rank order. */
  #received(partials: readonly (readonly Tensor[])[]): readonly Tensor[] {
    return partials[this.#turn ^ 1]!;
  }

  /** Gives our partial of this turn to the peers and gets theirs; the next partial is of the other turn. */
  async #exchange(rowCount: number): Promise<void> {
    const startMs = performance.now();
    await this.#allReduce.exchange(this.#turn, rowCount * this.#shard.config.hiddenSize);
    this.#turn = this.#turn === 0 ? 1 : 0;
    this.#waitMs += performance.now() - startMs;
  }

  /** Our partial of the embedding: the rows whose token is in our slice of the vocabulary, else zero. */
  #embed({ tokens }: StepLayout): void {
    const { embedding, plan, config } = this.#shard;
    const partial = this.#allReduce.partials[this.#turn]![plan.rank]!;
    const width = config.hiddenSize;
    tokens.forEach((token, row) => {
      const own = token - plan.vocab.start;
      if (own >= 0 && own < plan.vocab.count) {
        embedding.copyRow(own, partial, row * width);
      } else {
        partial.fill(0, row * width, (row + 1) * width);
      }
    });
  }

  #bindPositions({ positions, groups }: StepLayout): void {
    const workspace = this.#workspace;
    for (let row = 0; row < positions.length; row += 1) {
      workspace.positions[row] = BigInt(positions[row]!);
    }
    for (const { firstRow, batch, length } of groups) {
      let total = 0;
      for (let i = 0; i < batch; i += 1) {
        const last = positions[firstRow + i * length + length - 1]!;
        workspace.lastPositions[firstRow + i] = last;
        total = Math.max(total, last + 1);
      }
      workspace.totalLengths[firstRow] = total;
    }
  }

  #report(step: Step, layout: StepLayout): StepResult {
    const { start, count } = this.#shard.plan.vocab;
    const rowCount = layout.sampledRows.length;
    const k = Math.max(1, Math.min(step.topK, count));
    const topIds = new Array<number>(rowCount * k);
    const topLogits = new Array<number>(rowCount * k);
    const lseRaw = new Array<number>(rowCount);
    const lseAdjusted = new Array<number>(rowCount);
    const targetLogits: number[] = [];
    for (let row = 0; row < rowCount; row += 1) {
      const slot = layout.sampledSlots[row]!;
      const raw = this.#rawRow(row);
      const adjusted = this.#adjusted.of(slot, raw);
      selectTopK(adjusted, 0, count, start, k, topIds, topLogits, row * k);
      const max = topLogits[row * k]!;
      const temperature = this.#temperatures[slot]!;
      const target = layout.targets[row]!;
      // A greedy row needs no probabilities, and raw ones are only for evaluation.
      lseRaw[row] = target >= 0 ? logSumExp(raw, 0, count, largestOf(raw), 1) : 0;
      lseAdjusted[row] = temperature > 0 ? logSumExp(adjusted, 0, count, max, temperature) : 0;
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
      computeUs: 0,
      waitUs: 0,
      longestStretchUs: 0,
    };
  }
}
