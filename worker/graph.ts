/**
 * The ONNX graphs of a rank. All activations are (1, rows, width): the rows of a step, one after
 * another, whichever sequence they belong to. Only attention looks at sequences.
 *
 *   h, partials ─> attention-in ─> q, k, v ─> attention (a run per group) ─> attention-out ─> partial
 *   h, partials ─> ffn ─> partial
 *   h, partials ─> head ─> logits of the sampled rows
 *
 * h is the residual stream before the last all-reduce; the partials of all ranks are added in rank
 * order inside the graph, so that every rank computes the same sum, bit for bit.
 */
import type { LlamaConfig } from '../model/config.js';
import type { Range, RankPlan } from '../model/plan.js';
import {
  GraphBuilder,
  float,
  int,
  MICROSOFT,
  text,
  type Graph,
  type Kernels,
} from './graph-builder.js';
import type { Linear } from './linear.js';
import { elementType } from './ort.js';

/** What all graphs of a rank have in common. */
export interface GraphShape {
  readonly config: LlamaConfig;
  readonly plan: RankPlan;
  readonly kernels: Kernels;
}

const { float32, int8, int32, int64 } = elementType;

/** Declares h and the partials of all ranks, in rank order. */
function residualInputs(graph: GraphBuilder, { config, plan }: GraphShape): string[] {
  const shape = [1, 'rows', config.hiddenSize];
  graph.input('h', float32, shape);
  return Array.from({ length: plan.tp }, (_, rank) =>
    graph.input(`partial.${rank}`, float32, shape),
  );
}

const splitLast = (
  graph: GraphBuilder,
  x: string,
  widths: readonly number[],
  names: readonly string[],
): void => {
  graph.node('Split', [x, graph.integers(`${x}.widths`, widths)], names, [int('axis', -1)]);
};

/**
 * Inputs h, partials, positions (1, rows), cos and sin (capacity, headSize / 2); outputs newH, q
 * (1, rows, query heads × head size), k and v (1, rows, KV heads × head size), q and k rotated.
 *
 * Rotary embedding is a node of its own, not GroupQueryAttention's, which refuses head sizes that are
 * not multiples of 16.
 */
export function attentionInGraph(
  shape: GraphShape,
  weights: { readonly norm: Float32Array; readonly qkv: Linear },
): Graph {
  const { config, plan } = shape;
  const { headSize } = config;
  const graph = new GraphBuilder(shape.kernels);
  const partials = residualInputs(graph, shape);
  graph.input('positions', int64, [1, 'rows']);
  graph.input('cos', float32, ['capacity', headSize / 2]);
  graph.input('sin', float32, ['capacity', headSize / 2]);
  const queryWidth = plan.queryHeads.count * headSize;
  const keyWidth = plan.kvHeads.count * headSize;
  const delta = graph.sumPartials(partials);
  graph.addAndNorm('h', delta, weights.norm, config.normEps, 'x', 'newH');
  graph.linear('x', weights.qkv, 'qkv', 'fine');
  splitLast(graph, 'qkv', [queryWidth, keyWidth, keyWidth], ['q.flat', 'k.flat', 'v']);
  for (const [name, heads] of [
    ['q', plan.queryHeads.count],
    ['k', plan.kvHeads.count],
  ] as const) {
    graph.node(
      'RotaryEmbedding',
      [`${name}.flat`, 'positions', 'cos', 'sin'],
      [name],
      [int('num_heads', heads), int('interleaved', 0)],
      MICROSOFT,
    );
  }
  graph.output('newH', float32, [1, 'rows', config.hiddenSize]);
  graph.output('q', float32, [1, 'rows', queryWidth]);
  graph.output('k', float32, [1, 'rows', keyWidth]);
  graph.output('v', float32, [1, 'rows', keyWidth]);
  return graph.finish();
}

/**
 * Attention of one group: either `batch` decoding slots with one row each, or one slot with `length` rows.
 * The KV tensors are bound as inputs and as outputs: keys and values are written in place at each
 * slot's positions.
 *
 * @param form of keys and values. In 8 bits they have a scale a channel, inputs (1, KV heads, 1, head size) that are
 *   read at every run.
 */
export function attentionGraph(
  { config, plan }: Pick<GraphShape, 'config' | 'plan'>,
  form: 'fp32' | 'int8' = 'fp32',
): Graph {
  const graph = new GraphBuilder();
  const queryHeads = plan.queryHeads.count;
  const kvHeads = plan.kvHeads.count;
  const rows = (heads: number) => ['batch', 'length', heads * config.headSize];
  const cache = ['batch', kvHeads, 'capacity', config.headSize];
  graph.input('q', float32, rows(queryHeads));
  graph.input('k', float32, rows(kvHeads));
  graph.input('v', float32, rows(kvHeads));
  const element = form === 'int8' ? int8 : float32;
  graph.input('keys', element, cache);
  graph.input('values', element, cache);
  // Last position of each sequence in the group, and the positions of the longest.
  graph.input('lastPositions', int32, ['batch']);
  graph.input('totalLength', int32, [1]);
  const inputs = ['q', 'k', 'v', 'keys', 'values', 'lastPositions', 'totalLength'];
  const attributes = [
    int('num_heads', queryHeads),
    int('kv_num_heads', kvHeads),
    int('do_rotary', 0),
  ];
  if (form === 'int8') {
    for (const name of ['keyScales', 'valueScales']) {
      graph.input(name, float32, [1, kvHeads, 1, config.headSize]);
    }
    // Rotary tables, position ids, a bias and a sink are left out.
    inputs.push('', '', '', '', '', 'keyScales', 'valueScales');
    attributes.push(
      text('k_quant_type', 'PER_CHANNEL'),
      text('v_quant_type', 'PER_CHANNEL'),
      int('kv_cache_bit_width', 8),
    );
  }
  const outputs = ['attended', 'newKeys', 'newValues'];
  graph.node('GroupQueryAttention', inputs, outputs, attributes, MICROSOFT);
  graph.output('attended', float32, rows(queryHeads));
  graph.output('newKeys', element, cache);
  graph.output('newValues', element, cache);
  return graph.finish();
}

/** Input attended (1, rows, query heads × head size); output this rank's partial. */
export function attentionOutGraph({ config, kernels }: GraphShape, o: Linear): Graph {
  const graph = new GraphBuilder(kernels);
  graph.input('attended', float32, [1, 'rows', o.inputs]);
  graph.linear('attended', o, 'partial');
  graph.output('partial', float32, [1, 'rows', config.hiddenSize]);
  return graph.finish();
}

/**
 * Inputs h and partials; outputs newH and this rank's partial. `gateUp` holds gate's rows, then up's.
 *
 * @param isMore adds to a partial that other columns of the network made, an input more, and has no newH.
 */
export function ffnGraph(
  shape: GraphShape,
  weights: { readonly norm: Float32Array; readonly gateUp: Linear; readonly down: Linear },
  isMore = false,
): Graph {
  const { config } = shape;
  const width = weights.down.inputs;
  const graph = new GraphBuilder(shape.kernels);
  const delta = graph.sumPartials(residualInputs(graph, shape));
  graph.addAndNorm('h', delta, weights.norm, config.normEps, 'x', isMore ? '' : 'newH');
  graph.linear('x', weights.gateUp, 'gateUp', 'fine');
  splitLast(graph, 'gateUp', [width, width], ['gate', 'up']);
  // x · sigmoid(x)
  graph.node('QuickGelu', ['gate'], ['gate.silu'], [float('alpha', 1)], MICROSOFT);
  graph.node('Mul', ['gate.silu', 'up'], ['gated']);
  // Llama's massive activations: the first token's, above all.
  graph.linear('gated', weights.down, isMore ? 'more' : 'partial', 'fine');
  const hidden = [1, 'rows', config.hiddenSize];
  if (isMore) {
    graph.input('before', float32, hidden);
    graph.node('Add', ['before', 'more'], ['partial']);
  } else {
    graph.output('newH', float32, hidden);
  }
  graph.output('partial', float32, hidden);
  return graph.finish();
}

/**
 * Inputs h, partials and the sampled rows; output logits (1, sampled, this rank's vocabulary).
 *
 * @param part which rows of this rank's vocabulary `head` has, where it has not all: the logits of the others are
 *   zero, or those of an input more if it does not begin with the first.
 */
export function headGraph(
  shape: GraphShape,
  weights: { readonly norm: Float32Array; readonly head: Linear },
  part: Range = { start: 0, count: shape.plan.vocab.count },
): Graph {
  const { config, plan } = shape;
  const graph = new GraphBuilder(shape.kernels);
  const inputs = ['h', ...residualInputs(graph, shape)];
  graph.input('sampledRows', int64, ['sampled']);
  const [h, ...partials] = inputs.map((name) => {
    graph.node('Gather', [name, 'sampledRows'], [`${name}.sampled`], [int('axis', 1)]);
    return `${name}.sampled`;
  });
  const delta = graph.sumPartials(partials);
  graph.addAndNorm(h!, delta, weights.norm, config.normEps, 'x', '');
  const all = [1, 'sampled', plan.vocab.count];
  const isFirst = part.start === 0;
  if (isFirst && part.count === plan.vocab.count) {
    graph.linear('x', weights.head, 'logits', 'fine');
  } else {
    graph.linear('x', weights.head, 'own', 'fine');
    const after = plan.vocab.count - part.start - part.count;
    const pads = graph.integers('pads', [0, 0, part.start, 0, 0, after]);
    graph.node('Pad', ['own', pads], [isFirst ? 'logits' : 'padded']);
    if (!isFirst) {
      graph.input('before', float32, all);
      graph.node('Add', ['before', 'padded'], ['logits']);
    }
  }
  graph.output('logits', float32, all);
  return graph.finish();
}
