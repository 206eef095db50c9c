/** The reading side of the journal: jobs, and the entries of their sequences as they come. */
import type { Redis } from 'ioredis';
import { CaravanError } from '../proto/errors.js';
import { Bell } from './bell.js';
import type { JournalChannels } from './journal-channels.js';
import { parseEntry, type JournalEntry, type StreamEntry } from './journal-entry.js';
import { channelOf, jobKey, promptKey, streamKey } from './journal-keys.js';
import type { Ending, JobTerms, Request, TokenLogprobs } from './request.js';
import { asCall } from './store-connection.js';

export type JobStatus = 'waiting' | 'active' | Ending['status'];

export interface JobRecord {
  readonly id: string;
  readonly model: string;
  readonly status: JobStatus;
  readonly request: Request;
  readonly terms: JobTerms;
  readonly createdMs: number;
  readonly ending: Ending | null;
}

/** One entry of a job of any number of sequences. */
export interface SequenceEntry {
  readonly index: number;
  readonly entry: StreamEntry;
}

/** A reader looks at the stream this often even when nobody wakes it. */
const POLL_MS = 1000;
/** A job that Redis has not known for this long will not be written down anew by an engine. */
const FORGOTTEN_AFTER_MS = 10_000;

export class JournalReader {
  protected readonly url: string;
  protected readonly redis: Redis;
  protected readonly channels: JournalChannels;

  protected constructor(url: string, redis: Redis, channels: JournalChannels) {
    this.url = url;
    this.redis = redis;
    this.channels = channels;
  }

  async job(id: string): Promise<JobRecord | null> {
    const fields = await this.call(() => this.redis.hgetall(jobKey(id)));
    const { status, model, request, terms, createdMs, ending } = fields;
    if (status === undefined) return null;
    return {
      id,
      model: model!,
      status: status as JobStatus,
      request: JSON.parse(request!) as Request,
      terms: JSON.parse(terms!) as JobTerms,
      createdMs: Number(createdMs),
      ending: ending === undefined ? null : (JSON.parse(ending) as Ending),
    };
  }

  /** Hears when Redis is there again after it was away: it may lack its last second. @returns how to stop. */
  onReconnect(listener: () => void): () => void {
    this.redis.on('ready', listener);
    return () => this.redis.off('ready', listener);
  }

  get isConnected(): boolean {
    return this.redis.status === 'ready';
  }

  /** Entries of a sequence after its first `offset` tokens. */
  async entries(id: string, index: number, offset: number): Promise<StreamEntry[]> {
    const from = `(${offset}-0`;
    const entries = await this.call(() => this.redis.xrange(streamKey(id, index), from, '+'));
    return entries.map(([entryId, fields]) => parseEntry(entryId, fields, offset));
  }

  /** Logprobs of a sequence's prompt from its second token on, as many as are written down. */
  async promptLogprobs(id: string, index: number): Promise<TokenLogprobs[]> {
    const texts = await this.call(() => this.redis.lrange(promptKey(id, index), 0, -1));
    return texts.map((text) => JSON.parse(text) as TokenLogprobs);
  }

  /** As `readAll`, of one sequence: the tokens, then the job's ending. */
  async *read(
    id: string,
    index: number,
    offset: number,
    signal: AbortSignal,
  ): AsyncGenerator<JournalEntry> {
    if ((await this.job(id)) === null) throw unknownJob(id);
    for await (const { entry } of this.#follow(id, new Map([[index, offset]]), signal)) {
      if (entry.kind !== 'finish') yield entry;
    }
  }

  /**
   * Follows all sequences to the end of the job, over restarts of engines and of Redis. The job's ending is the
   * last entry, of sequence 0.
   *
   * @param offsets tokens of each sequence that the reader has.
   * @param isKnown whether the caller has submitted the job: then Redis may only have lost it.
   * @throws CaravanError `not_found` for an unknown job, `redis_unavailable` for one that Redis has lost, or
   *   the signal's reason.
   */
  async *readAll(
    id: string,
    offsets: readonly number[],
    signal: AbortSignal,
    isKnown = false,
  ): AsyncGenerator<SequenceEntry> {
    if (!isKnown && (await this.job(id)) === null) throw unknownJob(id);
    yield* this.#follow(id, new Map(offsets.entries()), signal);
  }

  /** The ending that counts is that of the first sequence followed. @param at tokens that the reader has, by sequence. */
  async *#follow(
    id: string,
    at: Map<number, number>,
    signal: AbortSignal,
  ): AsyncGenerator<SequenceEntry> {
    const bell = new Bell();
    const ring = (): void => {
      bell.ring();
    };
    const stop = this.channels.listen(channelOf(id), ring);
    signal.addEventListener('abort', ring);
    const first = Math.min(...at.keys());
    const finished = new Set<number>();
    try {
      let lastKnownMs = performance.now();
      for (;;) {
        signal.throwIfAborted();
        let hasMore = false;
        let ending: SequenceEntry | null = null;
        // The first before the others: what they have when it shows the ending is all that they have.
        for (const [index, offset] of at) {
          for (const entry of await this.#entriesOrNone(id, index, offset)) {
            if (entry.kind === 'end') {
              if (index === first) ending = { index, entry };
              continue;
            }
            if (entry.kind === 'finish' && finished.has(index)) continue;
            hasMore = true;
            if (entry.kind === 'finish') finished.add(index);
            else at.set(index, entry.endOffset);
            yield { index, entry };
          }
        }
        if (ending !== null) {
          yield ending;
          return;
        }
        if (hasMore || !(await this.#isForgotten(id))) lastKnownMs = performance.now();
        else if (performance.now() - lastKnownMs > FORGOTTEN_AFTER_MS) throw lostJob(id);
        await bell.wait(POLL_MS);
      }
    } finally {
      signal.removeEventListener('abort', ring);
      stop();
    }
  }

  /** While Redis is away there is nothing new: the reader asks again. */
  async #entriesOrNone(id: string, index: number, offset: number): Promise<StreamEntry[]> {
    try {
      return await this.entries(id, index, offset);
    } catch (error) {
      if (error instanceof CaravanError && error.code === 'redis_unavailable') return [];
      throw error;
    }
  }

  /** True when Redis answers that there is no such job. */
  async #isForgotten(id: string): Promise<boolean> {
    try {
      return (await this.redis.exists(jobKey(id))) === 0;
    } catch {
      return false;
    }
  }

  protected call<T>(call: () => Promise<T>): Promise<T> {
    return asCall(this.url, call);
  }
}

export const unknownJob = (id: string): CaravanError =>
  new CaravanError('not_found', `job ${id} is not known (jobs are kept for a day after their end)`);

const lostJob = (id: string): CaravanError =>
  new CaravanError(
    'redis_unavailable',
    `Redis lost job ${id}: it was killed before the job was on its disk; submit the job again`,
  );
