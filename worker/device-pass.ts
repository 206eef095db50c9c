/**
 * A pass on a device: weights, KV and activations stay there; partials, small inputs and the largest logits move.
 */
import type { LlamaConfig } from '../model/config.js';
import type { AllReduce, Turn } from './all-reduce.js';
import type { DeviceKv } from './device-kv.js';
import type { DeviceShard } from './device-shard.js';
import type { HeadRuns, SmallInput, StepRuns } from './device-runs.js';
import type { DeviceWorkspace } from './device-workspace.js';
import type { OrtDevice } from './ort-device.js';
import type { Pass, PassFigures, RowTop, Slots, Wish } from './pass.js';
import type { AttentionGroup, StepLayout } from './step-layout.js';

export class DevicePass implements Pass {
  readonly config: LlamaConfig;
  readonly vocab: { readonly start: number; readonly count: number };
  readonly slots: Slots;
  readonly maxRows: number;
  readonly copyPositions: (from: number, to: number) => void;
  readonly #device: OrtDevice;
  readonly #workspace: DeviceWorkspace;
  readonly #allReduce: AllReduce;
  #turn: Turn = 0;
  #waitMs = 0;
  /** Of the last step that had sampled rows. */
  #head: HeadRuns | null = null;
  #wish: Wish = { k: 1, temperatures: [] };

  constructor(
    device: OrtDevice,
    shard: DeviceShard,
    kv: DeviceKv,
    workspace: DeviceWorkspace,
    allReduce: AllReduce,
  ) {
    this.config = shard.config;
    this.vocab = shard.plan.vocab;
    this.slots = { count: kv.slotCount, maxSeqLen: kv.maxSeqLen, lengths: kv.lengths };
    this.maxRows = workspace.maxRows;
    this.copyPositions = (from, to) => {
      kv.copy(from, to);
    };
    this.#device = device;
    this.#workspace = workspace;
    this.#allReduce = allReduce;
  }

  /**
   * Computes one layer and the head for the shapes that steps have, before any sequence is there: devices make their
   * kernels, and take what memory these need, when they are first run, which can take seconds.
   *
   * @param served lets the event loop run.
   */
  async warmUp(served: () => Promise<void>): Promise<void> {
    const { count, maxSeqLen } = this.slots;
    const chunks = [1, 2, Math.min(this.maxRows, maxSeqLen)].map((length) => ({
      batch: 1,
      length,
    }));
    const batches = count > 1 ? [{ batch: count, length: 1 }] : [];
    for (const { batch, length } of [...chunks, ...batches]) {
      const rowCount = batch * length;
      if (rowCount > this.maxRows || length > maxSeqLen) continue;
      const groups = this.#workspace.groupsOf([{ firstRow: 0, firstSlot: 0, batch, length }]);
      const positions = Array.from({ length: rowCount }, (_, row) => row % length);
      const runs = this.#workspace.step(rowCount, groups);
      bindPositions(runs, positions, groups);
      const head = this.#workspace.head(rowCount, batch, 1);
      for (const input of [runs.tokens, head.sampledRows, head.inverseTemperatures]) {
        input.copy?.run();
      }
      for (const run of [runs.embed, runs.attention[0]!, runs.ffn[0]!, head.run]) {
        run.run();
        run.synchronize();
        this.#device.synchronize();
        await served();
      }
    }
  }

  async compute(layout: StepLayout, wish: Wish): Promise<PassFigures> {
    this.#waitMs = 0;
    const { traffic } = this.#device;
    const before = { ...traffic };
    const groups = this.#workspace.groupsOf(layout.groups);
    const runs = this.#workspace.step(layout.rowCount, groups);
    bindPositions(runs, layout.positions, groups);

    this.#embed(runs, layout);
    await this.#share(runs, layout.rowCount, 0);
    for (let l = 0; l < runs.attention.length; l += 1) {
      runs.attention[l]!.run();
      await this.#share(runs, layout.rowCount, 1);
      runs.ffn[l]!.run();
      await this.#share(runs, layout.rowCount, 0);
    }
    if (layout.sampledRows.length > 0) this.#sample(layout, wish);
    else this.#device.synchronize();
    return {
      waitMs: this.#waitMs,
      copyMs: traffic.ms - before.ms,
      bytesToDevice: traffic.toDevice - before.toDevice,
      bytesToHost: traffic.toHost - before.toHost,
    };
  }

  top(row: number, ids: number[], values: number[], at: number): RowTop {
    const { topLogits, topPlaces, temperedSums } = this.#head!;
    const { k, temperatures } = this.#wish;
    for (let i = 0; i < k; i += 1) {
      ids[at + i] = this.vocab.start + Number(topPlaces[row * k + i]);
      values[at + i] = topLogits[row * k + i]!;
    }
    const temperature = temperatures[row]!;
    const largest = topLogits[row * k]!;
    return {
      logSumExp: temperature > 0 ? largest / temperature + Math.log(temperedSums[row]!) : 0,
    };
  }

  logits(row: number): Float32Array<ArrayBuffer> {
    const { rowIndex, row: run, rowOut, rowLogits } = this.#head!;
    rowIndex.array[0] = BigInt(row);
    rowIndex.copy?.run();
    run.run();
    rowOut.run();
    return rowLogits;
  }

  #sample({ rowCount, sampledRows }: StepLayout, wish: Wish): void {
    const head = this.#workspace.head(rowCount, sampledRows.length, wish.k);
    this.#head = head;
    this.#wish = wish;
    sampledRows.forEach((row, i) => {
      head.sampledRows.array[i] = BigInt(row);
      const temperature = wish.temperatures[i]!;
      head.inverseTemperatures.array[i] = temperature > 0 ? 1 / temperature : 1;
    });
    for (const input of [head.sampledRows, head.inverseTemperatures]) input.copy?.run();
    head.run.run();
    for (const copy of head.results) copy.run();
  }

  /** Our partial, which lies in one of two buffers, goes to the peers, and theirs come beside it. */
  async #share(runs: StepRuns, rowCount: number, buffer: 0 | 1): Promise<void> {
    const turn = this.#turn;
    for (const copy of runs.partialOut[turn]!.slice(buffer, buffer + 1)) copy.run();
    await this.#exchange(rowCount);
    for (const copy of runs.partialsIn[turn]![buffer]!) copy.run();
  }

  async #exchange(rowCount: number): Promise<void> {
    const startMs = performance.now();
    await this.#allReduce.exchange(this.#turn, this.#workspace.partialWords(rowCount));
    this.#turn = this.#turn === 0 ? 1 : 0;
    this.#waitMs += performance.now() - startMs;
  }

  #embed({ tokens, embed }: StepRuns, layout: StepLayout): void {
    const { start, count } = this.vocab;
    layout.tokens.forEach((token, row) => {
      const own = token - start;
      tokens.array[row] = BigInt(own >= 0 && own < count ? own : count);
    });
    tokens.copy?.run();
    embed.run();
  }
}

function bindPositions(
  { positions, lastPositions, totalLengths }: StepRuns,
  rows: readonly number[],
  groups: readonly AttentionGroup[],
): void {
  rows.forEach((position, row) => {
    positions.array[row] = BigInt(position);
  });
  groups.forEach(({ firstRow, batch, length }, g) => {
    let total = 0;
    for (let i = 0; i < batch; i += 1) {
      const last = rows[firstRow + i * length + length - 1]!;
      lastPositions[g]!.array[i] = last;
      total = Math.max(total, last + 1);
    }
    totalLengths[g]!.array[0] = total;
  });
  const inputs: SmallInput[] = [positions, ...lastPositions, ...totalLengths];
  for (const { copy } of inputs) copy?.run();
}
