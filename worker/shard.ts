/**
 * A shard: one rank's slices of the model, as loaded sessions. It knows nothing of slots or steps.
 */
import type { Checkpoint } from '../model/checkpoint.js';
import type { LlamaConfig } from '../model/config.js';
import {
  listSlices,
  slicesOf,
  type LayerSlices,
  type RankPlan,
  type TensorSlice,
} from '../model/plan.js';
import { SliceReader } from '../model/slice-reader.js';
import { CaravanError } from '../proto/errors.js';
import {
  attentionGraph,
  attentionInGraph,
  attentionOutGraph,
  ffnGraph,
  headGraph,
  type Graph,
  type GraphShape,
  type Matrix,
} from './graph.js';
import type { Ort, Session } from './ort.js';

export interface LayerSessions {
  readonly attentionIn: Session;
  readonly attentionOut: Session;
  readonly ffn: Session;
}

export class Shard {
  readonly config: LlamaConfig;
  readonly plan: RankPlan;
  /** (vocab.count, hidden): this rank's rows of the token embedding. */
  readonly embedding: Float32Array;
  readonly layers: readonly LayerSessions[];
  readonly attention: Session;
  readonly head: Session;
  /** Bytes of weights as held in memory. */
  readonly weightBytes: number;
  /** Bytes of slices that were read to build it. */
  readonly bytesRead: number;

  private constructor(parts: Omit<Shard, 'release'>) {
    this.config = parts.config;
    this.plan = parts.plan;
    this.embedding = parts.embedding;
    this.layers = parts.layers;
    this.attention = parts.attention;
    this.head = parts.head;
    this.weightBytes = parts.weightBytes;
    this.bytesRead = parts.bytesRead;
  }

  /**
   * Reads this rank's slices and builds its sessions, a segment at a time: beside the final weights
   * only one segment is in memory twice.
   *
   * @param onProgress hears of the bytes read so far and in all.
   * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the signal aborts.
   */
  static async load(
    ort: Ort,
    checkpoint: Checkpoint,
    plan: RankPlan,
    onProgress: (bytesRead: number) => void,
    signal: AbortSignal,
  ): Promise<Shard> {
    const reader = new SliceReader(checkpoint);
    const { config } = checkpoint;
    const shape: GraphShape = { config, plan };
    const slices = slicesOf(config, plan);
    const sessions: Session[] = [];
    try {
      const read = async (...parts: TensorSlice[]): Promise<Matrix> => {
        const outputs = parts.reduce((sum, part) => sum + part.rows.count, 0);
        const inputs = parts[0]!.columns.count;
        const values = allocate(outputs * inputs);
        let index = 0;
        for (const part of parts) {
          if (signal.aborted) throw new CaravanError('cancelled', 'loading was cancelled');
          await reader.read(part, values, index);
          index += part.rows.count * part.columns.count;
        }
        onProgress(reader.bytesRead);
        return { values, outputs, inputs };
      };
      const open = (graph: Graph): Session => {
        const session = ort.createSession(graph.model, graph.inputs, graph.outputs);
        sessions.push(session);
        return session;
      };
      const embedding = await read(slices.embedding);
      const layers: LayerSessions[] = [];
      for (const layer of slices.layers) layers.push(await loadLayer(shape, layer, read, open));
      const norm = (await read(slices.norm)).values;
      const head = slices.head === slices.embedding ? embedding : await read(slices.head);
      const parameterCount = listSlices(slices).reduce(
        (sum, slice) => sum + slice.rows.count * slice.columns.count,
        slices.head === slices.embedding ? head.values.length : 0,
      );
      return new Shard({
        config,
        plan,
        embedding: embedding.values,
        layers,
        attention: open(attentionGraph(shape)),
        head: open(headGraph(shape, { norm, head })),
        weightBytes: 4 * parameterCount,
        bytesRead: reader.bytesRead,
      });
    } catch (error) {
      for (const session of sessions) session.release();
      throw error;
    } finally {
      reader.close();
    }
  }

  release(): void {
    for (const layer of this.layers) {
      for (const session of Object.values(layer) as Session[]) session.release();
    }
    this.attention.release();
    this.head.release();
  }
}

async function loadLayer(
  shape: GraphShape,
  slices: LayerSlices,
  read: (...parts: TensorSlice[]) => Promise<Matrix>,
  open: (graph: Graph) => Session,
): Promise<LayerSessions> {
  return {
    attentionIn: open(
      attentionInGraph(shape, {
        norm: (await read(slices.attentionNorm)).values,
        qkv: await read(slices.q, slices.k, slices.v),
      }),
    ),
    attentionOut: open(attentionOutGraph(shape, await read(slices.o))),
    ffn: open(
      ffnGraph(shape, {
        norm: (await read(slices.ffnNorm)).values,
        gateUp: await read(slices.gate, slices.up),
        down: await read(slices.down),
      }),
    ),
  };
}

/** Zeroed float32 memory, committed by the operating system when it is first written. */
export function allocate(elementCount: number): Float32Array<ArrayBuffer> {
  try {
    return new Float32Array(new ArrayBuffer(4 * elementCount));
  } catch (cause) {
    throw new CaravanError('out_of_memory', `cannot reserve ${4 * elementCount} bytes`, { cause });
  }
}
