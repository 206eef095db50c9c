/**
 * The graphs of a rank on a device. Weights are inputs: one graph serves all layers, and each weight lies on the device
 * once, whatever number of graphs reads it.
 *
 *   tokens ─> embedding ─> partial
 *   h, partials ─> attention (norm, qkv, rotary, a GroupQueryAttention a group, o) ─> h', partial
 *   h, partials ─> ffn ─> h', partial
 *   h, partials ─> head ─> logits, the k largest of them, sums of exponentials
 *
 * CUDA's quick products want weights that are part of the graph. Then every layer has graphs of its own, and attention is
 * in three parts, of which the middle one, with as many forms as steps have, has no weights and serves all layers:
 *
 *   h, partials ─> enter (norm, qkv) ─> h', qkv
 *   qkv ─> attend (rotary, a GroupQueryAttention a group) ─> attended
 *   attended ─> leave (o) ─> partial
 *
 * What is computed on the way is an output there, so that all layers write it to the same place: a session that kept
 * memory of its own for it would take it once a layer.
 *
 * Activations are (1, rows, width) as on the host.
 */
import { DeviceGraphBuilder, type DeviceShape, type MatrixShape } from './device-graph-builder.js';
import { float, GraphBuilder, int, MICROSOFT, type Graph } from './graph-builder.js';
import { elementType } from './ort.js';
import { cutInput, rowCuts, type GroupRange } from './row-cuts.js';

const { float32, float16, int32, int64 } = elementType;

/**
 * `slots`: neighbouring slots with one row each. `rows`: one slot with any number of rows. `moreRows`: those that follow in
 * the slot of the group before.
 */
export type GroupKind = 'slots' | 'rows' | 'moreRows';

/**
 * Attention of a layer, over all rows of a step. `groups` says how many runs of GroupQueryAttention there are, and of which
 * kind; with several, inputs say how the rows are cut into theirs (`row-cuts`).
 */
export function deviceAttentionGraph(
  shape: DeviceShape,
  { qkv, o }: { readonly qkv: MatrixShape; readonly o: MatrixShape },
  groups: readonly GroupKind[],
): Graph {
  const graph = new DeviceGraphBuilder(shape);
  graph.residual('newH');
  graph.product('x', 'qkv', qkv, 'qkv');
  graph.product(attendAll(graph, shape, groups), 'o', o, 'partial');
  graph.partialOutput();
  return graph.finish();
}

/** What comes before attention, of one layer: output `qkv` (1, rows, outputs). */
export function deviceEnterGraph(shape: DeviceShape, qkv: MatrixShape): Graph {
  const graph = new DeviceGraphBuilder(shape);
  graph.residual('newH');
  graph.product('x', 'qkv', qkv, 'qkv');
  graph.along('qkv', qkv.outputs);
  return graph.finish();
}

/**
 * Attention itself, of any layer: input `qkv` as `deviceEnterGraph` gives it; the last output is what `deviceLeaveGraph`
 * takes, but of slots alone, which is (batch, 1, width).
 */
export function deviceAttendGraph(shape: DeviceShape, groups: readonly GroupKind[]): Graph {
  const { config, plan, activations } = shape;
  const graph = new DeviceGraphBuilder(shape);
  graph.input('qkv', activations, [1, 'rows', qkvWidth(shape)]);
  const all = attendAll(graph, shape, groups, true);
  const width = plan.queryHeads.count * config.headSize;
  graph.output(all, activations, ['batch', 'length', width]);
  return graph.finish();
}

/** What comes after attention, of one layer. */
export function deviceLeaveGraph(shape: DeviceShape, o: MatrixShape): Graph {
  const graph = new DeviceGraphBuilder(shape);
  graph.input('attended', shape.activations, [1, 'rows', o.inputs]);
  graph.product('attended', 'o', o, 'partial');
  graph.partialOutput();
  return graph.finish();
}

const qkvWidth = ({ config, plan }: DeviceShape): number =>
  (plan.queryHeads.count + 2 * plan.kvHeads.count) * config.headSize;

/** Attention over all groups of rows of `qkv`, joined; `isRaw` leaves the slots of one alone. @returns what it is called. */
function attendAll(
  graph: DeviceGraphBuilder,
  shape: DeviceShape,
  groups: readonly GroupKind[],
  isRaw = false,
): string {
  const { config, plan, activations, attention } = shape;
  graph.input('cos', activations, ['capacity', config.headSize / 2]);
  graph.input('sin', activations, ['capacity', config.headSize / 2]);
  const operands = isPacked(shape)
    ? [{ name: 'qkv', width: qkvWidth(shape) }]
    : rotatedOperands(graph, shape);
  const cuts = rowCuts({ first: 0, count: groups.length });
  const nameOf = (whole: string, { first, count }: GroupRange): string => {
    if (count === groups.length) return whole;
    return count === 1 ? `${whole}.${first}` : `${whole}.${first}.${count}`;
  };
  for (const cut of cuts) {
    const sizes = graph.input(cutInput(cut), int64, [cut.parts.length]);
    for (const { name } of operands) {
      const parts = cut.parts.map((part) => nameOf(name, part));
      graph.node('Split', [nameOf(name, cut), sizes], parts, [int('axis', 1)]);
    }
  }
  const attended = groups.map((kind, g) => {
    const rows = operands.map(({ name, width }) => {
      const part = groups.length > 1 ? `${name}.${g}` : name;
      if (kind !== 'slots') return part;
      graph.reshape(part, [-1, 1, width], `${name}.slots.${g}`);
      return `${name}.slots.${g}`;
    });
    const name = attend(graph, shape, rows, kind, g);
    if (kind !== 'slots' || (isRaw && groups.length === 1)) return name;
    graph.reshape(name, [1, -1, plan.queryHeads.count * config.headSize], `attended.rows.${g}`);
    return `attended.rows.${g}`;
  });
  for (const cut of cuts.reverse()) {
    const parts = cut.parts.map((part) =>
      part.count === 1 ? attended[part.first]! : nameOf('attended', part),
    );
    graph.node('Concat', parts, [nameOf('attended', cut)], [int('axis', 1)]);
  }
  const all = attended.length > 1 ? 'attended' : attended[0]!;
  return graph.cast(all, attention, activations, 'attended.cast');
}

/**
 * Whether attention takes queries, keys and values as the product leaves them, and rotates them itself: with 16 bits
 * throughout, and head sizes that its rotation knows.
 */
const isPacked = ({ config, activations, attention }: DeviceShape): boolean =>
  activations === float16 && attention === float16 && config.headSize % 16 === 0;

/** Queries, keys and values apart, rotated by nodes of their own. */
function rotatedOperands(
  graph: DeviceGraphBuilder,
  { config, plan, activations, attention }: DeviceShape,
): { readonly name: string; readonly width: number }[] {
  graph.input('positions', int64, [1, 'rows']);
  const heads = { q: plan.queryHeads.count, k: plan.kvHeads.count, v: plan.kvHeads.count };
  const names = ['q', 'k', 'v'] as const;
  const widths = names.map((name) => heads[name] * config.headSize);
  const flat = names.map((name) => `${name}.flat`);
  graph.split('qkv', widths, flat);
  return names.map((name, i) => {
    let own = flat[i]!;
    if (name !== 'v') {
      graph.node(
        'RotaryEmbedding',
        [own, 'positions', 'cos', 'sin'],
        [`${name}.turned`],
        [int('num_heads', heads[name]), int('interleaved', 0)],
        MICROSOFT,
      );
      own = `${name}.turned`;
    }
    return { name: graph.cast(own, activations, attention, name), width: widths[i]! };
  });
}

/** One group's attention; keys and values are bound as inputs and as outputs. */
function attend(
  graph: DeviceGraphBuilder,
  shape: DeviceShape,
  rows: readonly string[],
  kind: GroupKind,
  g: number,
): string {
  const { config, plan, attention } = shape;
  const packed = isPacked(shape);
  const batch = `batch.${g}`;
  const cache = [batch, plan.kvHeads.count, `capacity.${g}`, config.headSize];
  const isMore = kind === 'moreRows';
  if (!isMore) for (const name of ['keys', 'values']) graph.input(`${name}.${g}`, attention, cache);
  graph.input(`lastPositions.${g}`, int32, [batch]);
  graph.input(`totalLength.${g}`, int32, [1]);
  // What the group before has written is read: so the one cannot be computed before the other.
  const kept = isMore ? [`newKeys.${g - 1}`, `newValues.${g - 1}`] : [`keys.${g}`, `values.${g}`];
  const own = [...kept, `lastPositions.${g}`, `totalLength.${g}`];
  graph.node(
    'GroupQueryAttention',
    [...rows, ...(packed ? ['', ''] : []), ...own, ...(packed ? ['cos', 'sin'] : [])],
    [`attended.${g}`, `newKeys.${g}`, `newValues.${g}`],
    [
      int('num_heads', plan.queryHeads.count),
      int('kv_num_heads', plan.kvHeads.count),
      int('do_rotary', packed ? 1 : 0),
    ],
    MICROSOFT,
  );
  for (const name of ['newKeys', 'newValues']) graph.output(`${name}.${g}`, attention, cache);
  return `attended.${g}`;
}

/** What a network computes between its norm and its partial: (1, rows, ffn). */
export const ffnSteps = ['gate', 'up', 'gate.silu', 'gated'] as const;

/** The feed-forward network of a layer. */
export function deviceFfnGraph(
  shape: DeviceShape,
  { gate, up, down }: Readonly<Record<'gate' | 'up' | 'down', MatrixShape>>,
): Graph {
  const graph = new DeviceGraphBuilder(shape);
  graph.residual('newH');
  if (shape.hasFixedWeights) for (const name of ffnSteps) graph.along(name, gate.outputs);
  graph.product('x', 'gate', gate, 'gate');
  graph.product('x', 'up', up, 'up');
  // x · sigmoid(x)
  graph.node('QuickGelu', ['gate'], ['gate.silu'], [float('alpha', 1)], MICROSOFT);
  graph.node('Mul', ['gate.silu', 'up'], ['gated']);
  graph.product('gated', 'down', down, 'partial');
  graph.partialOutput();
  return graph.finish();
}

/**
 * The partial of the token embedding: input `tokens` (1, rows) has rows of `table`, whose last one is zeros, for tokens of
 * other ranks.
 */
export function deviceEmbeddingGraph(shape: DeviceShape): Graph {
  const { config, plan, activations } = shape;
  const graph = new DeviceGraphBuilder(shape);
  graph.input('table', activations, [plan.vocab.count + 1, config.hiddenSize]);
  graph.input('tokens', int64, [1, 'rows']);
  graph.node('Gather', ['table', 'tokens'], ['partial'], [int('axis', 0)]);
  graph.partialOutput();
  return graph.finish();
}

/**
 * Of the sampled rows: logits (1, sampled, vocab), the k largest with their places, falling, and
 * Σ exp(logit − largest), of the logits as they are (`sums`) and divided by the row's temperature (`temperedSums`).
 */
export function deviceHeadGraph(shape: DeviceShape, head: MatrixShape): Graph {
  const { plan, activations } = shape;
  const graph = new DeviceGraphBuilder(shape);
  const { h, partials } = graph.residualInputs();
  graph.input('sampledRows', int64, ['sampled']);
  graph.input('k', int64, [1]);
  graph.input('inverseTemperatures', float32, [1, 'sampled', 1]);
  const [sampledH, ...sampledPartials] = [h, ...partials].map((name) => {
    graph.node('Gather', [name, 'sampledRows'], [`${name}.sampled`], [int('axis', 1)]);
    return `${name}.sampled`;
  });
  graph.normed(sampledH!, sampledPartials, '');
  const raw = activations === float32 ? 'logits' : 'logits.raw';
  graph.product('x', 'head', head, raw);
  if (raw !== 'logits') graph.node('Cast', [raw], ['logits'], [int('to', float32)]);
  graph.output('logits', float32, [1, 'sampled', plan.vocab.count]);
  graph.node('TopK', ['logits', 'k'], ['topLogits', 'topPlaces'], [int('axis', -1)]);
  graph.output('topLogits', float32, [1, 'sampled', 'k']);
  graph.output('topPlaces', int64, [1, 'sampled', 'k']);
  const last = graph.integers('last', [2]);
  // They fall, and CUDA takes a thousand times longer for the maxima of several rows.
  graph.node('Gather', ['topLogits', graph.integers('first', [0])], ['largest'], [int('axis', 2)]);
  graph.node('Sub', ['logits', 'largest'], ['below']);
  graph.node('Mul', ['below', 'inverseTemperatures'], ['tempered']);
  for (const [from, to] of [
    ['below', 'sums'],
    ['tempered', 'temperedSums'],
  ] as const) {
    graph.node('Exp', [from], [`${from}.exp`]);
    graph.node('ReduceSum', [`${from}.exp`, last], [to]);
    graph.output(to, float32, [1, 'sampled', 1]);
  }
  return graph.finish();
}

/** One row of the logits: input `row` (1), output (1, 1, vocab). */
export function deviceRowGraph({ plan }: DeviceShape): Graph {
  const graph = new GraphBuilder();
  graph.input('logits', float32, [1, 'sampled', plan.vocab.count]);
  graph.input('row', int64, [1]);
  graph.node('Gather', ['logits', 'row'], ['picked'], [int('axis', 1)]);
  graph.output('picked', float32, [1, 1, plan.vocab.count]);
  return graph.finish();
}
