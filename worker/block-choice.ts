/**
 * The block of a matrix of 4 bits where its shape allows several: the largest that its weights stand, by a sample of the
 * whole tensors that it is made of. So every rank comes to it alone, whatever part of them it holds.
 */
import type { LayerSlices, TensorSlice } from '../model/plan.js';
import { BLOCK_RULE, type FormVariant, type WeightForm } from '../model/weights.js';
import type { Quantizer } from './quantizer.js';

/** The matrices of a layer, and the tensors whose rows each has. */
const tensorsOf = {
  qkv: ['q', 'k', 'v'],
  o: ['o'],
  gateUp: ['gate', 'up'],
  down: ['down'],
} as const satisfies Record<Exclude<keyof FormVariant, 'maxRows'>, readonly (keyof LayerSlices)[]>;
const matrices = ['qkv', 'o', 'gateUp', 'down'] as const;

/** A matrix whose block is to be chosen, in one of the variants. */
export interface OpenChoice {
  readonly variant: number;
  readonly matrix: keyof typeof tensorsOf;
  readonly form: WeightForm & { kind: 'int4' };
}

/** In the order of the variants, and of the network. */
export function openChoices(variants: readonly FormVariant[]): OpenChoice[] {
  return variants.flatMap((forms, variant) =>
    matrices.flatMap((matrix) => {
      const form = forms[matrix];
      return form.kind === 'int4' && form.coarser !== undefined ? [{ variant, matrix, form }] : [];
    }),
  );
}

/** The variants with a block for every choice. */
export const withBlocks = (
  variants: readonly FormVariant[],
  choices: readonly OpenChoice[],
  blocks: ArrayLike<number>,
): FormVariant[] =>
  variants.map((forms, variant) => {
    const settled = choices.flatMap((choice, i) =>
      choice.variant === variant ? [[choice.matrix, { kind: 'int4', block: blocks[i]! }]] : [],
    );
    return { ...forms, ...(Object.fromEntries(settled) as Partial<FormVariant>) };
  });

/**
 * @param layer any rank's slices of the layer.
 * @param read as `SliceReader.read`.
 * @throws what `read` does.
 */
export async function chooseBlock(
  { matrix, form }: OpenChoice,
  layer: LayerSlices,
  read: (slice: TensorSlice, target: Float32Array, index: number) => Promise<void>,
  quantizer: Quantizer,
): Promise<number> {
  const rows = tensorsOf[matrix].flatMap((name) => sampleOf(layer[name]));
  const width = rows[0]!.columns.count;
  const sample = new Float32Array(rows.length * width);
  for (const [i, row] of rows.entries()) await read(row, sample, i * width);
  const fits = (block: number): boolean => quantizer.errorOf(sample, block) <= BLOCK_RULE.mostError;
  return form.coarser?.find(fits) ?? form.block;
}

/** Whole rows from all over a tensor, of which the slice is a part. */
function sampleOf(slice: TensorSlice): TensorSlice[] {
  const [rowCount, columnCount] = slice.shape as [number, number];
  const count = Math.min(rowCount, BLOCK_RULE.sampleRows);
  const columns = { start: 0, count: columnCount };
  return Array.from({ length: count }, (_, i) => {
    const start = Math.floor(((i + 0.5) * rowCount) / count);
    return { ...slice, rows: { start, count: 1 }, columns };
  });
}
