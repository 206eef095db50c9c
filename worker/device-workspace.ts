/**
 * Everything of a step on a device that is not weights or KV: activations that are allocated once for the largest step,
 * and, for each shape of a step, its runs with all inputs and outputs in place.
 */
import type { AllReduce } from './all-reduce.js';
import { deviceEmbeddingGraph, deviceHeadGraph, deviceRowGraph } from './device-graph.js';
import type { DeviceKv } from './device-kv.js';
import { DeviceLayers, matrixInputs } from './device-layers.js';
import type { DeviceShard } from './device-shard.js';
import { elementType } from './ort.js';
import { Kept, Made, type Bound, type HeadRuns, type StepRuns } from './device-runs.js';
import type { DeviceSession } from './ort-binding.js';
import { smallArrays } from './device-small.js';
import { DevicePartials } from './device-partials.js';
import { partialBuffer, type PartialBuffer } from './direct-memory.js';
import type { DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';
import { cutInput, rowCuts, type GroupRange } from './row-cuts.js';
import { rotaryTables } from './rotary.js';
import type { AttentionGroup } from './step-layout.js';

const { float32, int32, int64 } = elementType;

export class DeviceWorkspace {
  readonly maxRows: number;
  readonly #device: OrtDevice;
  readonly #shard: DeviceShard;
  readonly #kv: DeviceKv;
  readonly #partials: DevicePartials;
  readonly #attentionRows: number;
  readonly #buffers: {
    readonly zeros: DeviceTensor;
    readonly afterAttention: DeviceTensor;
    readonly afterFfn: DeviceTensor;
    readonly cos: DeviceTensor;
    readonly sin: DeviceTensor;
    readonly logits: DeviceTensor;
  };
  readonly #layers: DeviceLayers;
  readonly #embed: DeviceSession;
  readonly #head: DeviceSession;
  readonly #row: DeviceSession;
  readonly #steps = new Kept<StepRuns>();
  readonly #heads = new Kept<HeadRuns>();

  /**
   * @param made has all that is not of one shape of steps, as long as it is used; whoever gives it releases it, also when
   *   this throws.
   * @param attentionRows most rows of a slot that one run of attention takes.
   */
  constructor(
    device: OrtDevice,
    made: Made,
    shard: DeviceShard,
    kv: DeviceKv,
    maxRows: number,
    allReduce: AllReduce,
    attentionRows: number,
  ) {
    this.#device = device;
    this.#shard = shard;
    this.#kv = kv;
    this.maxRows = maxRows;
    this.#attentionRows = attentionRows;
    const { shape } = shard;
    const { config, plan, activations } = shape;
    const wide = () => made.allocateZeros(activations, [1, maxRows, config.hiddenSize]);
    // The node refuses more rows than the tables have, whatever their positions.
    const tableRows = Math.max(kv.maxSeqLen, maxRows);
    const { cos, sin } = rotaryTables(config, tableRows);
    const table = (values: Float32Array) =>
      made.upload(values, [tableRows, config.headSize / 2], activations);
    const zeros = new Float32Array(maxRows * config.hiddenSize);
    this.#buffers = {
      zeros: made.upload(zeros, [1, maxRows, config.hiddenSize], activations),
      afterAttention: wide(),
      afterFfn: wide(),
      cos: table(cos),
      sin: table(sin),
      logits: made.allocate(float32, [1, maxRows, plan.vocab.count]),
    };
    this.#partials = new DevicePartials(device, made, shape, maxRows, allReduce);
    this.#layers = new DeviceLayers(made, shard, maxRows);
    this.#embed = made.session(deviceEmbeddingGraph(shape));
    this.#head = made.session(deviceHeadGraph(shape, shard.head));
    this.#row = made.session(deviceRowGraph(shape));
  }

  /** How attention goes over a step's groups: a run takes no more slots, or rows of one, than the device can. */
  groupsOf(groups: readonly AttentionGroup[]): AttentionGroup[] {
    return groups.flatMap((group) => {
      const { firstRow, firstSlot, batch, length } = group;
      if (batch > this.#kv.slotsPerRun) {
        return Array.from({ length: batch }, (_, i) => ({
          firstRow: firstRow + i * length,
          firstSlot: firstSlot + i,
          batch: 1,
          length,
        }));
      }
      const count = Math.max(1, Math.ceil(length / this.#attentionRows));
      const start = (part: number): number => Math.floor((part * length) / count);
      return Array.from({ length: count }, (_, part) => ({
        firstRow: firstRow + start(part),
        firstSlot,
        batch,
        length: start(part + 1) - start(part),
      }));
    });
  }

  /** How many numbers of 32 bits a partial of so many rows takes. */
  partialWords(rowCount: number): number {
    return this.#partials.words(rowCount);
  }

  /**
   * The total length that a group's attention is told: of single rows a rounded one, so that what was captured holds for
   * more than one step. How long each slot is lies on the device.
   */
  totalLength({ length }: AttentionGroup, total: number): number {
    const { lengthStep } = this.#shard.shape;
    if (length > 1) return total;
    return Math.min(this.#kv.maxSeqLen, lengthStep * Math.ceil(total / lengthStep));
  }

  step(rowCount: number, groups: readonly AttentionGroup[]): StepRuns {
    const key = groups.map((g) => [g.firstSlot, g.batch, g.length].join()).join(';');
    return this.#steps.get(`${rowCount};${key}`, () => this.#bindStep(rowCount, groups));
  }

  head(rowCount: number, sampledCount: number, k: number): HeadRuns {
    const key = [rowCount, sampledCount, k].join();
    return this.#heads.get(key, () => this.#bindHead(rowCount, sampledCount, k));
  }

  /** Lets go of the runs. */
  release(): void {
    this.#steps.release();
    this.#heads.release();
  }

  #bindStep(rowCount: number, groups: readonly AttentionGroup[]): StepRuns {
    const device = this.#device;
    const { config, plan } = this.#shard;
    const { hiddenSize } = config;
    const made = new Made(device);
    const rows = (whole: DeviceTensor) => made.view(whole, [1, rowCount, hiddenSize]);
    const partials = this.#partials.bind(made, rowCount);
    const h = {
      zeros: rows(this.#buffers.zeros),
      afterAttention: rows(this.#buffers.afterAttention),
      afterFfn: rows(this.#buffers.afterFfn),
    };
    const small = smallArrays(made, device, 'in', [
      { type: int64, shape: [1, rowCount] },
      { type: int64, shape: [1, rowCount] },
      ...groups.map(({ batch }) => ({ type: int32, shape: [batch] })),
    ]);
    const [tokens, positions, ...lastPositions] = small.parts;
    const totalLengths = groups.map(() => made.hostInput(new Int32Array(1), [1]));
    const common = new Map<string, Bound>([
      ['positions', positions.tensor],
      ['cos', this.#buffers.cos],
      ['sin', this.#buffers.sin],
    ]);
    for (const cut of rowCuts({ first: 0, count: groups.length })) {
      const rowsOf = ({ first, count }: GroupRange): bigint =>
        groups
          .slice(first, first + count)
          .reduce((sum, { batch, length }) => sum + BigInt(batch * length), 0n);
      const sizes = BigInt64Array.from(cut.parts, rowsOf);
      common.set(cutInput(cut), made.hostInput(sizes, [sizes.length]).tensor);
    }
    groups.forEach((_, g) => {
      common.set(`lastPositions.${g}`, lastPositions[g]!.tensor);
      common.set(`totalLength.${g}`, totalLengths[g]!.tensor);
    });
    const addends = (buffer: PartialBuffer): [string, Bound][] =>
      partials.tensors[buffer]!.map((tensor, rank) => [`partial.${rank}`, tensor]);
    const own = (buffer: PartialBuffer): Bound => partials.tensors[buffer]![plan.rank]!;
    const layers = this.#layers.bind(made, rowCount, groups, {
      ...h,
      embedded: addends(partialBuffer.embedding),
      attended: addends(partialBuffer.attention),
      fed: addends(partialBuffer.ffn),
      ownAttended: own(partialBuffer.attention),
      ownFed: own(partialBuffer.ffn),
      common,
      caches: groups.map((group) => this.#kv.view(group.firstSlot, group.batch)),
    });
    const embed = made.bind(
      this.#embed,
      new Map<string, Bound>([
        ['table', this.#shard.embedding],
        ['tokens', tokens.tensor],
        ['partial', own(partialBuffer.embedding)],
      ]),
    );
    const parts = [
      { runs: [embed], buffer: partialBuffer.embedding },
      ...layers.flatMap(({ attention, ffn }) => [
        { runs: attention, buffer: partialBuffer.attention },
        { runs: [ffn], buffer: partialBuffer.ffn },
      ]),
    ];
    const isRepeated = isDecode(groups);
    const segments =
      isRepeated && plan.tp === 1 && device.capturing.fault === null
        ? [
            {
              launch: made.launch(
                parts.flatMap(({ runs }) => runs),
                true,
              ),
              buffer: partialBuffer.ffn,
            },
          ]
        : parts.map(({ runs, buffer }) => ({ launch: made.launch(runs, isRepeated), buffer }));
    return {
      ...{ partials, segments },
      tokens: tokens.array,
      positions: positions.array,
      lastPositions: lastPositions.map(({ array }) => array),
      totalLengths: totalLengths.map(({ array }) => array),
      inputs: small.copies,
      isCaptured: (total) => segments.every(({ launch }) => launch.isCapturedFor(total)),
      first: [embed, ...layers[0]!.attention, layers[0]!.ffn],
      release: () => {
        made.release();
      },
    };
  }

  #bindHead(rowCount: number, sampledCount: number, k: number): HeadRuns {
    const device = this.#device;
    const { config, plan, norm, head } = this.#shard;
    const made = new Made(device);
    const rows = (whole: DeviceTensor) => made.view(whole, [1, rowCount, config.hiddenSize]);
    const one = [1, sampledCount, 1];
    const inputs = smallArrays(made, device, 'in', [
      { type: int64, shape: [sampledCount] },
      { type: float32, shape: one },
    ]);
    const [sampledRows, temperatures] = inputs.parts;
    const kInput = made.hostInput(BigInt64Array.of(BigInt(k)), [1]);
    const logits = made.view(this.#buffers.logits, [1, sampledCount, plan.vocab.count]);
    const results = smallArrays(made, device, 'out', [
      { type: int64, shape: [1, sampledCount, k] },
      { type: float32, shape: [1, sampledCount, k] },
      { type: float32, shape: one },
      { type: float32, shape: one },
    ]);
    const [topPlaces, topLogits, sums, temperedSums] = results.parts;
    const addends = this.#partials.views(made, rowCount)[partialBuffer.ffn]!;
    const run = made.bind(
      this.#head,
      new Map<string, Bound>([
        ['h', rows(this.#buffers.afterFfn)],
        ...addends.map((tensor, rank): [string, Bound] => [`partial.${rank}`, tensor]),
        ['sampledRows', sampledRows.tensor],
        ['k', kInput.tensor],
        ['inverseTemperatures', temperatures.tensor],
        ['gamma', norm],
        ...matrixInputs('head', head),
        ['logits', logits],
        ['topLogits', topLogits.tensor],
        ['topPlaces', topPlaces.tensor],
        ['sums', sums.tensor],
        ['temperedSums', temperedSums.tensor],
      ]),
    );
    const index = smallArrays(made, device, 'in', [{ type: int64, shape: [1] }]);
    const [rowIndex] = index.parts;
    const picked = made.allocate(float32, [1, 1, plan.vocab.count]);
    const rowLogits = new Float32Array(new ArrayBuffer(4 * plan.vocab.count));
    const row = made.bind(
      this.#row,
      new Map<string, Bound>([
        ['logits', logits],
        ['row', rowIndex.tensor],
        ['picked', picked],
      ]),
    );
    return {
      sampledRows: sampledRows.array,
      inverseTemperatures: temperatures.array,
      inputs: inputs.copies,
      run,
      launch: made.launch([run], true),
      topLogits: topLogits.array,
      topPlaces: topPlaces.array,
      sums: sums.array,
      temperedSums: temperedSums.array,
      results: results.copies,
      rowIndex: rowIndex.array,
      rowIn: index.copies,
      row,
      rowLogits,
      rowOut: made.copy(device.copyOut(picked, rowLogits)),
      release: () => {
        made.release();
      },
    };
  }
}

/** Whether every slot has one row: such steps come again and again. */
const isDecode = (groups: readonly AttentionGroup[]): boolean =>
  groups.length === 1 && groups[0]!.length === 1;
