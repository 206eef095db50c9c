/**
 * The journal: what is known of a job, and the tokens of its sequences. The truth that clients read from;
 * nothing is shown that is not in it.
 */
import { randomBytes } from 'node:crypto';
import { CaravanError } from '../proto/errors.js';
import { JournalChannels } from './journal-channels.js';
import { progressOf, type SequenceProgress } from './journal-entry.js';
import { channelOf, jobKey, keysOf, promptKey, streamKey } from './journal-keys.js';
import { JournalReader, unknownJob } from './journal-reader.js';
import {
  appendPromptScript,
  appendScript,
  cancelScript,
  createArgs,
  createScript,
  endScript,
  endUnheldScript,
  finishScript,
  releaseScript,
  JOURNAL_VERSION,
  restoreScript,
  stepScript,
  WEBHOOK_CHANNEL,
  takeScript,
} from './journal-scripts.js';
import { sequenceCount } from './job-sequences.js';
import type { Ending, FinishReason, JobTerms, Request, TokenLogprobs } from './request.js';
import { connectRedis, type Patience } from './store-connection.js';
import type { Script } from './store-script.js';

export type { JournalEntry } from './journal-entry.js';
export type { JobRecord, JobStatus } from './journal-reader.js';

/** An engine's hold on a job. */
export interface Take {
  readonly kind: 'taken';
  readonly id: string;
  readonly fence: number;
  readonly isCancelled: boolean;
  /** Deaths of engines that the job is suspected of; see journal-scripts. */
  readonly suspicion: number;
  /** The step that the last engine began with it, running it alone; empty for none. */
  readonly lastStep: string;
  readonly request: Request;
  readonly terms: JobTerms;
  /** What earlier takes generated, sequence by sequence. */
  readonly sequences: readonly SequenceProgress[];
}

/** What an append or an end came to. */
export type Written =
  | { readonly kind: 'already' | 'stale' | 'missing' }
  | {
      readonly kind: 'written';
      /** Whether somebody wants the job gone. */
      readonly isCancelRequested: boolean;
    }
  /** Where the stream of a sequence really ends. */
  | { readonly kind: 'offset'; readonly offset: number; readonly index: number };

/** How long a job that has ended is kept. */
const RETENTION_S = 24 * 3600;
const CANCELLED = JSON.stringify({ status: 'cancelled' } satisfies Ending);
const EXPIRED = JSON.stringify({ status: 'expired' } satisfies Ending);
const CANCEL_CHANNEL = 'caravan:cancel';
/** Sorted set: jobs that ended every engine that ran them, by when that was known, in milliseconds. */
const DEAD = 'caravan:dead';

/** A new name for a job: 128 random bits. */
export const newJobId = (): string => `job_${randomBytes(16).toString('base64url')}`;

export class Journal extends JournalReader {
  /** Which run of Redis this is; null when it may be another by now. */
  #run: string | null = null;

  /** @throws CaravanError `redis_unavailable` within 3 seconds. */
  static async open(
    url: string,
    patience: Patience,
    onError?: (error: Error) => void,
  ): Promise<Journal> {
    const redis = await connectRedis(url, patience, onError);
    try {
      return new Journal(url, redis, await JournalChannels.open(url, onError));
    } catch (error) {
      redis.disconnect();
      throw error;
    }
  }

  /** Writes down a new job. @returns false when it is known already. @throws CaravanError `redis_unavailable`. */
  async create(id: string, request: Request, terms: JobTerms): Promise<boolean> {
    const args = createArgs(request, terms);
    return (await this.call(() => createScript.run(this.redis, [jobKey(id)], args))) === 1;
  }

  /** Removes a job that could not be queued, or that nobody needs any more. @param sequences that it has. */
  async forget(id: string, sequences: number): Promise<void> {
    await this.call(() => this.redis.del(keysOf(id, sequences)));
  }

  /** Takes a job for an engine: from now on, whoever held it before can write nothing. */
  async take(id: string, engineId: string): Promise<Take | { readonly kind: 'missing' | 'ended' }> {
    const run = await this.call(() => this.#redisRun());
    const answer = (await this.call(() =>
      takeScript.run(this.redis, [jobKey(id)], [engineId, run]),
    )) as
      | ['missing' | 'ended']
      | ['newer', string]
      | ['taken', ...[string, string, string, string, number, string, 0 | 1]];
    if (answer[0] === 'newer') {
      throw new CaravanError(
        'protocol_mismatch',
        `${id} is of journal version ${answer[1]}, this engine reads up to ${JOURNAL_VERSION}: it is left to a newer one`,
      );
    }
    if (answer[0] !== 'taken') return { kind: answer[0] };
    const [kind, fence, cancel, request, terms, suspicion, lastStep, isFirst] = answer;
    const asked = JSON.parse(request) as Request;
    return {
      kind,
      id,
      fence: Number(fence),
      isCancelled: cancel === '1',
      suspicion,
      lastStep,
      request: asked,
      terms: JSON.parse(terms) as JobTerms,
      sequences: await Promise.all(
        Array.from({ length: sequenceCount(asked) }, async (_, index) => {
          if (isFirst === 1) return progressOf([], 0);
          const reading = [this.entries(id, index, 0), this.#promptCount(id, index)] as const;
          return progressOf(...(await Promise.all(reading)));
        }),
      ),
    };
  }

  /** Appends tokens `start` and on to a sequence. `offset` tells where the stream really ends. */
  async append(
    { id, fence }: Pick<Take, 'id' | 'fence'>,
    start: number,
    tokenIds: readonly number[],
    texts: readonly string[],
    { index = 0, logprobs }: { index?: number; logprobs?: readonly TokenLogprobs[] } = {},
  ): Promise<Written> {
    const tokens = [start, tokenIds.length, tokenIds.join(','), JSON.stringify(texts)];
    const extra = logprobs === undefined ? '' : JSON.stringify(logprobs);
    return this.#write(
      index,
      appendScript,
      [jobKey(id), streamKey(id, index)],
      [...[fence, ...tokens, channelOf(id), extra]],
    );
  }

  /** Appends logprobs of a sequence's prompt from its token `start` on; its first token has none. */
  async appendPrompt(
    { id, fence }: Pick<Take, 'id' | 'fence'>,
    index: number,
    start: number,
    logprobs: readonly TokenLogprobs[],
  ): Promise<Written> {
    return this.#write(
      index,
      appendPromptScript,
      [jobKey(id), promptKey(id, index)],
      [...[fence, start, channelOf(id), ...logprobs.map((each) => JSON.stringify(each))]],
    );
  }

  /** Writes that one of several sequences is over, with `count` tokens. */
  async finish(
    { id, fence }: Pick<Take, 'id' | 'fence'>,
    index: number,
    count: number,
    finishReason: FinishReason,
    heldText: string,
  ): Promise<Written> {
    return this.#write(
      index,
      finishScript,
      [jobKey(id), streamKey(id, index)],
      [...[fence, count, finishReason, heldText, channelOf(id)]],
    );
  }

  /**
   * Writes the ending of a job, once.
   *
   * @param counts tokens of every sequence, and whether it was written to be over; a number for a job of one.
   */
  async end(
    { id, fence }: Pick<Take, 'id' | 'fence'>,
    counts: number | readonly { readonly tokens: number; readonly isFinished: boolean }[],
    ending: Ending,
    heldText: string,
  ): Promise<Written> {
    const stands =
      typeof counts === 'number'
        ? [counts]
        : counts.map(({ tokens, isFinished }) => (isFinished ? -tokens - 1 : tokens));
    return this.#write(0, endScript, keysOf(id, stands.length), [
      ...[fence, ending.status, JSON.stringify(ending), heldText, RETENTION_S, channelOf(id)],
      ...stands,
    ]);
  }

  /** Writes down again a job that this engine runs and Redis, killed, has lost. */
  async restore({ id, fence, request, terms }: Take): Promise<void> {
    const args = [...createArgs(request, terms), fence];
    await restoreScript.run(this.redis, [jobKey(id)], args);
  }

  /**
   * Gives a job back, unended, for the next take.
   *
   * @param isEngineDead whether the engine died of something, of this job perhaps.
   * @returns deaths that the job is suspected of.
   */
  async release({ id, fence }: Pick<Take, 'id' | 'fence'>, isEngineDead = false): Promise<number> {
    const [, suspicion] = (await releaseScript.run(
      this.redis,
      [jobKey(id)],
      [fence, isEngineDead ? 1 : 0],
    )) as [string, number | undefined];
    return suspicion ?? 0;
  }

  /** A suspected job begins a step, alone: should it be the last, this tells which it was. */
  async beginStep({ id, fence }: Pick<Take, 'id' | 'fence'>, step: string): Promise<void> {
    await stepScript.run(this.redis, [jobKey(id)], [fence, step]);
  }

  /** Puts a job on the list of those that end their engines; can be repeated. */
  async markDead(id: string): Promise<void> {
    await this.redis.zremrangebyscore(DEAD, 0, Date.now() - 1000 * RETENTION_S);
    await this.redis.zadd(DEAD, Date.now(), id);
  }

  /** It is tried again: the list has no more of it. */
  async unmarkDead(id: string): Promise<void> {
    await this.call(() => this.redis.zrem(DEAD, id));
  }

  /** Jobs that ended their engines, the latest first. */
  async dead(limit: number): Promise<string[]> {
    return this.call(() => this.redis.zrevrange(DEAD, 0, limit - 1));
  }

  /**
   * Ends a waiting job as cancelled, or asks the engine that runs it to.
   *
   * @throws CaravanError `not_found`.
   */
  async requestCancel(id: string): Promise<'cancelled' | 'requested' | 'already'> {
    const count = await this.#sequenceCount(id);
    if (count === null) throw unknownJob(id);
    const keys = keysOf(id, count);
    const args = [CANCELLED, RETENTION_S, channelOf(id), count, CANCEL_CHANNEL, id];
    const outcome = (await this.call(() => cancelScript.run(this.redis, keys, args))) as
      'missing' | 'already' | 'cancelled' | 'requested';
    if (outcome === 'missing') throw unknownJob(id);
    return outcome;
  }

  /** Ends a job that no engine ends: as cancelled if somebody asked for that, else as expired. */
  async endUnheld(id: string): Promise<'missing' | 'already' | 'ended'> {
    const count = await this.#sequenceCount(id);
    if (count === null) return 'missing';
    const keys = keysOf(id, count);
    const args = [CANCELLED, EXPIRED, RETENTION_S, channelOf(id), count];
    return (await this.call(() => endUnheldScript.run(this.redis, keys, args))) as
      'missing' | 'already' | 'ended';
  }

  /** Whether somebody asked for the cancellation of an active job. */
  async isCancelRequested(id: string): Promise<boolean> {
    return (await this.redis.hget(jobKey(id), 'cancel')) === '1';
  }

  /** Hears of cancellations; an empty id means that some may have been missed. @returns how to stop. */
  onCancel(listener: (id: string) => void): () => void {
    return this.channels.listen(CANCEL_CHANNEL, listener);
  }

  /** Hears of jobs that have ended and have a webhook; an empty id means that some may have been missed. */
  onWebhookDue(listener: (id: string) => void): () => void {
    return this.channels.listen(WEBHOOK_CHANNEL, listener);
  }

  close(): void {
    this.redis.disconnect();
    this.channels.close();
  }

  /** @returns null for an unknown job. */
  async #sequenceCount(id: string): Promise<number | null> {
    const request = await this.call(() => this.redis.hget(jobKey(id), 'request'));
    return request === null ? null : sequenceCount(JSON.parse(request) as Request);
  }

  /** The name of this run of Redis: another one may lack the last second of this one. */
  async #redisRun(): Promise<string> {
    if (this.#run === null) {
      this.redis.once('close', () => {
        this.#run = null;
      });
      this.#run = /run_id:(\w+)/.exec(await this.redis.info('server'))?.[1] ?? '';
    }
    return this.#run;
  }

  #promptCount(id: string, index: number): Promise<number> {
    return this.call(() => this.redis.llen(promptKey(id, index)));
  }

  /** Runs a script of a take. */
  async #write(
    index: number,
    script: Script,
    keys: readonly string[],
    args: readonly (string | number)[],
  ): Promise<Written> {
    const [kind, second, at] = (await script.run(this.redis, keys, args)) as [
      'stale' | 'missing' | 'already' | 'offset' | 'appended' | 'finished' | 'ended',
      number | string | undefined,
      number | undefined,
    ];
    if (kind === 'offset') return { kind, offset: Number(second), index: at ?? index };
    if (kind === 'stale' || kind === 'missing' || kind === 'already') return { kind };
    return { kind: 'written', isCancelRequested: second === '1' };
  }
}
