/**
 * Everything of a step on a device that is not weights or KV: activations that are allocated once for the largest step,
 * and, for each shape of a step, its runs with all inputs and outputs in place.
 */
import type { AllReduce } from './all-reduce.js';
import {
  deviceAttentionGraph,
  deviceEmbeddingGraph,
  deviceFfnGraph,
  deviceHeadGraph,
  deviceRowGraph,
  type GroupKind,
} from './device-graph.js';
import type { DeviceKv } from './device-kv.js';
import type { DeviceMatrix, DeviceShard } from './device-shard.js';
import { elementType, type TensorArray } from './ort.js';
import { Kept, Made, type Bound, type HeadRuns, type StepRuns } from './device-runs.js';
import type { DeviceSession } from './ort-binding.js';
import { tensorBytes, type DeviceTensor, type OrtDevice } from './ort-device.js';
import { rotaryTables } from './rotary.js';
import type { AttentionGroup } from './step-layout.js';

const { float32, int64 } = elementType;

export class DeviceWorkspace {
  readonly maxRows: number;
  readonly #device: OrtDevice;
  readonly #shard: DeviceShard;
  readonly #kv: DeviceKv;
  readonly #allReduce: AllReduce;
  readonly #attentionRows: number;
  readonly #buffers: {
    readonly zeros: DeviceTensor;
    readonly afterAttention: DeviceTensor;
    readonly afterFfn: DeviceTensor;
    readonly partials: readonly (readonly DeviceTensor[])[];
    readonly cos: DeviceTensor;
    readonly sin: DeviceTensor;
    readonly logits: DeviceTensor;
  };
  /** By groups' kinds. */
  readonly #attentionSessions = new Map<string, DeviceSession>();
  readonly #embed: DeviceSession;
  readonly #ffn: DeviceSession;
  readonly #head: DeviceSession;
  readonly #row: DeviceSession;
  readonly #steps = new Kept<StepRuns>();
  readonly #heads = new Kept<HeadRuns>();

  /** @param attentionRows most rows of a slot that one run of attention takes. */
  constructor(
    device: OrtDevice,
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
    this.#allReduce = allReduce;
    const { shape } = shard;
    const { config, plan, activations } = shape;
    const wide = () => device.allocateZeros(activations, [1, maxRows, config.hiddenSize]);
    // The node refuses more rows than the tables have, whatever their positions.
    const tableRows = Math.max(kv.maxSeqLen, maxRows);
    const { cos, sin } = rotaryTables(config, tableRows);
    const table = (values: Float32Array) =>
      device.upload(values, [tableRows, config.headSize / 2], activations);
    const zeros = new Float32Array(maxRows * config.hiddenSize);
    this.#buffers = {
      zeros: device.upload(zeros, [1, maxRows, config.hiddenSize], activations),
      afterAttention: wide(),
      afterFfn: wide(),
      partials: [0, 1].map(() => Array.from({ length: plan.tp }, wide)),
      cos: table(cos),
      sin: table(sin),
      logits: device.allocate(float32, [1, maxRows, plan.vocab.count]),
    };
    const { head, layers } = shard;
    this.#embed = device.session(deviceEmbeddingGraph(shape));
    this.#ffn = device.session(deviceFfnGraph(shape, layers[0]!));
    this.#head = device.session(deviceHeadGraph(shape, head));
    this.#row = device.session(deviceRowGraph(shape));
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
    const { config, activations } = this.#shard.shape;
    return tensorBytes(activations, [rowCount, config.hiddenSize]) / 4;
  }

  step(rowCount: number, groups: readonly AttentionGroup[]): StepRuns {
    const key = groups.map((g) => [g.firstSlot, g.batch, g.length].join()).join(';');
    return this.#steps.get(`${rowCount};${key}`, () => this.#bindStep(rowCount, groups));
  }

  head(rowCount: number, sampledCount: number, k: number): HeadRuns {
    const key = [rowCount, sampledCount, k].join();
    return this.#heads.get(key, () => this.#bindHead(rowCount, sampledCount, k));
  }

  release(): void {
    this.#steps.release();
    this.#heads.release();
    const { partials, ...others } = this.#buffers;
    this.#device.release(...partials.flat(), ...Object.values(others));
    for (const session of this.#attentionSessions.values()) session.release();
    for (const session of [this.#embed, this.#ffn, this.#head, this.#row]) session.release();
  }

  #attentionSession(groups: readonly AttentionGroup[]): DeviceSession {
    const kinds = groups.map((group, g): GroupKind => {
      if (group.batch > 1) return 'slots';
      return groups[g - 1]?.firstSlot === group.firstSlot ? 'moreRows' : 'rows';
    });
    const key = kinds.join();
    let session = this.#attentionSessions.get(key);
    if (session === undefined) {
      const graph = deviceAttentionGraph(this.#shard.shape, this.#shard.layers[0]!, kinds);
      session = this.#device.session(graph);
      this.#attentionSessions.set(key, session);
    }
    return session;
  }

  #bindStep(rowCount: number, groups: readonly AttentionGroup[]): StepRuns {
    const device = this.#device;
    const { config, plan } = this.#shard;
    const { hiddenSize } = config;
    const made = new Made(device);
    const rows = (whole: DeviceTensor) => made.view(whole, [1, rowCount, hiddenSize]);
    const partials = this.#buffers.partials.map((ranks) => ranks.map(rows));
    const h = {
      zeros: rows(this.#buffers.zeros),
      afterAttention: rows(this.#buffers.afterAttention),
      afterFfn: rows(this.#buffers.afterFfn),
    };
    const session = this.#attentionSession(groups);
    const positions = made.input(new BigInt64Array(rowCount), [1, rowCount], 'device');
    const lastPositions = groups.map(({ batch }) =>
      made.input(new Int32Array(batch), [batch], 'device'),
    );
    const totalLengths = groups.map(() => made.input(new Int32Array(1), [1], 'host'));
    const common = new Map<string, Bound>([
      ['positions', positions.tensor],
      ['cos', this.#buffers.cos],
      ['sin', this.#buffers.sin],
    ]);
    if (groups.length > 1) {
      const counts = BigInt64Array.from(groups, ({ batch, length }) => BigInt(batch * length));
      const groupRows = made.input(counts, [groups.length], 'host');
      common.set('groupRows', groupRows.tensor);
    }
    groups.forEach((_, g) => {
      common.set(`lastPositions.${g}`, lastPositions[g]!.tensor);
      common.set(`totalLength.${g}`, totalLengths[g]!.tensor);
    });
    const addends = (parity: 0 | 1): [string, Bound][] =>
      partials[parity]!.map((tensor, rank) => [`partial.${rank}`, tensor]);
    const kv = groups.map((group) => this.#kv.view(group.firstSlot, group.batch));
    const attention = this.#shard.layers.map((layer, l) => {
      const values = new Map<string, Bound>([
        ...common,
        ['h', l === 0 ? h.zeros : h.afterFfn],
        ...addends(0),
        ['gamma', layer.attentionNorm],
        ...matrixInputs('qkv', layer.qkv),
        ...matrixInputs('o', layer.o),
        ['newH', h.afterAttention],
        ['partial', partials[1]![plan.rank]!],
      ]);
      kv.forEach((views, g) => {
        const { keys, values: kept } = views[l]!;
        for (const name of ['keys', 'newKeys']) values.set(`${name}.${g}`, keys);
        for (const name of ['values', 'newValues']) values.set(`${name}.${g}`, kept);
      });
      return made.bind(session, values);
    });
    const ffn = this.#shard.layers.map((layer) =>
      made.bind(
        this.#ffn,
        new Map<string, Bound>([
          ['h', h.afterAttention],
          ...addends(1),
          ['gamma', layer.ffnNorm],
          ...matrixInputs('gate', layer.gate),
          ...matrixInputs('up', layer.up),
          ...matrixInputs('down', layer.down),
          ['newH', h.afterFfn],
          ['partial', partials[0]![plan.rank]!],
        ]),
      ),
    );
    const tokens = made.input(new BigInt64Array(rowCount), [1, rowCount], 'device');
    const embed = made.bind(
      this.#embed,
      new Map<string, Bound>([
        ['table', this.#shard.embedding],
        ['tokens', tokens.tensor],
        ['partial', partials[0]![plan.rank]!],
      ]),
    );
    // As they are, whatever their type.
    const words = this.partialWords(rowCount);
    const onHost = this.#allReduce.partials.map((ranks) =>
      ranks.map(({ buffer, byteOffset }) => new Int32Array(buffer, byteOffset, words)),
    );
    const onDevice = this.#buffers.partials.map((ranks) =>
      ranks.map((whole) => made.words(whole, words)),
    );
    const copyIn = (turn: number, parity: number, rank: number) =>
      made.copy(device.copyIn(onHost[turn]![rank]!, onDevice[parity]![rank]!));
    const ranks = Array.from({ length: plan.tp }, (_, rank) => rank);
    const peers = ranks.filter((rank) => rank !== plan.rank);
    const isAlone = plan.tp === 1;
    return {
      tokens,
      positions,
      lastPositions,
      totalLengths,
      embed,
      attention,
      ffn,
      partialOut: [0, 1].map((turn) =>
        [0, 1].flatMap((parity) => {
          if (isAlone) return [];
          const own = onDevice[parity]![plan.rank]!;
          return [made.copy(device.copyOut(own, onHost[turn]![plan.rank]!))];
        }),
      ),
      partialsIn: [0, 1].map((turn) =>
        [0, 1].map((parity) => peers.map((rank) => copyIn(turn, parity, rank))),
      ),
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
    const sampledRows = made.input(new BigInt64Array(sampledCount), [sampledCount], 'device');
    const kInput = made.input(BigInt64Array.of(BigInt(k)), [1], 'host');
    const inverse = new Float32Array(sampledCount);
    const temperatures = made.input(inverse, [1, sampledCount, 1], 'device');
    const logits = made.view(this.#buffers.logits, [1, sampledCount, plan.vocab.count]);
    const result = <T extends TensorArray>(array: T, shape: readonly number[]) => {
      const type = array instanceof BigInt64Array ? int64 : float32;
      const tensor = made.allocate(type, shape);
      return { array, tensor, copy: made.copy(device.copyOut(tensor, array)) };
    };
    const shape = [1, sampledCount, k];
    const topLogits = result(new Float32Array(sampledCount * k), shape);
    const topPlaces = result(new BigInt64Array(sampledCount * k), shape);
    const sums = result(new Float32Array(sampledCount), [1, sampledCount, 1]);
    const temperedSums = result(new Float32Array(sampledCount), [1, sampledCount, 1]);
    const run = made.bind(
      this.#head,
      new Map<string, Bound>([
        ['h', rows(this.#buffers.afterFfn)],
        ...this.#buffers.partials[0]!.map((t, rank): [string, Bound] => [
          `partial.${rank}`,
          rows(t),
        ]),
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
    const rowIndex = made.input(new BigInt64Array(1), [1], 'device');
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
      sampledRows,
      inverseTemperatures: temperatures,
      run,
      topLogits: topLogits.array,
      topPlaces: topPlaces.array,
      sums: sums.array,
      temperedSums: temperedSums.array,
      results: [topLogits, topPlaces, sums, temperedSums].map(({ copy }) => copy),
      rowIndex,
      row,
      rowLogits,
      rowOut: made.copy(device.copyOut(picked, rowLogits)),
      release: () => {
        made.release();
      },
    };
  }
}

const matrixInputs = (name: string, { tensors }: DeviceMatrix): [string, DeviceTensor][] =>
  [...tensors].map(([part, tensor]) => [`${name}.${part}`, tensor]);
