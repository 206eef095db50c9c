/**
 * How weights are held in memory. Arithmetic only: coordinator and ranks come to the same answer.
 *
 *   fp32   4 bytes a weight
 *   fp16   2 bytes a weight, on GPUs
 *   int8   signed, one scale an output; activations are scaled row by row. On CUDA unsigned, in blocks as int4
 *   int4   blocks along the inputs, each with a scale
 *
 * `int4+int8` holds both: int4 is faster for few rows, where memory is the limit, int8 for many, where arithmetic
 * is. Blocks lie on the whole tensor's grid, and ranks are cut on it, so that a weight has the same value at every
 * tp. (A scale of int8 on CPUs covers what a rank holds of an output: finer than the whole where inputs are cut.)
 */
import { KvForm, Weights } from '../proto/gen/cluster.js';
import type { LlamaConfig } from './config.js';
import type { DeviceKind } from './device-name.js';
import { cut, listSlices, planRanks, slicesOf, type RankPlan } from './plan.js';

export const weightsModes = ['fp32', 'fp16', 'int8', 'int4', 'int4+int8'] as const;
export type WeightsMode = (typeof weightsModes)[number];

/** What each device has kernels for. */
export const modesOfDevice: Readonly<Record<DeviceKind, readonly WeightsMode[]>> = {
  cpu: ['fp32', 'int8', 'int4', 'int4+int8'],
  webgpu: ['fp32', 'fp16', 'int4'],
  cuda: ['fp32', 'fp16', 'int8', 'int4'],
};

/** How keys and values are held: as floats, or in 8 bits. */
export const kvModes = ['auto', 'int8'] as const;
export type KvMode = (typeof kvModes)[number];

/** On the wire. */
export const kvCodes = {
  auto: KvForm.KV_FORM_UNSPECIFIED,
  int8: KvForm.KV_FORM_INT8,
} as const satisfies Record<KvMode, KvForm>;

/** Bytes of a key's or value's element. CUDA's attention knows no other than 16-bit floats. */
export function kvElementBytes(device: DeviceKind, mode: WeightsMode, kv: KvMode): 1 | 2 | 4 {
  if (kv === 'int8') return 1;
  return device === 'cuda' || (device === 'webgpu' && mode === 'fp16') ? 2 : 4;
}

/** On the wire. */
export const weightsCodes = {
  fp32: Weights.WEIGHTS_FP32,
  fp16: Weights.WEIGHTS_FP16,
  int8: Weights.WEIGHTS_INT8,
  int4: Weights.WEIGHTS_INT4,
  'int4+int8': Weights.WEIGHTS_INT4_INT8,
} as const satisfies Record<WeightsMode, Weights>;

export type WeightForm =
  | { readonly kind: 'fp32' }
  | { readonly kind: 'fp16' }
  | { readonly kind: 'int8' }
  /** Blocks along the inputs, each around 128 with a scale of 16 bits, as GPUs take them. */
  | { readonly kind: 'int8Blocks'; readonly block: number }
  | {
      readonly kind: 'int4';
      readonly block: number;
      /** Larger ones, the largest first: a tensor takes the first that its weights stand (`BLOCK_RULE`), else `block`. */
      readonly coarser?: readonly number[];
      /** 8 stands for zero in every block, and scales have 16 bits: CUDA's quick products know no other. */
      readonly isCentred?: true;
    };

/** The forms of a layer's matrices, for steps of at most `maxRows` rows. */
export interface FormVariant {
  readonly maxRows: number;
  readonly qkv: WeightForm;
  readonly o: WeightForm;
  readonly gateUp: WeightForm;
  readonly down: WeightForm;
}

export interface WeightForms {
  /** Rising in maxRows; the last takes any number. */
  readonly variants: readonly FormVariant[];
  readonly embedding: WeightForm;
  readonly head: WeightForm;
  /** The feed-forward network is cut on multiples of this. */
  readonly ffnGrid: number;
}

/** From the fastest; the runtime takes no smaller one that would be worth it. */
const BLOCKS = [128, 64, 32] as const;
/** Narrower models have no weights to spare: blocks larger than 32 double what they lose, though no tensor shows it. */
const WIDE_HIDDEN_SIZE = 2048;
/**
 * A tensor takes a larger block where what rounding changes (root mean square) is at most `mostError` of its weights
 * (root mean square), in `sampleRows` rows from all over each of the whole tensors that it is made of: every rank, at
 * every tp, comes to the same. Normally distributed weights lose 0.10 in blocks of 128, 0.09 of 64 and 0.08 of 32.
 */
export const BLOCK_RULE = { mostError: 0.12, sampleRows: 16 } as const;
/**
 * With this block a row's result does not depend on how many rows there are. With 32 it does on x86 that has AVX2 alone: a
 * lone row takes another kernel.
 */
const EXACT_BLOCK = 16;
/** How much larger than the mean the largest rank may be because it was cut on a grid. */
const MAX_IMBALANCE = 1.05;
/** From this many rows on, int8 is faster than int4. */
const FEW_ROWS = 3;

/** @param isExact int4 then takes blocks of 16. */
export function weightForms(
  config: LlamaConfig,
  tp: number,
  mode: WeightsMode,
  isExact: boolean,
  device: DeviceKind = 'cpu',
): WeightForms {
  if (device !== 'cpu') return gpuForms(config, tp, mode, device);
  const ofWidth = BLOCKS.filter((block) => config.hiddenSize >= WIDE_HIDDEN_SIZE || block <= 32);
  const blocks: readonly number[] = isExact ? [EXACT_BLOCK] : ofWidth;
  const int8 = { kind: 'int8' } as const;
  const int4 = (largest: number | undefined): WeightForm => {
    if (largest === undefined) return int8;
    const coarser = blocks.slice(blocks.indexOf(largest));
    const block = coarser.pop()!;
    return coarser.length === 0 ? { kind: 'int4', block } : { kind: 'int4', block, coarser };
  };
  const dividing = (width: number) => blocks.find((block) => width % block === 0);
  const ffnBlock = blocks.find((block) => isEven(config.ffnSize, tp, block));
  const all = (form: WeightForm, maxRows = Infinity): FormVariant => ({
    maxRows,
    qkv: form,
    o: form,
    gateUp: form,
    down: form,
  });
  const fourBits = (maxRows: number): FormVariant => ({
    maxRows,
    qkv: int4(dividing(config.hiddenSize)),
    // Ranks are cut between heads.
    o: int4(dividing(config.headSize)),
    gateUp: int4(dividing(config.hiddenSize)),
    down: int4(ffnBlock),
  });
  switch (mode) {
    case 'fp16':
    case 'fp32': {
      const fp32 = { kind: 'fp32' } as const;
      return { variants: [all(fp32)], embedding: fp32, head: fp32, ffnGrid: 1 };
    }
    case 'int8':
      return { variants: [all(int8)], embedding: int8, head: int8, ffnGrid: 1 };
    case 'int4':
      return {
        variants: [fourBits(Infinity)],
        embedding: int8,
        head: int8,
        ffnGrid: ffnBlock ?? 1,
      };
    case 'int4+int8':
      return {
        variants: [fourBits(FEW_ROWS), all(int8)],
        embedding: int8,
        head: int8,
        ffnGrid: ffnBlock ?? 1,
      };
  }
}

/** CUDA's quick products take blocks of 32, around 8 or 128; smaller matrices are not worth it. */
const GPU_BLOCK = 32;
/**
 * Of inputs and outputs they want multiples of this. Others have ways that need a whole matrix in 16 bits beside it, once a
 * layer: matrices that are not on this grid are held in 16 bits.
 */
const CUDA_GRID = 64;

/** One variant for any number of rows. */
function gpuForms(
  config: LlamaConfig,
  tp: number,
  mode: WeightsMode,
  device: 'webgpu' | 'cuda',
): WeightForms {
  const fp32 = { kind: 'fp32' } as const;
  const fp16 = { kind: 'fp16' } as const;
  const isRounded = mode === 'int4' || mode === 'int8';
  const isHalf = mode === 'fp16' || (isRounded && device === 'cuda');
  const dense = isHalf ? fp16 : fp32;
  const rounded = (fits: boolean): WeightForm => {
    if (!isRounded || !fits) return dense;
    if (mode === 'int8') return { kind: 'int8Blocks', block: GPU_BLOCK };
    return { kind: 'int4', block: GPU_BLOCK, ...(isHalf ? { isCentred: true } : {}) };
  };
  const isCuda = device === 'cuda';
  const grid = isCuda ? CUDA_GRID : GPU_BLOCK;
  const isFfnEven = isEven(config.ffnSize, tp, grid);
  const isWide = config.hiddenSize % grid === 0;
  const isQkvEven = planRanks(config, tp).every(
    ({ queryHeads, kvHeads }) =>
      ((queryHeads.count + 2 * kvHeads.count) * config.headSize) % grid === 0,
  );
  const variant = {
    maxRows: Infinity,
    qkv: rounded(isWide && (!isCuda || isQkvEven)),
    o: rounded(config.headSize % grid === 0 && (!isCuda || isWide)),
    gateUp: rounded(isWide && (!isCuda || isFfnEven)),
    down: rounded(isFfnEven && (!isCuda || isWide)),
  };
  return {
    variants: [variant],
    embedding: dense,
    head: dense,
    ffnGrid: isRounded && isFfnEven ? grid : 1,
  };
}

/** Whether the network's columns, cut on a grid, are shared evenly enough. */
function isEven(ffnSize: number, tp: number, block: number): boolean {
  if (ffnSize % block !== 0 || ffnSize / block < tp) return false;
  return cut(ffnSize / block, tp, 0).count * block <= (MAX_IMBALANCE * ffnSize) / tp;
}

/** Bytes of a matrix (outputs, inputs) in a form, scales included; with a choice of blocks, at most. */
export function formBytes(form: WeightForm, outputs: number, inputs: number): number {
  switch (form.kind) {
    case 'fp32':
      return 4 * outputs * inputs;
    case 'fp16':
      return 2 * outputs * inputs;
    case 'int8':
      return outputs * inputs + 4 * outputs;
    case 'int8Blocks':
      return outputs * (inputs + 2 * Math.ceil(inputs / form.block));
    case 'int4': {
      const blockCount = Math.ceil(inputs / form.block);
      const besideWeights = form.isCentred === true ? 2 * blockCount : 4.5 * blockCount;
      return outputs * (blockCount * (form.block / 2) + Math.ceil(besideWeights));
    }
  }
}

/**
 * Bytes of one rank's weights.
 *
 * @param layers the forms of every layer, as a rank has settled them; if left out, where there is a choice of blocks, it
 *   is the most that can come of it.
 */
export function weightBytes(
  config: LlamaConfig,
  plan: RankPlan,
  forms: WeightForms,
  layers?: readonly (readonly FormVariant[])[],
): number {
  const slices = slicesOf(config, plan);
  const bytes = (
    form: WeightForm,
    ...parts: { rows: { count: number }; columns: { count: number } }[]
  ) =>
    formBytes(
      form,
      parts.reduce((sum, part) => sum + part.rows.count, 0),
      parts[0]!.columns.count,
    );
  const vectors = listSlices(slices).filter(({ shape }) => shape.length === 1);
  let sum = 4 * vectors.reduce((total, { columns }) => total + columns.count, 0);
  sum += bytes(forms.embedding, slices.embedding) + bytes(forms.head, slices.head);
  for (const [i, layer] of slices.layers.entries()) {
    for (const form of layers?.[i] ?? forms.variants) {
      sum += bytes(form.qkv, layer.q, layer.k, layer.v) + bytes(form.o, layer.o);
      sum += bytes(form.gateUp, layer.gate, layer.up) + bytes(form.down, layer.down);
    }
  }
  return sum;
}

/** Whether a matrix is part of a graph of its layer's own, on CUDA. */
export const isFixed = (form: WeightForm): boolean =>
  form.kind === 'int8Blocks' || (form.kind === 'int4' && form.isCentred === true);

export const hasFixedWeights = ({ variants }: WeightForms): boolean =>
  variants.some(({ qkv, o, gateUp, down }) => [qkv, o, gateUp, down].some(isFixed));

/** What a GPU leaves to the graphs that all layers share: products' own memory, and what the runtime keeps. */
const SHARED_GRAPH_BYTES = 768 * 2 ** 20;
/** What a layer's own three take beside its weights: 12 to 15 MB each on an H200. */
const LAYER_GRAPH_BYTES = 3 * 15 * 2 ** 20;

/** Bytes of a GPU that a rank's graphs take, beside weights and KV; none that is worth counting on CPUs. */
export function graphBytes(config: LlamaConfig, forms: WeightForms, device: DeviceKind): number {
  if (device === 'cpu') return 0;
  return SHARED_GRAPH_BYTES + (hasFixedWeights(forms) ? config.layerCount * LAYER_GRAPH_BYTES : 0);
}
