/**
 * The plan: which slice of which tensor each rank holds. Arithmetic only.
 *
 *               rows (outputs)                columns (inputs)
 *   embedding   this rank's vocabulary        all
 *   q, k, v     this rank's heads             all
 *   o           all                           this rank's query heads
 *   gate, up    this rank's FFN columns       all
 *   down        all                           this rank's FFN columns
 *   norms       all
 *   head        this rank's vocabulary        all
 *
 * Up to the number of KV heads, a rank holds whole KV heads with all of their query heads. Above it, a
 * rank holds exactly one KV head and part of its query heads: query heads stay disjoint, KV heads repeat.
 */
import { CaravanError } from '../proto/errors.js';
import type { LlamaConfig } from './config.js';

/** `count` neighbours from `start`. */
export interface Range {
  readonly start: number;
  readonly count: number;
}

export interface RankPlan {
  readonly rank: number;
  readonly tp: number;
  readonly queryHeads: Range;
  readonly kvHeads: Range;
  /** Columns of the feed-forward network. */
  readonly ffn: Range;
  readonly vocab: Range;
}

/** Part of a matrix (or of a vector: then `columns` is the vector and `rows` is 0 to 1). */
export interface TensorSlice {
  /** Name as in Hugging Face's layout: the names that every layout is translated to. */
  readonly tensor: string;
  /** Shape of the whole tensor: [rows, columns], or [columns] for a vector. */
  readonly shape: readonly number[];
  readonly rows: Range;
  readonly columns: Range;
}

/** Every tp that this model can be cut into, rising. */
export function legalTps(config: LlamaConfig): number[] {
  const most = Math.min(config.headCount, config.ffnSize, config.vocabSize);
  return Array.from({ length: most }, (_, i) => i + 1);
}

/**
 * The plan of every rank, in rank order: total and disjoint, except for KV heads that repeat.
 *
 * @param ffnGrid the feed-forward network is cut on multiples of this (`weightForms`), which divides its width.
 * @throws CaravanError `illegal_tp` naming the legal ones.
 */
export function planRanks(config: LlamaConfig, tp: number, ffnGrid = 1): RankPlan[] {
  const most = legalTps(config).length;
  if (!Number.isInteger(tp) || tp < 1 || tp > most) {
    throw new CaravanError(
      'illegal_tp',
      `tp ${tp}: this model has ${config.headCount} query heads, so tp must be a whole number from 1 to ${most}`,
    );
  }
  return Array.from({ length: tp }, (_, rank) => ({
    rank,
    tp,
    ...headsOf(config, tp, rank),
    ffn: onGrid(cut(config.ffnSize / ffnGrid, tp, rank), ffnGrid),
    vocab: cut(config.vocabSize, tp, rank),
  }));
}

/** Part `index` of `total` things cut into `parts`, as evenly as can be; larger parts come first. */
export function cut(total: number, parts: number, index: number): Range {
  const start = Math.ceil((total * index) / parts);
  return { start, count: Math.ceil((total * (index + 1)) / parts) - start };
}

const onGrid = ({ start, count }: Range, grid: number): Range => ({
  start: start * grid,
  count: count * grid,
});

function headsOf(config: LlamaConfig, tp: number, rank: number) {
  const { headCount, kvHeadCount } = config;
  const groupSize = headCount / kvHeadCount;
  if (tp <= kvHeadCount) {
    const kvHeads = cut(kvHeadCount, tp, rank);
    return {
      kvHeads,
      queryHeads: { start: kvHeads.start * groupSize, count: kvHeads.count * groupSize },
    };
  }
  // Ranks are dealt to KV heads as evenly as can be, then a KV head's query heads to its ranks.
  let kvHead = 0;
  let ranks = cut(tp, kvHeadCount, 0);
  while (rank >= ranks.start + ranks.count) ranks = cut(tp, kvHeadCount, (kvHead += 1));
  const part = cut(groupSize, ranks.count, rank - ranks.start);
  return {
    kvHeads: { start: kvHead, count: 1 },
    queryHeads: { start: kvHead * groupSize + part.start, count: part.count },
  };
}

/** Names of a layer's tensors. */
export const layerTensors = (layer: number) => {
  const prefix = `model.layers.${layer}`;
  return {
    attentionNorm: `${prefix}.input_layernorm.weight`,
    q: `${prefix}.self_attn.q_proj.weight`,
    k: `${prefix}.self_attn.k_proj.weight`,
    v: `${prefix}.self_attn.v_proj.weight`,
    o: `${prefix}.self_attn.o_proj.weight`,
    ffnNorm: `${prefix}.post_attention_layernorm.weight`,
    gate: `${prefix}.mlp.gate_proj.weight`,
    up: `${prefix}.mlp.up_proj.weight`,
    down: `${prefix}.mlp.down_proj.weight`,
  };
};

/** One rank's slices of one layer. */
export type LayerSlices = Readonly<Record<keyof ReturnType<typeof layerTensors>, TensorSlice>>;

export interface RankSlices {
  readonly embedding: TensorSlice;
  readonly layers: readonly LayerSlices[];
  readonly norm: TensorSlice;
  /** Equal to `embedding` when the head is tied: read once. */
  readonly head: TensorSlice;
}

export function slicesOf(config: LlamaConfig, plan: RankPlan): RankSlices {
  const { hiddenSize, headSize, headCount, kvHeadCount, ffnSize, vocabSize } = config;
  const all = (count: number): Range => ({ start: 0, count });
  const channels = (heads: Range): Range => ({
    start: heads.start * headSize,
    count: heads.count * headSize,
  });
  const byRows = (tensor: string, total: number, rows: Range): TensorSlice => ({
    tensor,
    shape: [total, hiddenSize],
    rows,
    columns: all(hiddenSize),
  });
  const byColumns = (tensor: string, total: number, columns: Range): TensorSlice => ({
    tensor,
    shape: [hiddenSize, total],
    rows: all(hiddenSize),
    columns,
  });
  const vector = (tensor: string): TensorSlice => ({
    tensor,
    shape: [hiddenSize],
    rows: all(1),
    columns: all(hiddenSize),
  });
  const query = channels(plan.queryHeads);
  const keyValue = channels(plan.kvHeads);
  const embedding = byRows('model.embed_tokens.weight', vocabSize, plan.vocab);
  return {
    embedding,
    layers: Array.from({ length: config.layerCount }, (_, layer) => {
      const names = layerTensors(layer);
      return {
        attentionNorm: vector(names.attentionNorm),
        q: byRows(names.q, headCount * headSize, query),
        k: byRows(names.k, kvHeadCount * headSize, keyValue),
        v: byRows(names.v, kvHeadCount * headSize, keyValue),
        o: byColumns(names.o, headCount * headSize, query),
        ffnNorm: vector(names.ffnNorm),
        gate: byRows(names.gate, ffnSize, plan.ffn),
        up: byRows(names.up, ffnSize, plan.ffn),
        down: byColumns(names.down, ffnSize, plan.ffn),
      };
    }),
    norm: vector('model.norm.weight'),
    head: config.isHeadTied ? embedding : byRows('lm_head.weight', vocabSize, plan.vocab),
  };
}

/** Every slice that a rank reads, once each, in the order of the network. */
export function listSlices(slices: RankSlices): TensorSlice[] {
  const head = slices.head === slices.embedding ? [] : [slices.head];
  return [
    slices.embedding,
    ...slices.layers.flatMap((l) => Object.values(l)),
    slices.norm,
    ...head,
  ];
}

/** Bytes of the KV cache of one rank: keys and values of all layers and slots, in float32 if not told otherwise. */
export function kvBytes(
  config: LlamaConfig,
  plan: RankPlan,
  maxSeqLen: number,
  maxBatchSize: number,
  elementBytes = 4,
): number {
  const positions = maxSeqLen * maxBatchSize;
  return 2 * config.layerCount * plan.kvHeads.count * config.headSize * positions * elementBytes;
}
