/**
 * The runs of a rank's layers on a device: by graphs that all layers share, their weights bound, or by each layer's own
 * and activations that all of these write to the same place.
 */
import {
  deviceAttendGraph,
  deviceAttentionGraph,
  deviceFfnGraph,
  ffnSteps,
  type GroupKind,
} from './device-graph.js';
import type { DeviceLayer, DeviceMatrix, DeviceShard } from './device-shard.js';
import type { Bound, Made } from './device-runs.js';
import type { DeviceTensor } from './device-tensor.js';
import type { BoundRun, DeviceSession } from './ort-binding.js';
import type { AttentionGroup } from './step-layout.js';

/** What layers begin with and leave, for one shape of steps; residual stream and partials are (1, rows, hidden). */
export interface LayerEnds {
  /** The residual stream before the first layer, after attention, and after the network. */
  readonly zeros: Bound;
  readonly afterAttention: Bound;
  readonly afterFfn: Bound;
  /** All ranks' partials by the names of a graph's inputs, and our own. */
  readonly embedded: readonly [string, Bound][];
  readonly attended: readonly [string, Bound][];
  readonly fed: readonly [string, Bound][];
  readonly ownAttended: Bound;
  readonly ownFed: Bound;
  /** What attention reads beside rows and caches. */
  readonly common: ReadonlyMap<string, Bound>;
  /** By group, by layer. */
  readonly caches: readonly (readonly { readonly keys: Bound; readonly values: Bound }[])[];
}

/** The runs between two exchanges. */
export interface LayerRuns {
  readonly attention: readonly BoundRun[];
  readonly ffn: BoundRun;
}

export class DeviceLayers {
  readonly #made: Made;
  readonly #shard: DeviceShard;
  /** By groups' kinds. */
  readonly #attention = new Map<string, DeviceSession>();
  /** Null where layers have their own. */
  readonly #ffn: DeviceSession | null;
  /** Of layers with graphs of their own, by name, (1, most rows, width). */
  readonly #along: ReadonlyMap<string, DeviceTensor>;

  /** @param made has sessions and tensors as long as they are used. */
  constructor(made: Made, shard: DeviceShard, maxRows: number) {
    this.#made = made;
    this.#shard = shard;
    const { shape, layers } = shard;
    const [first] = layers;
    this.#ffn = shape.hasFixedWeights ? null : made.session(deviceFfnGraph(shape, first!));
    const widths: [string, number][] = shape.hasFixedWeights
      ? [
          ['x', shape.config.hiddenSize],
          ...(shape.plan.tp > 1 ? [['sum', shape.config.hiddenSize] as [string, number]] : []),
          ['qkv', first!.qkv.outputs],
          ['attended', first!.o.inputs],
          ...ffnSteps.map((name): [string, number] => [name, first!.gate.outputs]),
        ]
      : [];
    this.#along = new Map(
      widths.map(([name, width]) => [
        name,
        made.allocateZeros(shape.activations, [1, maxRows, width]),
      ]),
    );
  }

  bind(
    made: Made,
    rowCount: number,
    groups: readonly AttentionGroup[],
    ends: LayerEnds,
  ): LayerRuns[] {
    const { layers } = this.#shard;
    const session = this.#attentionOf(groups);
    const along = new Map<string, Bound>();
    for (const [name, whole] of this.#along) {
      along.set(name, made.view(whole, [1, rowCount, whole.shape[2]!]));
    }
    const attended = this.#along.get('attended');
    if (attended !== undefined) {
      const isSlots = groups.length === 1 && kindsOf(groups)[0] === 'slots';
      const rows = isSlots ? [rowCount, 1] : [1, rowCount];
      along.set(session.outputs.at(-1)!, made.view(attended, [...rows, attended.shape[2]!]));
    }
    return layers.map((layer, l) => {
      const before = [
        ['h', l === 0 ? ends.zeros : ends.afterFfn],
        ...(l === 0 ? ends.embedded : ends.fed),
        ['gamma', layer.attentionNorm],
        ['newH', ends.afterAttention],
      ] as const;
      const cached = new Map(ends.common);
      ends.caches.forEach((cachesOf, g) => {
        const { keys, values } = cachesOf[l]!;
        for (const name of ['keys', 'newKeys']) cached.set(`${name}.${g}`, keys);
        for (const name of ['values', 'newValues']) cached.set(`${name}.${g}`, values);
      });
      const bind = (of: DeviceSession, ...values: Iterable<readonly [string, Bound]>[]) =>
        made.bind(of, new Map(values.flatMap((some) => [...some])));
      const ofAttention = [...matrixInputs('qkv', layer.qkv), ...matrixInputs('o', layer.o)];
      const partial = [['partial', ends.ownAttended]] as const;
      const { sessions } = layer;
      const attention =
        sessions === null
          ? [bind(session, before, cached, ofAttention, partial)]
          : [
              bind(sessions.enter, along, before, ofAttention),
              bind(session, along, cached),
              bind(sessions.leave, along, ofAttention, partial),
            ];
      const ffn = bind(sessions?.ffn ?? this.#ffn!, along, ffnValues(layer, ends));
      return { attention, ffn };
    });
  }

  #attentionOf(groups: readonly AttentionGroup[]): DeviceSession {
    const kinds = kindsOf(groups);
    const key = kinds.join();
    let session = this.#attention.get(key);
    if (session === undefined) {
      const { shape, layers } = this.#shard;
      const graph = shape.hasFixedWeights
        ? deviceAttendGraph(shape, kinds)
        : deviceAttentionGraph(shape, layers[0]!, kinds);
      session = this.#made.session(graph);
      this.#attention.set(key, session);
    }
    return session;
  }
}

const kindsOf = (groups: readonly AttentionGroup[]): GroupKind[] =>
  groups.map((group, g) => {
    if (group.batch > 1) return 'slots';
    return groups[g - 1]?.firstSlot === group.firstSlot ? 'moreRows' : 'rows';
  });

const ffnValues = (layer: DeviceLayer, ends: LayerEnds): (readonly [string, Bound])[] => [
  ['h', ends.afterAttention],
  ...ends.attended,
  ['gamma', layer.ffnNorm],
  ...matrixInputs('gate', layer.gate),
  ...matrixInputs('up', layer.up),
  ...matrixInputs('down', layer.down),
  ['newH', ends.afterFfn],
  ['partial', ends.ownFed],
];

/** What a graph reads of a matrix that is not in it. */
export const matrixInputs = (name: string, { tensors }: DeviceMatrix): [string, DeviceTensor][] =>
  [...tensors].map(([part, tensor]) => [`${name}.${part}`, tensor]);
