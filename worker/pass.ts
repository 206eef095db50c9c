/**
 * What computes a step's rows on a rank's device: all layers, and this rank's slice of the head.
 */
import type { LlamaConfig } from '../model/config.js';
import type { StepLayout } from './step-layout.js';

/** The sequences' places in the KV cache. */
export interface Slots {
  readonly count: number;
  readonly maxSeqLen: number;
  /** (count) positions in use. */
  readonly lengths: Int32Array;
}

/** What is to be known of a step's sampled rows beside their logits. */
export interface Wish {
  /** How many of the largest logits of a row, at most vocab.count. */
  readonly k: number;
  /** (sampled rows) temperatures; 0 where no sum of exponentials is needed. */
  readonly temperatures: readonly number[];
}

/** What a step cost beside computing. */
export interface PassFigures {
  /** Milliseconds that were spent waiting for peers, and in copies between host and device. */
  readonly waitMs: number;
  readonly copyMs: number;
  /** Bytes that were copied. */
  readonly bytesToDevice: number;
  readonly bytesToHost: number;
}

/** A sampled row as it is without adjustments. */
export interface RowTop {
  /** log Σ exp(logit / temperature) over the slice; 0 where the temperature is 0. */
  readonly logSumExp: number;
}

export interface Pass {
  readonly config: LlamaConfig;
  /** This rank's slice of the vocabulary. */
  readonly vocab: { readonly start: number; readonly count: number };
  readonly slots: Slots;
  /** Most rows of a step. */
  readonly maxRows: number;
  /**
   * Appends the step's rows to the KV cache and computes the logits of those that are sampled.
   *
   * @throws CaravanError `rank_failed` when a peer is lost: then the rank's sequences are in doubt.
   */
  compute(layout: StepLayout, wish: Wish): Promise<PassFigures>;
  /**
   * Of a sampled row of the last step: writes the ids and values of the k largest raw logits, falling, from index `at`,
   * equal ones by rising id.
   */
  top(row: number, ids: number[], values: number[], at: number): RowTop;
  /** Copies at least a slot's first `count` positions into another slot; null where that cannot be done. */
  readonly copyPositions: ((from: number, to: number, count: number) => void) | null;
  /** (vocab.count) raw logits of a sampled row of the last step, until the next call or step. */
  logits(row: number): Float32Array<ArrayBuffer>;
}
