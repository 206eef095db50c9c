/**
 * A pass on a device: weights, KV and activations stay there; partials, small inputs and the largest logits move.
 */
import type { LlamaConfig } from '../model/config.js';
import type { AllReduce, Turn } from './all-reduce.js';
import type { DeviceKv } from './device-kv.js';
import type { DeviceShard } from './device-shard.js';
import { runAll, type HeadRuns, type StepRuns } from './device-runs.js';
import { Launch, RUNS_BEFORE_CAPTURE } from './device-launch.js';
import type { DeviceWorkspace } from './device-workspace.js';
import type { PartialBuffer } from './direct-memory.js';
import type { OrtDevice } from './ort-device.js';
import type { Pass, PassFigures, RowTop, Slots, Wish } from './pass.js';
import type { AttentionGroup, StepLayout } from './step-layout.js';
import type { StreamExchange } from './stream-exchange.js';

export class DevicePass implements Pass {
  readonly config: LlamaConfig;
  readonly vocab: { readonly start: number; readonly count: number };
  readonly slots: Slots;
  readonly maxRows: number;
  readonly copyPositions: (from: number, to: number) => void;
  readonly #device: OrtDevice;
  readonly #workspace: DeviceWorkspace;
  readonly #allReduce: AllReduce;
  /** For steps that are captured, where the device's stream can exchange partials itself. */
  readonly #stream: StreamExchange | null;
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
    stream: StreamExchange | null,
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
    this.#stream = stream;
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
      this.#bindPositions(runs, positions, groups);
      const head = this.#workspace.head(rowCount, batch, 1);
      runAll(runs.inputs);
      runAll(head.inputs);
      for (const run of [...runs.first, head.run]) {
        run.run();
        run.synchronize();
        this.#device.synchronize();
        await served();
      }
    }
    this.#tryCapture();
  }

  /** Whether this device captures is known, and reported, before there are sequences. */
  #tryCapture(): void {
    const device = this.#device;
    if (device.capturing.fault !== null) return;
    const groups = this.#workspace.groupsOf([{ firstRow: 0, firstSlot: 0, batch: 1, length: 1 }]);
    const runs = this.#workspace.step(1, groups);
    const launch = new Launch([...runs.first, this.#workspace.head(1, 1, 1).run], device.capturing);
    try {
      for (let i = 0; i <= RUNS_BEFORE_CAPTURE; i += 1) launch.run();
      device.synchronize();
    } finally {
      launch.release();
    }
  }

  async compute(layout: StepLayout, wish: Wish): Promise<PassFigures> {
    this.#waitMs = 0;
    const { traffic } = this.#device;
    const before = { ...traffic };
    const { rowCount, sampledRows } = layout;
    const groups = this.#workspace.groupsOf(layout.groups);
    const runs = this.#workspace.step(rowCount, groups);
    this.#bindPositions(runs, layout.positions, groups);
    this.#bindTokens(runs, layout.tokens);
    runAll(runs.inputs);
    const head = sampledRows.length > 0 ? this.#bindHead(layout, wish) : null;
    const total = runs.totalLengths[0]![0]!;
    const stream = this.#stream !== null && runs.isCaptured(total) ? this.#stream : null;
    for (let i = 0; i < runs.segments.length; i += 1) {
      const { launch, buffer } = runs.segments[i]!;
      launch.run(total);
      if (stream !== null) {
        stream.enqueue(this.#nextTurn(), this.#workspace.partialWords(rowCount));
        continue;
      }
      const waiting = this.#share(runs, rowCount, buffer);
      if (waiting !== null) await waiting;
    }
    head?.launch.run();
    // Copies would wait with the stream, for ever if a peer is dead.
    if (stream !== null) await stream.settle();
    if (head === null) this.#device.synchronize();
    else runAll(head.results);
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
    const { rowIndex, rowIn, row: run, rowOut, rowLogits } = this.#head!;
    rowIndex[0] = BigInt(row);
    runAll(rowIn);
    run.run();
    rowOut.run();
    return rowLogits;
  }

  #bindHead({ rowCount, sampledRows }: StepLayout, wish: Wish): HeadRuns {
    const head = this.#workspace.head(rowCount, sampledRows.length, wish.k);
    this.#head = head;
    this.#wish = wish;
    sampledRows.forEach((row, i) => {
      head.sampledRows[i] = BigInt(row);
      const temperature = wish.temperatures[i]!;
      head.inverseTemperatures[i] = temperature > 0 ? 1 / temperature : 1;
    });
    runAll(head.inputs);
    return head;
  }

  /** Our partial goes to the peers, and theirs come beside it. @returns null when they are here already. */
  #share({ partials }: StepRuns, rowCount: number, buffer: PartialBuffer): Promise<void> | null {
    const turn = this.#nextTurn();
    partials.send(turn, buffer);
    const startMs = performance.now();
    const waiting = this.#allReduce.exchange(turn, this.#workspace.partialWords(rowCount));
    const receive = (): void => {
      this.#waitMs += performance.now() - startMs;
      partials.receive(turn, buffer);
    };
    if (waiting !== null) return waiting.then(receive);
    receive();
    return null;
  }

  #nextTurn(): Turn {
    const turn = this.#turn;
    this.#turn = turn === 0 ? 1 : 0;
    return turn;
  }

  #bindTokens({ tokens }: StepRuns, ids: readonly number[]): void {
    const { start, count } = this.vocab;
    ids.forEach((token, row) => {
      const own = token - start;
      tokens[row] = BigInt(own >= 0 && own < count ? own : count);
    });
  }

  #bindPositions(
    { positions, lastPositions, totalLengths }: StepRuns,
    rows: readonly number[],
    groups: readonly AttentionGroup[],
  ): void {
    rows.forEach((position, row) => {
      positions[row] = BigInt(position);
    });
    groups.forEach((group, g) => {
      const { firstRow, batch, length } = group;
      let total = 0;
      for (let i = 0; i < batch; i += 1) {
        const last = rows[firstRow + i * length + length - 1]!;
        lastPositions[g]![i] = last;
        total = Math.max(total, last + 1);
      }
      totalLengths[g]![0] = this.#workspace.totalLength(group, total);
    });
  }
}
