/**
 * A batch: a file of requests that are answered when there is room, into a file of results.
 *
 *   validating ──> in_progress ──> finalizing ──> completed, or expired
 *       │  │            │
 *       │  └────────────┴──> cancelling ──> cancelled
 *       └──> failed                              what is done by then is kept
 *
 * It is run by whichever gateway holds its lease. Every change of its state carries the fence of that hold
 * and the version that the holder believes in; a lower fence or another version changes nothing.
 */

export type BatchStatus =
  | 'validating'
  | 'in_progress'
  | 'finalizing'
  | 'completed'
  | 'failed'
  | 'expired'
  | 'cancelling'
  | 'cancelled';

/** Nothing follows them. */
export const isEnded = (status: BatchStatus): boolean =>
  status === 'completed' || status === 'failed' || status === 'expired' || status === 'cancelled';

/** What a client asked for, checked; it never changes. */
export interface BatchOrder {
  readonly version: 1;
  readonly id: string;
  readonly inputFileId: string;
  /** A path of openai-endpoints, which all lines name. */
  readonly endpoint: string;
  /** As the client wrote it: `24h`. */
  readonly window: string;
  readonly createdMs: number;
  /** Unix time in milliseconds at which the window ends. */
  readonly expiresMs: number;
  readonly metadata: Readonly<Record<string, string>> | null;
  /** How long the files of results are kept, in seconds. */
  readonly resultsKeptS: number;
  /** Whose it and its files are; left out where tenants were not kept apart. */
  readonly tenant?: string;
}

/** Moments of a batch's life, in Unix seconds; those that have not come are absent. */
export type BatchMoment =
  'inProgress' | 'finalizing' | 'completed' | 'failed' | 'expired' | 'cancelling' | 'cancelled';

/** Something wrong with the input file. */
export interface BatchFault {
  readonly code: string;
  readonly message: string;
  readonly param: string | null;
  /** Line of the input file, from 1; null where it is the file itself. */
  readonly line: number | null;
}

/** What lines came to, in numbers. `failed` are the lines of the error file. */
export interface BatchTally {
  readonly completed: number;
  readonly failed: number;
  readonly inputTokens: number;
  readonly outputTokens: number;
}

export interface BatchState extends BatchTally {
  readonly order: BatchOrder;
  readonly status: BatchStatus;
  readonly moments: Readonly<Partial<Record<BatchMoment, number>>>;
  /** Lines of the input file; 0 until it has been read. */
  readonly total: number;
  /** The one model of all lines, or null. */
  readonly model: string | null;
  readonly faults: readonly BatchFault[];
  /** What it becomes when its files are written. */
  readonly outcome: 'completed' | 'expired';
  readonly outputFileId: string | null;
  readonly errorFileId: string | null;
  /** The next line to start: its first byte and its number. */
  readonly cursor: LinePlace;
  /** Changes by one with every write of a holder. */
  readonly version: number;
}

/** Where a line begins. */
export interface LinePlace {
  readonly offset: number;
  /** From 1. */
  readonly line: number;
}

/** A line that has a job. */
export interface StartedLine extends LinePlace {
  /** Bytes of the line. */
  readonly bytes: number;
  readonly jobId: string;
}

/** A stored part of the results: keys in the storage, each null where the part has no such lines. */
export interface ResultPart {
  readonly output: string | null;
  readonly error: string | null;
}

/** The prefix in the storage of all parts of results. */
export const PARTS_PREFIX = 'batches/';
export const partsPrefix = (batchId: string): string => `${PARTS_PREFIX}${batchId}/`;
