/** What ranks are told of a step: only what changed since the last one. */
import { SampledRows, type Chunk, type Join, type Step } from '../proto/gen/cluster.js';
import { adjustmentOf } from './adjustment.js';
import type { MaskTable } from './mask-table.js';
import { SAMPLED_TOP_K } from './sampler.js';
import type { StepPlan } from './scheduler.js';
import type { Sequence } from './sequence.js';
import type { Prefix } from './slots.js';
import type { TokenMask } from './token-masks.js';

/** What changes before the step's rows are computed. */
export interface StepChanges {
  readonly joins: readonly Join[];
  /** Slots whose drafts did not hold, and the positions that did. */
  readonly rewinds: readonly { readonly slot: number; readonly fed: number }[];
}

/** A sequence that begins, with what it keeps of its slot or copies from another. */
export function joinOf({ slot, spec, tokens }: Sequence, { length, copiedFrom }: Prefix): Join {
  const adjustment = adjustmentOf(spec.request);
  const keptTokens = adjustment === undefined ? [] : tokens.slice(0, length);
  return {
    slot,
    temperature: spec.request.sampling.temperature,
    adjustment,
    reportsRaw: spec.reportsLogprobs === true,
    kept:
      length === 0
        ? undefined
        : { length, copiedFrom: copiedFrom ?? undefined, tokens: keptTokens },
  };
}

export function stepMessage(
  number: number,
  { decodes, drafts, chunks }: StepPlan<Sequence>,
  { joins, rewinds }: StepChanges,
  masks: MaskTable,
): Step {
  const sequences = [...decodes, ...drafts, ...chunks.map(({ sequence }) => sequence)];
  const isSampling = sequences.some(({ spec }) => spec.request.sampling.temperature > 0);
  const draftChunks = drafts.map(({ slot, decodeToken, draft }): Chunk => {
    const sampledRows = SampledRows.SAMPLED_ROWS_ALL;
    return { slot, tokens: [decodeToken, ...draft], sampledRows, targets: [] };
  });
  const promptChunks = chunks.map(({ sequence, count }): Chunk => {
    const targets = sequence.promptTargets(count);
    return {
      slot: sequence.slot,
      tokens: sequence.nextTokens(count),
      sampledRows:
        targets.length > 0
          ? SampledRows.SAMPLED_ROWS_ALL
          : sequence.isSampledAfter(count)
            ? SampledRows.SAMPLED_ROWS_LAST
            : SampledRows.SAMPLED_ROWS_NONE,
      targets,
    };
  });
  // One of each sampled row, in their order.
  const rowMasks: (TokenMask | null)[] = [
    ...decodes.map((sequence) => (sequence.isSampledAfter(1) ? sequence.mask : null)),
    ...drafts.flatMap(({ draft, draftMasks }) =>
      [null, ...draft].map((_, row) => draftMasks[row] ?? null),
    ),
    ...chunks.flatMap(({ sequence, count }, i) => {
      const { sampledRows, tokens } = promptChunks[i]!;
      if (sampledRows === SampledRows.SAMPLED_ROWS_NONE) return [];
      const last = sequence.isSampledAfter(count) ? sequence.mask : null;
      if (sampledRows === SampledRows.SAMPLED_ROWS_LAST) return [last];
      return tokens.map((_, at) => (at === count - 1 ? last : null));
    }),
  ];
  return {
    number,
    joins: [...joins],
    rewinds:
      rewinds.length === 0
        ? undefined
        : {
            slots: rewinds.map(({ slot }) => slot),
            lengths: rewinds.map(({ fed }) => fed),
          },
    decodeSlots: decodes.map(({ slot }) => slot),
    decodeTokens: decodes.map(({ decodeToken }) => decodeToken),
    chunks: [...draftChunks, ...promptChunks],
    topK: isSampling ? SAMPLED_TOP_K : 1,
    masking: masks.masking(rowMasks.flatMap((mask, row) => (mask === null ? [] : [{ row, mask }]))),
    rawTopK: Math.max(...sequences.map(({ topLogprobCount }) => topLogprobCount)),
  };
}
