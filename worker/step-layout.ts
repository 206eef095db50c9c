/**
 * A step as the rank computes it: which rows there are, where they stand, and how attention groups them.
 */
import { CaravanError } from '../proto/errors.js';
import { SampledRows, type Chunk, type Step } from '../proto/gen/cluster.js';

/** Rows that one run of attention takes: `batch` neighbouring slots with `length` rows each. */
export interface AttentionGroup {
  readonly firstRow: number;
  readonly firstSlot: number;
  readonly batch: number;
  readonly length: number;
}

export interface StepLayout {
  readonly rowCount: number;
  /** (rows) */
  readonly tokens: readonly number[];
  /** (rows) */
  readonly positions: readonly number[];
  readonly groups: readonly AttentionGroup[];
  /** Rows whose logits are wanted: decodes first, then chunks. */
  readonly sampledRows: readonly number[];
  /** (sampled rows) slot of each. */
  readonly sampledSlots: readonly number[];
  /** (sampled rows) tokens of the row's slot that stand after it in this step: drafts. */
  readonly laterTokens: readonly (readonly number[])[];
  /** (sampled rows) id whose logit is wanted, or -1. */
  readonly targets: readonly number[];
  /** Whether any chunk has targets; then `targets` counts. */
  readonly hasTargets: boolean;
}

/** What a step may not exceed. `lengths` are the slots' positions in use before the step. */
export interface StepLimits {
  readonly vocabSize: number;
  readonly maxSeqLen: number;
  readonly slotCount: number;
  readonly maxStepRows: number;
  readonly headSize: number;
  readonly lengths: Int32Array;
}

const NONE: readonly number[] = [];

const refuse = (message: string): never => {
  throw new CaravanError('invalid_request', message);
};

/**
 * Checks a step and lays out its rows. Changes nothing.
 *
 * @throws CaravanError `invalid_request` naming slot, rule and value.
 */
export function layOutStep(step: Step, limits: StepLimits): StepLayout {
  const tokens: number[] = [];
  const positions: number[] = [];
  const groups: AttentionGroup[] = [];
  const sampledRows: number[] = [];
  const sampledSlots: number[] = [];
  const laterTokens: (readonly number[])[] = [];
  const targets: number[] = [];
  let hasTargets = false;
  const append = (slot: number, token: number, position: number): void => {
    if (token >= limits.vocabSize) refuse(`token ${token}: the vocabulary has ${limits.vocabSize}`);
    if (position >= limits.maxSeqLen) {
      refuse(`slot ${slot}: position ${position} is past max_seq_len ${limits.maxSeqLen}`);
    }
    tokens.push(token);
    positions.push(position);
  };
  const seen = new Set<number>();
  const claim = (slot: number): void => {
    if (slot >= limits.slotCount) refuse(`slot ${slot}: there are ${limits.slotCount} slots`);
    if (seen.has(slot)) refuse(`slot ${slot}: stands twice in one step`);
    seen.add(slot);
  };
  const sample = (row: number, slot: number, target: number, later: readonly number[]): void => {
    sampledRows.push(row);
    sampledSlots.push(slot);
    laterTokens.push(later);
    targets.push(target);
  };

  if (step.decodeSlots.length !== step.decodeTokens.length) {
    refuse(`${step.decodeSlots.length} decode slots but ${step.decodeTokens.length} tokens`);
  }
  step.decodeSlots.forEach((slot, i) => {
    claim(slot);
    append(slot, step.decodeTokens[i]!, limits.lengths[slot]!);
    sample(i, slot, -1, NONE);
    const last = groups.at(-1);
    if (last !== undefined && last.firstSlot + last.batch === slot) {
      groups[groups.length - 1] = { ...last, batch: last.batch + 1 };
    } else {
      groups.push({ firstRow: i, firstSlot: slot, batch: 1, length: 1 });
    }
  });
  for (const chunk of step.chunks) {
    const { slot } = chunk;
    claim(slot);
    if (chunk.tokens.length === 0) refuse(`slot ${slot}: an empty chunk`);
    const firstRow = tokens.length;
    chunk.tokens.forEach((token, i) => {
      append(slot, token, limits.lengths[slot]! + i);
    });
    for (const { start, count } of attentionRuns(chunk.tokens.length, limits.headSize)) {
      groups.push({ firstRow: firstRow + start, firstSlot: slot, batch: 1, length: count });
    }
    hasTargets ||= chunk.targets.length > 0;
    for (const row of sampledOf(chunk)) {
      // Only drafts are sampled before their chunk's end without a target.
      const later = chunk.targets.length > 0 ? NONE : chunk.tokens.slice(row + 1);
      sample(firstRow + row, slot, chunk.targets[row] ?? -1, later);
    }
  }
  if (tokens.length === 0) refuse('an empty step');
  if (tokens.length > limits.maxStepRows) {
    refuse(`${tokens.length} rows: a step has at most ${limits.maxStepRows}`);
  }
  return {
    rowCount: tokens.length,
    tokens,
    positions,
    groups,
    sampledRows,
    sampledSlots,
    laterTokens,
    targets,
    hasTargets,
  };
}

/**
 * How attention goes over a chunk's rows. ONNX Runtime takes queries in blocks, and a last block of one row
 * by another kernel, whose result differs in the last bits: two rows are split off then, so that a
 * row's result never depends on where its chunk began or ended.
 *
 * The runtime's blocks are min(L2 cache / (32 × headSize), 2 × headSize) rows, a multiple of ours.
 */
function attentionRuns(length: number, headSize: number): { start: number; count: number }[] {
  const block = Math.min(64, 2 * headSize);
  if (length === 1 || length % block !== 1) return [{ start: 0, count: length }];
  return [
    { start: 0, count: length - 2 },
    { start: length - 2, count: 2 },
  ];
}

function sampledOf(chunk: Chunk): number[] {
  switch (chunk.sampledRows) {
    case SampledRows.SAMPLED_ROWS_NONE:
      return [];
    case SampledRows.SAMPLED_ROWS_LAST:
      return [chunk.tokens.length - 1];
    case SampledRows.SAMPLED_ROWS_ALL:
      return chunk.tokens.map((_, i) => i);
    default:
      return refuse(`slot ${chunk.slot}: unknown sampled_rows ${chunk.sampledRows}`);
  }
}
