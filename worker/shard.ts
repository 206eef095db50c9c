/**
 * A shard: one rank's slices of the model, as loaded sessions. It knows nothing of slots or steps.
 */
import type { LlamaConfig } from '../model/config.js';
import { slicesOf, type LayerSlices, type RankPlan } from '../model/plan.js';
import { weightBytes, type FormVariant, type WeightForms } from '../model/weights.js';
import { Embedding } from './embedding.js';
import {
  attentionGraph,
  attentionInGraph,
  attentionOutGraph,
  ffnGraph,
  headGraph,
  type GraphShape,
} from './graph.js';
import { linearWriter, type ArraySource, type Linear } from './linear.js';
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
   * Reads this rank's slices and builds its sessions, a layer at a time: beside the final weights only one
   * layer's matrices are in memory twice.
   *
   * @param memory what of the loader's weights lies in mapped memory: closed with the shard.
   * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the loader is stopped;
   *   DamagedWeights.
   */
  static async load(
    config: LlamaConfig,
    plan: RankPlan,
    forms: WeightForms,
    loader: WeightLoader,
    memory: { close(): void } | null,
  ): Promise<Shard> {
    const sessions: Session[] = [];
    const shape: GraphShape = { config, plan };
    const open: Open = (graph, ...matrices) => {
      const session = loader.open(graph, matrices);
      sessions.push(session);
      return session;
    };
    try {
      const slices = slicesOf(config, plan);
      const { vocab } = plan;
      const isTied = slices.head === slices.embedding;
      // A tied head is read once, with the embedding.
      const first = await loader.rows([slices.embedding], fresh, (arrays) => {
        const embedding = new Embedding(forms.embedding, vocab.count, config.hiddenSize, arrays);
        const head = isTied
          ? linearWriter(forms.head, vocab.count, config.hiddenSize, arrays)
          : null;
        return {
          embedding,
          head: head?.linear,
          write: (rows, row, count) => {
            embedding.write(rows, row, count);
            head?.write(rows, row, count);
          },
        };
      });
      const layers: LayerSessions[][] = [];
      for (const layer of slices.layers) {
        layers.push(await loadLayer(shape, layer, forms.variants, loader, open));
      }
      const norm = await loader.vector(slices.norm);
      const head = first.head ?? (await loader.matrix([forms.head], slices.head))[0]!;
      return new Shard({
        config,
        plan,
        embedding: first.embedding,
        layers,
        attention: open(attentionGraph(shape)),
        head: open(headGraph(shape, { norm, head }), head),
        weightBytes: weightBytes(config, plan, forms),
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

/** Every matrix is read once, into the forms of all variants. */
async function loadLayer(
  shape: GraphShape,
  slices: LayerSlices,
  variants: readonly FormVariant[],
  loader: WeightLoader,
  open: Open,
): Promise<LayerSessions[]> {
  const formsOf = (matrix: 'qkv' | 'o' | 'gateUp' | 'down') => variants.map((v) => v[matrix]);
  const attentionNorm = await loader.vector(slices.attentionNorm);
  const qkv = await loader.matrix(formsOf('qkv'), slices.q, slices.k, slices.v);
  const attentionIn = qkv.map((matrix) =>
    open(attentionInGraph(shape, { norm: attentionNorm, qkv: matrix }), matrix),
  );
  const o = await loader.matrix(formsOf('o'), slices.o);
  const attentionOut = o.map((matrix) => open(attentionOutGraph(shape, matrix), matrix));
  const ffnNorm = await loader.vector(slices.ffnNorm);
  const gateUp = await loader.matrix(formsOf('gateUp'), slices.gate, slices.up);
  const down = await loader.matrix(formsOf('down'), slices.down);
  return variants.map(({ maxRows }, i) => ({
    maxRows,
    attentionIn: attentionIn[i]!,
    attentionOut: attentionOut[i]!,
    ffn: open(
      ffnGraph(shape, { norm: ffnNorm, gateUp: gateUp[i]!, down: down[i]! }),
      gateUp[i]!,
      down[i]!,
    ),
  }));
}
