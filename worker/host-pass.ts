/**
 * A pass in host memory: segment, all-reduce, segment, all-reduce … and this rank's slice of the head.
 */
import type { LlamaConfig } from '../model/config.js';
import type { AllReduce, Turn } from './all-reduce.js';
import type { KvCache } from './kv-cache.js';
import type { Session, Tensor } from './ort.js';
import type { Pass, PassFigures, RowTop, Slots, Wish } from './pass.js';
import type { Shard } from './shard.js';
import type { StepLayout } from './step-layout.js';
import { logSumExp, selectTopK } from './top-k.js';
import type { GroupTensors, RowTensors, Workspace } from './workspace.js';

export class HostPass implements Pass {
  readonly config: LlamaConfig;
  readonly vocab: { readonly start: number; readonly count: number };
  readonly slots: Slots;
  readonly maxRows: number;
  readonly copyPositions: (from: number, to: number, count: number) => void;
  readonly #shard: Shard;
  readonly #attention: Session;
  readonly #kv: KvCache;
  readonly #workspace: Workspace;
  readonly #allReduce: AllReduce;
  #turn: Turn = 0;
  #waitMs = 0;
  #wish: Wish = { k: 1, temperatures: [] };

  constructor(
    shard: Shard,
    attention: Session,
    kv: KvCache,
    workspace: Workspace,
    allReduce: AllReduce,
  ) {
    this.config = shard.config;
    this.vocab = shard.plan.vocab;
    const { slotCount, maxSeqLen } = kv.shape;
    this.slots = { count: slotCount, maxSeqLen, lengths: kv.lengths };
    this.maxRows = workspace.maxRows;
    this.#shard = shard;
    this.#attention = attention;
    this.#kv = kv;
    this.copyPositions = (from, to, count) => {
      kv.copy(from, to, count);
    };
    this.#workspace = workspace;
    this.#allReduce = allReduce;
  }

  async compute(layout: StepLayout, wish: Wish): Promise<PassFigures> {
    this.#waitMs = 0;
    this.#wish = wish;
    const { rowCount, groups } = layout;
    const { layers, plan } = this.#shard;
    const workspace = this.#workspace;
    const kv = this.#kv;
    const rows = workspace.rows(rowCount);
    this.#bindPositions(layout);
    const groupTensors = groups.map((group) => workspace.group(group));
    const kvViews = groups.map((group) => kv.view(group.firstSlot, group.batch));

    this.#embed(layout);
    const first = this.#exchange(rowCount);
    if (first !== null) await first;
    // The residual stream: attention-in writes one buffer, ffn the other.
    const [afterAttention, afterFfn] = rows.h;
    let h: Tensor = workspace.zeros(rowCount);
    const received = this.#received(rows.partials);
    const attentionInputs = [h, ...received, rows.positions, workspace.cos, workspace.sin];
    const attentionOutputs = [afterAttention, rows.q, rows.k, rows.v];
    const ffnInputs = [h, ...received];
    const variant = this.#shard.variantFor(rowCount);
    for (let l = 0; l < layers.length; l += 1) {
      const layer = layers[l]![variant]!;
      layer.attentionIn.run(this.#inputs(attentionInputs, h, rows.partials), attentionOutputs);
      const scales = kv.scales(l);
      kv.admit(l, rows.k.array as Float32Array, rows.v.array as Float32Array, rowCount);
      for (let g = 0; g < groups.length; g += 1) {
        const { q, k, v, lastPositions, totalLength, attended }: GroupTensors = groupTensors[g]!;
        const { keys, values } = kvViews[g]![l]!;
        this.#attention.run(
          [q, k, v, keys, values, lastPositions, totalLength, ...scales],
          [attended, keys, values],
        );
      }
      layer.attentionOut.run([rows.attended], [rows.partials[this.#turn]![plan.rank]!]);
      const attended = this.#exchange(rowCount);
      if (attended !== null) await attended;

      layer.ffn.run(this.#inputs(ffnInputs, afterAttention, rows.partials), [
        afterFfn,
        rows.partials[this.#turn]![plan.rank]!,
      ]);
      const fed = this.#exchange(rowCount);
      if (fed !== null) await fed;
      h = afterFfn;
    }
    if (layout.sampledRows.length === 0) return this.#figures();
    layout.sampledRows.forEach((row, i) => {
      workspace.sampledRows[i] = BigInt(row);
    });
    const sampled = workspace.sampled(layout.sampledRows.length);
    this.#shard.head.run([h, ...this.#received(rows.partials), sampled.rows], [sampled.logits]);
    return this.#figures();
  }

  logits(row: number): Float32Array<ArrayBuffer> {
    const { count } = this.vocab;
    return this.#workspace.logits.subarray(row * count, (row + 1) * count);
  }

  top(row: number, ids: number[], values: number[], at: number): RowTop {
    const { start, count } = this.vocab;
    const logits = this.logits(row);
    selectTopK(logits, 0, count, start, this.#wish.k, ids, values, at);
    const temperature = this.#wish.temperatures[row]!;
    return {
      logSumExp: temperature > 0 ? logSumExp(logits, 0, count, values[at]!, temperature) : 0,
    };
  }

  #figures(): PassFigures {
    return { waitMs: this.#waitMs, copyMs: 0, bytesToDevice: 0, bytesToHost: 0 };
  }

  /** Writes h and the partials of the last exchange into an array that is used again. */
  #inputs(into: Tensor[], h: Tensor, partials: RowTensors['partials']): readonly Tensor[] {
    const received = this.#received(partials);
    into[0] = h;
    for (let rank = 0; rank < received.length; rank += 1) into[1 + rank] = received[rank]!;
    return into;
  }

  /** Partials of the last exchange, in rank order. */
  #received(partials: readonly (readonly Tensor[])[]): readonly Tensor[] {
    return partials[this.#turn ^ 1]!;
  }

  /** Gives our partial of this turn to the peers and gets theirs; the next partial is of the other turn. */
  #exchange(rowCount: number): Promise<void> | null {
    const startMs = performance.now();
    const waiting = this.#allReduce.exchange(this.#turn, rowCount * this.#shard.config.hiddenSize);
    this.#turn = this.#turn === 0 ? 1 : 0;
    if (waiting !== null) return this.#await(waiting, startMs);
    this.#waitMs += performance.now() - startMs;
    return null;
  }

  async #await(waiting: Promise<void>, startMs: number): Promise<void> {
    await waiting;
    this.#waitMs += performance.now() - startMs;
  }

  #embed({ tokens }: StepLayout): void {
    const { embedding, plan } = this.#shard;
    embedding.writePartial(tokens, plan.vocab, this.#allReduce.partials[this.#turn]![plan.rank]!);
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
}
