/**
 * A shard: one rank's slices of the model, as loaded sessions. It knows nothing of slots or steps.
 */
import type { LlamaConfig } from '../model/config.js';
import { slicesOf, type LayerSlices, type Range, type RankPlan } from '../model/plan.js';
import { formBytes, weightBytes, type FormVariant, type WeightForms } from '../model/weights.js';
import { Embedding } from './embedding.js';
import {
  attentionGraph,
  attentionInGraph,
  attentionOutGraph,
  ffnGraph,
  headGraph,
  type GraphShape,
} from './graph.js';
import type { ArraySource, Linear } from './linear.js';
import { allocateBytes } from './memory.js';
import type { Session } from './ort.js';
import type { WeightLoader } from './weight-loader.js';

/** A layer's segments, for steps of at most `maxRows` rows. */
export interface LayerSessions {
  readonly maxRows: number;
  readonly attentionIn: Session;
  readonly attentionOut: Session;
  readonly ffn: Session;
}

export class Shard {
  readonly config: LlamaConfig;
  readonly plan: RankPlan;
  readonly embedding: Embedding;
  /** By layer; of each the variants, rising in maxRows. */
  readonly layers: readonly (readonly LayerSessions[])[];
  readonly attention: Session;
  readonly head: Session;
  /** Bytes of weights as held in memory. */
  readonly weightBytes: number;
  /** Bytes of slices that were read to build it. */
  readonly bytesRead: number;
  /** Mapped memory that the weights lie in, or null. */
  readonly memory: { close(): void } | null;

  private constructor(parts: Omit<Shard, 'release' | 'variantFor'>) {
    this.config = parts.config;
    this.plan = parts.plan;
    this.embedding = parts.embedding;
    this.layers = parts.layers;
    this.attention = parts.attention;
    this.head = parts.head;
    this.weightBytes = parts.weightBytes;
    this.bytesRead = parts.bytesRead;
    this.memory = parts.memory;
  }

  /**
   * Reads this rank's slices and builds its sessions, one after the other: beside the final weights only one session's
   * matrices are in memory twice. So those that grow with the model are several sessions when they are large.
   *
   * @param memory what of the loader's weights lies in mapped memory: closed with the shard.
   * @param segmentBytes about how many bytes of the network's feed-forward part, and of the head, one session gets.
   * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the loader is stopped;
   *   DamagedWeights.
   */
  static async load(
    config: LlamaConfig,
    plan: RankPlan,
    forms: WeightForms,
    loader: WeightLoader,
    memory: { close(): void } | null,
    segmentBytes = SEGMENT_BYTES,
  ): Promise<Shard> {
    const sessions: Session[] = [];
    const shape: GraphShape = { config, plan, kernels: loader.kernels };
    const open: Open = (graph, ...matrices) => {
      const session = loader.open(graph, matrices);
      sessions.push(session);
      return session;
    };
    try {
      const slices = slicesOf(config, plan);
      const { vocab } = plan;
      const norm = await loader.vector(slices.norm);
      const { built: embedding, keep } = await loader.hold('embedding', fresh, (arrays) => {
        return new Embedding(forms.embedding, vocab.count, config.hiddenSize, arrays);
      });
      const isTied = slices.head === slices.embedding;
      if (!isTied) await loader.fill([slices.embedding], embedding);
      const layers: LayerSessions[][] = [];
      const settled: (readonly FormVariant[])[] = [];
      for (const layer of slices.layers) {
        const variants = await loader.settle(forms.variants, layer);
        settled.push(variants);
        layers.push(await loadLayer(shape, layer, variants, loader, open, segmentBytes));
      }
      const headBytes = formBytes(forms.head, vocab.count, config.hiddenSize);
      const heads: Session[] = [];
      for (const part of partsOf(vocab, Math.ceil(headBytes / segmentBytes), VOCAB_GRID)) {
        const own = within(slices.head.rows, part);
        const slice = { ...slices.head, rows: own };
        const [head] = await loader.matrixHeard([forms.head], [slice], (rows, first, count) => {
          // A tied head is read once, with the embedding.
          if (isTied) embedding.write(rows, part.start + first, count);
        });
        heads.push(open(headGraph(shape, { norm, head: head! }, part), head!));
      }
      keep();
      const [head, ...moreHeads] = heads;
      return new Shard({
        config,
        plan,
        embedding,
        layers,
        attention: open(attentionGraph(shape)),
        head: head!.followedBy(moreHeads),
        weightBytes: weightBytes(config, plan, forms, settled),
        bytesRead: loader.bytesRead,
        memory,
      });
    } catch (error) {
      for (const session of sessions) session.release();
      throw error;
    }
  }

  /** Which of a layer's variants takes a step of this many rows. */
  variantFor(rowCount: number): number {
    return this.layers[0]!.findIndex(({ maxRows }) => rowCount <= maxRows);
  }

  release(): void {
    for (const { attentionIn, attentionOut, ffn } of this.layers.flat()) {
      attentionIn.release();
      attentionOut.release();
      ffn.release();
    }
    this.attention.release();
    this.head.release();
    this.memory?.close();
  }
}

/** Memory that no other matrix will use. */
const fresh: ArraySource = { take: allocateBytes };

type Open = (graph: Parameters<WeightLoader['open']>[0], ...matrices: Linear[]) => Session;

/** Beyond it a layer's feed-forward network, or the head, is cut into several sessions. */
const SEGMENT_BYTES = 128 << 20;
/** Where they are cut: on blocks of every storage format, so that none is read twice. */
const FFN_GRID = 256;
const VOCAB_GRID = 64;

const within = ({ start }: Range, part: Range): Range => ({
  start: start + part.start,
  count: part.count,
});

/** Cuts a range into about `count` parts of about the same size, on multiples of `grid`; they start at 0. */
export function partsOf(range: Range, count: number, grid: number): Range[] {
  const end = range.start + range.count;
  const width = Math.ceil(range.count / Math.max(1, count) / grid) * grid;
  const parts: Range[] = [];
  for (let start = range.start; start < end;) {
    const next = Math.min(end, Math.floor((start + width) / grid) * grid);
    parts.push({ start: start - range.start, count: next - start });
    start = next;
  }
  return parts;
}

/** Every matrix is read once, into the forms of all variants. */
async function loadLayer(
  shape: GraphShape,
  slices: LayerSlices,
  variants: readonly FormVariant[],
  loader: WeightLoader,
  open: Open,
  segmentBytes: number,
): Promise<LayerSessions[]> {
  const { config, plan } = shape;
  const formsOf = (matrix: 'qkv' | 'o' | 'gateUp' | 'down') => variants.map((v) => v[matrix]);
  const attentionNorm = await loader.vector(slices.attentionNorm);
  const qkv = await loader.matrix(formsOf('qkv'), slices.q, slices.k, slices.v);
  const attentionIn = qkv.map((matrix) =>
    open(attentionInGraph(shape, { norm: attentionNorm, qkv: matrix }), matrix),
  );
  const o = await loader.matrix(formsOf('o'), slices.o);
  const attentionOut = o.map((matrix) => open(attentionOutGraph(shape, matrix), matrix));
  const norm = await loader.vector(slices.ffnNorm);
  const ffnBytes = variants.reduce(
    (sum, v) =>
      sum +
      formBytes(v.gateUp, 2 * plan.ffn.count, config.hiddenSize) +
      formBytes(v.down, config.hiddenSize, plan.ffn.count),
    0,
  );
  const ffn: Session[][] = variants.map(() => []);
  for (const part of partsOf(plan.ffn, Math.ceil(ffnBytes / segmentBytes), FFN_GRID)) {
    const { gate, up, down } = slices;
    const gateUp = await loader.matrix(
      formsOf('gateUp'),
      { ...gate, rows: within(gate.rows, part) },
      { ...up, rows: within(up.rows, part) },
    );
    const columns = within(down.columns, part);
    const downs = await loader.matrix(formsOf('down'), { ...down, columns });
    ffn.forEach((sessions, i) => {
      const weights = { norm, gateUp: gateUp[i]!, down: downs[i]! };
      const graph = ffnGraph(shape, weights, sessions.length > 0);
      sessions.push(open(graph, weights.gateUp, weights.down));
    });
  }
  return variants.map(({ maxRows }, i) => ({
    maxRows,
    attentionIn: attentionIn[i]!,
    attentionOut: attentionOut[i]!,
    ffn: ffn[i]![0]!.followedBy(ffn[i]!.slice(1)),
  }));
}
