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
   * @returns milliseconds that were spent waiting for peers.
   * @throws CaravanError `rank_failed` when a peer is lost: then the rank's sequences are in doubt.
   */
  compute(layout: StepLayout): Promise<number>;
  /** (vocab.count) raw logits of a sampled row of the last step, until the next one. */
  logits(row: number): Float32Array<ArrayBuffer>;
}
