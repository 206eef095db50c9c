/**
 * How much work a model's queue holds, in tokens: of every job that waits, with a priority or without, of delayed
 * ones that are due, and what is left of active ones.
 *
 *   remaining(job) = sum over its sequences of (prompt, unless its first token is written) + (limit - written)
 *
 * BullMQ moves delayed jobs only while an engine asks for some, so that at zero engines the due ones are counted
 * by their time.
 */
import type { Redis } from 'ioredis';
import { sequenceCount, sequenceRequest } from './job-sequences.js';
import { jobKey, streamKey } from './journal-keys.js';
import { queueName } from './queue-connection.js';
import type { Request } from './request.js';
import type { StoreConnection } from './store-connection.js';

/** Tokens of one sequence before anything is computed. */
export interface SequenceSize {
  readonly promptTokens: number;
  readonly maxTokens: number;
}

/** What is kept of a job between counts. */
interface KnownJob {
  readonly sequences: readonly SequenceSize[];
  readonly createdMs: number;
}

export interface BacklogTokens {
  /** Jobs of all four kinds. */
  readonly jobs: number;
  /** Prompt and output tokens that are still to be computed, at most. */
  readonly tokens: number;
  /** Age of the oldest job that no engine works on; 0 when none waits. */
  readonly oldestWaitingMs: number;
}

/** Jobs that are asked for in one round trip. */
const PIPELINE_JOBS = 500;
/** BullMQ keeps a delayed job by its time in milliseconds times this. */
const DELAYED_SCORE_SCALE = 0x1000;

export class Backlog {
  readonly #connection: StoreConnection;
  readonly #redis: Redis;
  /** The jobs of the last count, by model: their sizes never change. */
  readonly #known = new Map<string, ReadonlyMap<string, KnownJob>>();

  constructor(connection: StoreConnection) {
    this.#connection = connection;
    this.#redis = connection.redis;
  }

  /**
   * @param maxSeqLen positions of a slot: an answer never goes beyond; null where no engine has said so yet.
   * @throws CaravanError `redis_unavailable`.
   */
  async count(model: string, maxSeqLen: number | null): Promise<BacklogTokens> {
    return this.#connection.call(async () => {
      const { waiting, active } = await this.#ids(model);
      const known = await this.#jobsOf(model, [...waiting, ...active]);
      const sizesOf = (id: string): readonly SequenceSize[] => known.get(id)?.sequences ?? [];
      let tokens = 0;
      let oldestMs = Infinity;
      for (const id of waiting) {
        tokens += remainingTokens(sizesOf(id), [], maxSeqLen);
        oldestMs = Math.min(oldestMs, known.get(id)?.createdMs ?? Infinity);
      }
      const written = await this.#written(active, known);
      for (const id of active) {
        tokens += remainingTokens(sizesOf(id), written.get(id) ?? [], maxSeqLen);
      }
      const oldestWaitingMs = oldestMs === Infinity ? 0 : Math.max(0, Date.now() - oldestMs);
      return { jobs: waiting.length + active.length, tokens, oldestWaitingMs };
    });
  }

  /** In one transaction, so that no job is seen twice or missed on its way. */
  async #ids(model: string): Promise<{ waiting: string[]; active: string[] }> {
    const key = (part: string): string => `bull:${queueName(model)}:${part}`;
    const dueScore = String((Date.now() + 1) * DELAYED_SCORE_SCALE - 1);
    const results = await this.#redis
      .multi()
      .lrange(key('wait'), 0, -1)
      .lrange(key('paused'), 0, -1)
      .zrange(key('prioritized'), 0, '-1')
      .zrangebyscore(key('delayed'), 0, dueScore)
      .lrange(key('active'), 0, -1)
      .exec();
    const lists = (results ?? []).map(([error, ids]) => {
      if (error !== null) throw error;
      return ids as string[];
    });
    // BullMQ's markers ("0:0") are no jobs.
    const jobs = (list: readonly string[]): string[] => list.filter((id) => !id.startsWith('0:'));
    return { waiting: lists.slice(0, 4).flatMap(jobs), active: jobs(lists[4] ?? []) };
  }

  async #jobsOf(model: string, ids: readonly string[]): Promise<ReadonlyMap<string, KnownJob>> {
    const known = this.#known.get(model);
    const jobs = new Map<string, KnownJob>();
    const unknown: string[] = [];
    for (const id of ids) {
      const job = known?.get(id);
      if (job === undefined) unknown.push(id);
      else jobs.set(id, job);
    }
    for (let start = 0; start < unknown.length; start += PIPELINE_JOBS) {
      const part = unknown.slice(start, start + PIPELINE_JOBS);
      const pipeline = this.#redis.pipeline();
      for (const id of part) pipeline.hmget(jobKey(id), 'request', 'createdMs');
      const results = (await pipeline.exec()) ?? [];
      for (const [i, [error, fields]] of results.entries()) {
        if (error !== null) throw error;
        const [request, createdMs] = fields as [string | null, string | null];
        // A job without a journal ends as soon as it is taken.
        if (request === null) continue;
        const sequences = sizeOf(JSON.parse(request) as Request);
        jobs.set(part[i]!, { sequences, createdMs: Number(createdMs) });
      }
    }
    this.#known.set(model, jobs);
    return jobs;
  }

  /** Tokens that the journal has of each sequence of these jobs. */
  async #written(
    ids: readonly string[],
    jobs: ReadonlyMap<string, KnownJob>,
  ): Promise<ReadonlyMap<string, readonly number[]>> {
    const written = new Map<string, number[]>();
    const pipeline = this.#redis.pipeline();
    const owners: string[] = [];
    for (const id of ids) {
      for (const index of (jobs.get(id)?.sequences ?? []).keys()) {
        pipeline.xrevrange(streamKey(id, index), '+', '-', 'COUNT', 1);
        owners.push(id);
      }
    }
    for (const [i, [error, entries]] of ((await pipeline.exec()) ?? []).entries()) {
      if (error !== null) throw error;
      const entryId = (entries as [string, string[]][])[0]?.[0];
      const [tokens, part] = entryId?.split('-').map(Number) ?? [0, 0];
      const id = owners[i]!;
      // A sequence that is over has nothing left, however many tokens it was allowed.
      written.set(id, [...(written.get(id) ?? []), part === 0 ? tokens! : Infinity]);
    }
    return written;
  }
}

function sizeOf(request: Request): SequenceSize[] {
  return Array.from({ length: sequenceCount(request) }, (_, index) => {
    const { promptTokenIds, maxTokens } = sequenceRequest(request, index);
    return { promptTokens: promptTokenIds.length, maxTokens };
  });
}

/** Tokens of a job that are still to be computed, at most. @param written tokens of each sequence; Infinity when over. */
export function remainingTokens(
  sizes: readonly SequenceSize[],
  written: readonly number[],
  maxSeqLen: number | null,
): number {
  let tokens = 0;
  for (const [index, { promptTokens, maxTokens }] of sizes.entries()) {
    const done = written[index] ?? 0;
    const most =
      maxSeqLen === null ? maxTokens : Math.min(maxTokens, Math.max(0, maxSeqLen - promptTokens));
    if (done === 0) tokens += promptTokens;
    tokens += Math.max(0, most - done);
  }
  return tokens;
}
