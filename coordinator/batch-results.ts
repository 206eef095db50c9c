/**
 * Results of lines on their way into the storage. They are written in parts, each once it is large or old
 * enough, because storage has no files that grow; a part counts when its record is in Redis. What a killed
 * gateway had not recorded is still in the journals of the jobs.
 */
import { randomBytes } from 'node:crypto';
import { partsPrefix, type BatchTally, type ResultPart } from './batch.js';
import { pieces, type FileStorage } from './file-storage.js';

/** A part of this size is written whatever its age. */
const PART_BYTES = 1024 * 1024;
/** Counts that clients see are this old at most while a batch is young, and 1 % of its age later. */
const LEAST_PART_AGE_MS = 1_000;
const MOST_PART_AGE_MS = 60_000;
const AGE_SHARE = 0.01;

/** What one line came to. */
export interface LineResult {
  readonly line: number;
  /** A line of the output or of the error file, without its newline. */
  readonly text: string;
  readonly isError: boolean;
  /** The job that is not needed once this is recorded; null for a line that never had one. */
  readonly jobId: string | null;
  /** Sequences of the job. */
  readonly sequences: number;
  readonly inputTokens: number;
  readonly outputTokens: number;
}

/** Results that lie in the storage and must be recorded next. */
export interface StoredResults {
  readonly part: ResultPart;
  readonly tally: BatchTally;
  readonly results: readonly LineResult[];
}

export class ResultBuffer {
  readonly #storage: FileStorage;
  readonly #batchId: string;
  readonly #createdMs: number;
  #results: LineResult[] = [];
  #bytes = 0;
  #firstMs = 0;

  /** @param createdMs of the batch. */
  constructor(storage: FileStorage, batchId: string, createdMs: number) {
    this.#storage = storage;
    this.#batchId = batchId;
    this.#createdMs = createdMs;
  }

  get isEmpty(): boolean {
    return this.#results.length === 0;
  }

  get isFull(): boolean {
    return this.#bytes >= PART_BYTES;
  }

  add(result: LineResult): void {
    if (this.isEmpty) this.#firstMs = Date.now();
    this.#results.push(result);
    this.#bytes += result.text.length + 1;
  }

  /** Milliseconds until the part should be written; 0 when it should be now, Infinity when it is empty. */
  get dueInMs(): number {
    if (this.isEmpty) return Infinity;
    if (this.isFull) return 0;
    const batchAgeMs = this.#firstMs - this.#createdMs;
    const ageMs = Math.min(Math.max(AGE_SHARE * batchAgeMs, LEAST_PART_AGE_MS), MOST_PART_AGE_MS);
    return Math.max(0, this.#firstMs + ageMs - Date.now());
  }

  /**
   * Writes what is here into the storage; it stays here until `drop`. Can be repeated.
   *
   * @throws CaravanError `disk_full`, `storage_unavailable`.
   */
  async store(signal: AbortSignal): Promise<StoredResults> {
    const results = [...this.#results];
    const name = `${partsPrefix(this.#batchId)}${randomBytes(8).toString('hex')}`;
    const write = async (kind: 'output' | 'error', isError: boolean): Promise<string | null> => {
      const lines = results.filter((result) => result.isError === isError);
      if (lines.length === 0) return null;
      const key = `${name}.${kind}`;
      await this.#storage.write(key, textOf(lines), signal);
      return key;
    };
    const part = { output: await write('output', false), error: await write('error', true) };
    const sum = (of: (result: LineResult) => number): number =>
      results.reduce((total, result) => total + of(result), 0);
    const failed = sum(({ isError }) => (isError ? 1 : 0));
    const tally = {
      completed: results.length - failed,
      failed,
      inputTokens: sum(({ inputTokens }) => inputTokens),
      outputTokens: sum(({ outputTokens }) => outputTokens),
    };
    return { part, tally, results };
  }

  /** They are recorded. */
  drop({ results }: StoredResults): void {
    this.#results = this.#results.slice(results.length);
    this.#bytes = this.#results.reduce((bytes, { text }) => bytes + text.length + 1, 0);
    this.#firstMs = Date.now();
  }
}

// eslint-disable-next-line @typescript-eslint/require-await -- the source of a write is asynchronous
async function* textOf(lines: readonly LineResult[]): AsyncGenerator<Buffer> {
  for (const { text } of lines) yield Buffer.from(`${text}\n`);
}

/** The bytes of several objects, one after another. @throws as FileStorage.read. */
export async function* joined(
  storage: FileStorage,
  keys: readonly string[],
): AsyncGenerator<Buffer> {
  for (const key of keys) yield* pieces(storage, key);
}
