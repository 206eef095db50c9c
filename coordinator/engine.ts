/**
 * An engine: the loop that turns sequences into steps of its group of ranks.
 */
import type { CaravanError } from '../proto/errors.js';
import type { FinishReason, Request } from './request.js';

/** One generation to run. A job with n sequences adds n of these. */
export interface SequenceSpec {
  /** Names the sequence in logs. */
  readonly id: string;
  readonly request: Request;
  /** Number of the sequence within its job; part of every coin. */
  readonly index: number;
  /** Tokens that an earlier take generated: kept, never drawn again. */
  readonly resumeTokenIds: readonly number[];
}

/** Hears of a sequence, synchronously and in order; must return at once and never throw. */
export interface SequenceSink {
  /** One more token, and the text that it releases (may be empty). Not called for resumed tokens. */
  token(tokenId: number, text: string): void;
  /** The sequence ended by itself; `text` was held back until now. The last call. */
  end(finishReason: FinishReason, text: string): void;
  /** The engine could not go on with it. The last call. */
  fail(error: CaravanError): void;
}

export interface SequenceHandle {
  /** Leaves the engine within two steps; the sink hears nothing more. Idempotent. */
  cancel(): void;
}

export interface Engine {
  /** Slots that no sequence holds. */
  readonly freeSlotCount: number;
  /**
   * Starts a sequence.
   * @throws CaravanError `internal` when no slot is free.
   */
  add(spec: SequenceSpec, sink: SequenceSink): SequenceHandle;
  /** Runs until the signal aborts or a rank fails; every sequence's sink hears `fail` then. */
  run(signal: AbortSignal): Promise<void>;
}
