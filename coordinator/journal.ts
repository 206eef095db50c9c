/**
 * The journal: what is known of a job, and the tokens of its sequences. The truth that clients read from;
 * nothing is shown that is not in it.
 */
import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { CaravanError } from '../proto/errors.js';
import { Bell } from './bell.js';
import {
  appendScript,
  cancelScript,
  createScript,
  endScript,
  releaseScript,
  restoreScript,
  takeScript,
} from './journal-scripts.js';
import type { Ending, JobTerms, Request } from './request.js';
import { asCall, connectRedis, type Patience } from './store-connection.js';

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

export type JournalEntry =
  | {
      readonly kind: 'tokens';
      /** Tokens of the sequence up to and with this entry. */
      readonly endOffset: number;
      readonly tokenIds: readonly number[];
      /** The text that each of them released. */
      readonly texts: readonly string[];
    }
  | {
      readonly kind: 'end';
      readonly endOffset: number;
      /** What was held back until the end. */
      readonly text: string;
      readonly ending: Ending;
    };

/** An engine's hold on a job. */
export interface Take {
  readonly kind: 'taken';
  readonly id: string;
  readonly fence: number;
  readonly isCancelled: boolean;
  readonly request: Request;
  readonly terms: JobTerms;
  /** What earlier takes generated, and the texts that it released. */
  readonly tokenIds: readonly number[];
  readonly texts: readonly string[];
}

/** What an append or an end came to. */
export type Written =
  | { readonly kind: 'written' | 'already' | 'stale' | 'missing' }
  | { readonly kind: 'offset'; readonly offset: number };

/** How long a job that has ended is kept. */
const RETENTION_S = 24 * 3600;
/** A reader looks at the stream this often even when nobody wakes it. */
const POLL_MS = 1000;
/** A job that Redis has not known for this long will not be written down anew by an engine. */
const FORGOTTEN_AFTER_MS = 10_000;
const CANCEL_CHANNEL = 'caravan:cancel';

/** A new name for a job: 128 random bits. */
export const newJobId = (): string => `job_${randomBytes(16).toString('base64url')}`;

const jobKey = (id: string): string => `caravan:{${id}}:job`;
const streamKey = (id: string, index: number): string => `caravan:{${id}}:journal:${index}`;
const channelOf = (id: string): string => `caravan:{${id}}:wake`;

export class Journal {
  readonly #url: string;
  readonly #redis: Redis;
  readonly #subscriber: Redis;
  /** By channel: who waits for a message on it. */
  readonly #listeners = new Map<string, Set<(message: string) => void>>();

  private constructor(url: string, redis: Redis, subscriber: Redis) {
    this.#url = url;
    this.#redis = redis;
    this.#subscriber = subscriber;
    subscriber.on('message', (channel: string, message: string) => {
      for (const listener of this.#listeners.get(channel) ?? []) listener(message);
    });
    // What was published while we were away is lost: everybody looks for himself.
    subscriber.on('ready', () => {
      for (const listeners of this.#listeners.values())
        for (const listener of listeners) listener('');
    });
  }

  /** @throws CaravanError `redis_unavailable` within 3 seconds. */
  static async open(
    url: string,
    patience: Patience,
    onError?: (error: Error) => void,
  ): Promise<Journal> {
    const redis = await connectRedis(url, patience, onError);
    try {
      const subscriber = await connectRedis(url, 'patient', onError);
      return new Journal(url, redis, subscriber);
    } catch (error) {
      redis.disconnect();
      throw error;
    }
  }

  /** Writes down a new job. @throws CaravanError `redis_unavailable`. */
  async create(id: string, request: Request, terms: JobTerms): Promise<void> {
    const args = [request.model, JSON.stringify(request), JSON.stringify(terms), Date.now()];
    await this.#call(() => this.#redis.eval(createScript, 1, jobKey(id), ...args));
  }

  /** Removes a job that could not be queued. */
  async forget(id: string): Promise<void> {
    await this.#call(() => this.#redis.del(jobKey(id), streamKey(id, 0)));
  }

  async job(id: string): Promise<JobRecord | null> {
    const fields = await this.#call(() => this.#redis.hgetall(jobKey(id)));
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

  /** Takes a job for an engine: from now on, whoever held it before can write nothing. */
  async take(id: string, engineId: string): Promise<Take | { readonly kind: 'missing' | 'ended' }> {
    const [kind, ...rest] = (await this.#call(() =>
      this.#redis.eval(takeScript, 1, jobKey(id), engineId),
    )) as ['taken' | 'missing' | 'ended', ...string[]];
    if (kind !== 'taken') return { kind };
    const [fence, cancel, request, terms] = rest;
    const entries = await this.entries(id, 0, 0);
    const tokens = entries.filter((entry) => entry.kind === 'tokens');
    return {
      kind,
      id,
      fence: Number(fence),
      isCancelled: cancel === '1',
      request: JSON.parse(request!) as Request,
      terms: JSON.parse(terms!) as JobTerms,
      tokenIds: tokens.flatMap((entry) => entry.tokenIds),
      texts: tokens.flatMap((entry) => entry.texts),
    };
  }

  /** Appends tokens `start` and on. `offset` tells where the stream really ends. */
  async append(
    { id, fence }: Pick<Take, 'id' | 'fence'>,
    start: number,
    tokenIds: readonly number[],
    texts: readonly string[],
  ): Promise<Written> {
    const keys = [jobKey(id), streamKey(id, 0)];
    const [kind, offset] = (await this.#redis.eval(
      appendScript,
      2,
      ...keys,
      fence,
      start,
      tokenIds.length,
      tokenIds.join(','),
      JSON.stringify(texts),
      channelOf(id),
    )) as ['stale' | 'missing' | 'offset' | 'appended', number];
    if (kind === 'offset') return { kind, offset };
    return { kind: kind === 'appended' ? 'written' : kind };
  }

  /** Writes the ending of a job with `count` tokens, once. */
  async end(
    { id, fence }: Pick<Take, 'id' | 'fence'>,
    count: number,
    ending: Ending,
    heldText: string,
  ): Promise<Written> {
    const [kind, offset] = (await this.#redis.eval(
      endScript,
      2,
      jobKey(id),
      streamKey(id, 0),
      fence,
      count,
      ending.status,
      JSON.stringify(ending),
      heldText,
      RETENTION_S,
      channelOf(id),
    )) as ['stale' | 'missing' | 'already' | 'offset' | 'ended', number];
    if (kind === 'offset') return { kind, offset };
    return { kind: kind === 'ended' ? 'written' : kind };
  }

  /** Writes down again a job that this engine runs and Redis, killed, has lost. */
  async restore({ id, fence, request, terms }: Take): Promise<void> {
    const args = [request.model, JSON.stringify(request), JSON.stringify(terms), Date.now(), fence];
    await this.#redis.eval(restoreScript, 1, jobKey(id), ...args);
  }

  /** Gives a job back, unended, for the next take. */
  async release({ id, fence }: Pick<Take, 'id' | 'fence'>): Promise<void> {
    await this.#redis.eval(releaseScript, 1, jobKey(id), fence);
  }

  /**
   * Ends a waiting job as cancelled, or asks the engine that runs it to.
   *
   * @throws CaravanError `not_found`.
   */
  async requestCancel(id: string): Promise<'cancelled' | 'requested' | 'already'> {
    const ending: Ending = { status: 'cancelled' };
    const outcome = (await this.#call(() =>
      this.#redis.eval(
        cancelScript,
        2,
        jobKey(id),
        streamKey(id, 0),
        JSON.stringify(ending),
        RETENTION_S,
        channelOf(id),
      ),
    )) as 'missing' | 'already' | 'cancelled' | 'requested';
    if (outcome === 'missing') throw unknownJob(id);
    if (outcome === 'requested') await this.#call(() => this.#redis.publish(CANCEL_CHANNEL, id));
    return outcome;
  }

  /** Whether somebody asked for the cancellation of an active job. */
  async isCancelRequested(id: string): Promise<boolean> {
    return (await this.#redis.hget(jobKey(id), 'cancel')) === '1';
  }

  /** Hears of cancellations; an empty id means that some may have been missed. @returns how to stop. */
  onCancel(listener: (id: string) => void): () => void {
    return this.#listen(CANCEL_CHANNEL, listener);
  }

  /** Entries of a sequence after its first `offset` tokens. */
  async entries(id: string, index: number, offset: number): Promise<JournalEntry[]> {
    const from = `(${offset}-0`;
    const entries = await this.#call(() => this.#redis.xrange(streamKey(id, index), from, '+'));
    return entries.map(([entryId, fields]) => parseEntry(entryId, fields, offset));
  }

  /**
   * Follows a sequence from its first `offset` tokens to its end, over restarts of engines and of Redis.
   *
   * @throws CaravanError `not_found` for an unknown job, `redis_unavailable` for one that Redis has lost, or
   *   the signal's reason.
   */
  async *read(
    id: string,
    index: number,
    offset: number,
    signal: AbortSignal,
  ): AsyncGenerator<JournalEntry> {
    if ((await this.job(id)) === null) throw unknownJob(id);
    const bell = new Bell();
    const ring = (): void => {
      bell.ring();
    };
    const stop = this.#listen(channelOf(id), ring);
    signal.addEventListener('abort', ring);
    try {
      let lastKnownMs = performance.now();
      for (let at = offset; ;) {
        signal.throwIfAborted();
        const entries = await this.#entriesOrNone(id, index, at);
        for (const entry of entries) {
          yield entry;
          if (entry.kind === 'end') return;
          at = entry.endOffset;
        }
        if (entries.length > 0 || !(await this.#isForgotten(id))) lastKnownMs = performance.now();
        else if (performance.now() - lastKnownMs > FORGOTTEN_AFTER_MS) throw lostJob(id);
        await bell.wait(POLL_MS);
      }
    } finally {
      signal.removeEventListener('abort', ring);
      stop();
    }
  }

  close(): void {
    this.#redis.disconnect();
    this.#subscriber.disconnect();
  }

  /** While Redis is away there is nothing new: the reader asks again. */
  async #entriesOrNone(id: string, index: number, offset: number): Promise<JournalEntry[]> {
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
      return (await this.#redis.exists(jobKey(id))) === 0;
    } catch {
      return false;
    }
  }

  #listen(channel: string, listener: (message: string) => void): () => void {
    let listeners = this.#listeners.get(channel);
    if (listeners === undefined) {
      listeners = new Set();
      this.#listeners.set(channel, listeners);
    }
    listeners.add(listener);
    const others = listeners;
    if (others.size === 1) {
      // What is published before the subscription stands is found by the first look or the next poll.
      this.#subscriber.subscribe(channel).catch(() => undefined);
    }
    return () => {
      others.delete(listener);
      if (others.size > 0 || this.#listeners.get(channel) !== others) return;
      this.#listeners.delete(channel);
      // Not waited for: Redis may be away, or the connection closed and without subscriptions.
      this.#subscriber.unsubscribe(channel).catch(() => undefined);
    };
  }

  #call<T>(call: () => Promise<T>): Promise<T> {
    return asCall(this.#url, call);
  }
}

const unknownJob = (id: string): CaravanError =>
  new CaravanError('not_found', `job ${id} is not known (jobs are kept for a day after their end)`);

const lostJob = (id: string): CaravanError =>
  new CaravanError(
    'redis_unavailable',
    `Redis lost job ${id}: it was killed before the job was on its disk; submit the job again`,
  );

/** Tokens before `offset` are left out: after a loss, an entry may cover more than it once did. */
function parseEntry(entryId: string, fields: readonly string[], offset: number): JournalEntry {
  const endOffset = Number(entryId.slice(0, entryId.indexOf('-')));
  const value = (name: string): string => fields[fields.indexOf(name) + 1] ?? '';
  if (fields.includes('ending')) {
    const ending = JSON.parse(value('ending')) as Ending;
    return { kind: 'end', endOffset, text: value('text'), ending };
  }
  const tokenIds = value('tokens').split(',').map(Number);
  const known = Math.max(0, offset - (endOffset - tokenIds.length));
  const texts = JSON.parse(value('texts')) as string[];
  return { kind: 'tokens', endOffset, tokenIds: tokenIds.slice(known), texts: texts.slice(known) };
}
