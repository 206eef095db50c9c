/** The order of one model's queue, as Redis keeps it beside BullMQ's own structures: see queue-order-scripts. */
import type { Redis } from 'ioredis';
import { CaravanError } from '../proto/errors.js';
import type { Stand } from './admission.js';
import { sequenceCount, sequenceRequest } from './job-sequences.js';
import { jobKey } from './journal-keys.js';
import { laneOf, type Choice, type HeldJob, type OrderView, type QueuedJob } from './order.js';
import {
  adoptScript,
  bullParts,
  confirmScript,
  enterScript,
  forgetScript,
  lookScript,
  orderParts,
  promoteScript,
  PROMOTED_MS,
  putBackScript,
  reserveScript,
  standScript,
  type Script,
} from './queue-order-scripts.js';
import type { JobTerms, Request } from './request.js';

export const DEFAULT_TENANT = 'default';
/** What the order knows of a job that was added to BullMQ by others and that no journal knows. */
const FOREIGN_TERMS: JobTerms = { priority: 100, deadlineMs: null };
/** What is in one of the two alone may be on its way into the other. */
const ON_ITS_WAY_MS = 10_000;
/** Promised jobs, and running ones, that an estimate reckons with. */
const MAX_STANDING = 5_000;
/** Records that are asked for in one round trip. */
const PIPELINE_JOBS = 500;

/** Work of a job, in tokens. */
export interface JobSize {
  /** Prompt and output tokens of all its sequences, at most. */
  readonly tokens: number;
  /** Output tokens of its longest sequence, at most. */
  readonly outputTokens: number;
}

/** @param maxSeqLen positions of a slot: an answer never goes beyond. */
export function jobSizeOf(request: Request, maxSeqLen = Infinity): JobSize {
  let tokens = 0;
  let outputTokens = 0;
  for (let index = sequenceCount(request) - 1; index >= 0; index -= 1) {
    const { promptTokenIds, maxTokens } = sequenceRequest(request, index);
    const output = Math.min(maxTokens, Math.max(0, maxSeqLen - promptTokenIds.length));
    tokens += promptTokenIds.length + output;
    outputTokens = Math.max(outputTokens, output);
  }
  return { tokens, outputTokens };
}

/** What may be in the queue; null for no limit. */
export interface QueueLimits {
  readonly jobs: number | null;
  readonly tokens: number | null;
  readonly tenantJobs: number | null;
  readonly tenantTokens: number | null;
  readonly tenantRequestsPerMinute: number | null;
}

/** What stands in a queue, for all classes. */
export interface StandOfQueue extends Pick<Stand, 'promised' | 'running'> {
  /** Waiting tokens by priority. */
  readonly loads: ReadonlyMap<number, number>;
  readonly waitingJobs: number;
  /** Grows with every promise that is made or is no more. */
  readonly version: number;
}

export type Reserved =
  | { readonly kind: 'reserved' | 'known' | 'raced' }
  | { readonly kind: 'full'; readonly limit: keyof QueueLimits; readonly stands: number };

const limitNames: readonly (keyof QueueLimits)[] = [
  'jobs',
  'tokens',
  'tenantJobs',
  'tenantTokens',
  'tenantRequestsPerMinute',
];

export type Look =
  | { readonly kind: 'paused' }
  | {
      readonly kind: 'view';
      readonly view: OrderView;
      /** When the next promised job must start; null for none. */
      readonly nextDueMs: number | null;
      /** BullMQ has jobs where it would hand them out unchosen. */
      readonly hasStrays: boolean;
      /** BullMQ and the order do not have the same jobs; some may be on their way. */
      readonly isUneven: boolean;
    };

/** Channel that is told of jobs that can be chosen. */
export const wakeChannelOf = (queue: string): string => `caravan:order:${queue}:wake`;

export class QueueOrder {
  readonly #redis: Redis;
  readonly #queue: string;
  readonly #keys: readonly string[];

  /** @param queue BullMQ's name of it. */
  constructor(redis: Redis, queue: string) {
    this.#redis = redis;
    this.#queue = queue;
    this.#keys = [
      ...orderParts.map((part) => `caravan:order:${queue}:${part}`),
      ...bullParts.map((part) => `bull:${queue}:${part}`),
    ];
  }

  /** Makes room for a job that is not in BullMQ yet. @param version of the promises that it reckons with. */
  async reserve(
    id: string,
    terms: JobTerms,
    size: JobSize,
    nowMs: number,
    { limits, version }: { limits?: QueueLimits; version?: number } = {},
  ): Promise<Reserved> {
    const job = recordOf(id, terms, size, nowMs);
    const minute = Math.floor(nowMs / 60_000);
    const [kind, which, stands] = (await this.#run(
      reserveScript,
      [
        JSON.stringify({ ...job, lane: laneOf(job as QueuedJob) }),
        ...limitNames.map((name) => limits?.[name] ?? ''),
        version ?? '',
      ],
      [`caravan:requests:${job.tenant}:${minute}`],
    )) as ['reserved' | 'known' | 'raced'] | ['full', number, string];
    if (kind !== 'full') return { kind };
    return { kind, limit: limitNames[which - 1]!, stands: Number(stands) };
  }

  /** BullMQ has the job: engines can choose it. */
  async enter(id: string): Promise<void> {
    await this.#run(enterScript, [id]);
  }

  async stand(): Promise<StandOfQueue> {
    const [promised, running, loads, waitingJobs, version] = (await this.#run(standScript, [
      MAX_STANDING,
    ])) as [string[], string[], string[], number, number];
    const parsed = (texts: readonly string[]) =>
      texts.map((text) => JSON.parse(text) as QueuedJob & { sinceMs?: number });
    const byPriority = new Map<number, number>();
    for (let i = 0; i < loads.length; i += 2) {
      byPriority.set(Number(loads[i]), Number(loads[i + 1]));
    }
    return {
      promised: parsed(promised).map(({ tokens, outputTokens, deadlineMs, sinceMs }) => ({
        ...{ tokens, outputTokens, deadlineMs: deadlineMs ?? Infinity },
        sinceMs: sinceMs ?? null,
      })),
      running: parsed(running).map(({ tokens, outputTokens, sinceMs }) => ({
        ...{ tokens, outputTokens, sinceMs: sinceMs ?? 0 },
      })),
      loads: byPriority,
      waitingJobs,
      version,
    };
  }

  async look(nowMs: number): Promise<Look> {
    const [kind, ...rest] = (await this.#run(lookScript, [nowMs, PROMOTED_MS])) as [
      'paused' | 'view',
      ...unknown[],
    ];
    if (kind === 'paused') return { kind };
    const [heads, due, oldest, times, floor, turn, next, strays, ...differences] = rest as [
      ...[string[], string[], string, string[], string, string, string],
      ...number[],
    ];
    const served = new Map<string, number>();
    for (let i = 0; i < times.length; i += 2) served.set(times[i]!, Number(times[i + 1]));
    return {
      kind,
      view: {
        heads: heads.map(jobOf),
        due: due.map(jobOf),
        oldest: oldest === '' ? null : jobOf(oldest),
        served,
        floor: Number(floor),
        turn: Number(turn),
      },
      nextDueMs: next === '' ? null : Number(next),
      hasStrays: strays === 1,
      isUneven: differences.some((difference) => difference !== 0),
    };
  }

  /** Puts the chosen job first in BullMQ. `raced`: another engine has it; `absent`: BullMQ does not. */
  async promote(choice: Choice, nowMs: number): Promise<'promoted' | 'raced' | 'absent'> {
    const { job, reason, start, charge, floor } = choice;
    // Among promoted jobs the more urgent is fetched first.
    const place = reason === 'promised' ? 0 : reason === 'aged' ? 1 : 1 + job.priority;
    return (await this.#run(promoteScript, [
      ...[job.id, nowMs, PROMOTED_MS, place, job.tenant, start, charge, floor],
    ])) as 'promoted' | 'raced' | 'absent';
  }

  /** BullMQ gave the job to this engine. @returns null when nobody had chosen it: it must go back. */
  async confirm(id: string, engineId: string, nowMs: number): Promise<HeldJob | null> {
    const text = (await this.#run(confirmScript, [id, nowMs, engineId])) as string | null;
    if (text === null) return null;
    const job = JSON.parse(text) as HeldJob;
    return { ...jobOf(text), sinceMs: job.sinceMs };
  }

  /** The job waits again. @param left what it still needs; as much as before where unknown. */
  async putBack(id: string, left: JobSize | null, isPreempted: boolean): Promise<void> {
    const size = [left?.tokens ?? '', left?.outputTokens ?? ''];
    await this.#run(putBackScript, [id, ...size, isPreempted ? 1 : 0]);
  }

  /** The job waits and runs no more. @param unusedTokens of what it was reckoned with. */
  async forget(id: string, unusedTokens = 0): Promise<void> {
    await this.#run(forgetScript, [id, unusedTokens]);
  }

  /** Takes in jobs that BullMQ would hand out unchosen, and those that it alone knows. */
  async adopt(nowMs: number): Promise<void> {
    const ids = (await this.#run(adoptScript, [`bull:${this.#queue}:`, nowMs])) as string[];
    await this.#addUnknown(ids, nowMs);
  }

  /** Makes the order and BullMQ agree on who waits and who runs. */
  async reconcile(nowMs: number): Promise<void> {
    await this.adopt(nowMs);
    const key = (part: (typeof orderParts)[number] | (typeof bullParts)[number]): string =>
      this.#keys[[...orderParts, ...bullParts].indexOf(part)]!;
    const results = await this.#redis
      .multi()
      .zrange(key('prioritized'), 0, '-1')
      .lrange(key('active'), 0, -1)
      .zrange(key('ages'), 0, '-1')
      .hgetall(key('waiting'))
      .hgetall(key('running'))
      .exec();
    const [prioritized, active, entered, waiting, running] = (results ?? []).map(
      ([error, answer]) => {
        if (error !== null) throw error;
        return answer;
      },
    ) as [string[], string[], string[], Record<string, string>, Record<string, string>];
    const hasEntered = new Set(entered);
    const strangers = prioritized.filter((id) => !hasEntered.has(id));
    await this.#addUnknown(strangers, nowMs);
    const [waits, runs] = [new Set(prioritized), new Set(active)];
    for (const [id, text] of Object.entries(waiting)) {
      const isOld = nowMs - jobOf(text).queuedMs > ON_ITS_WAY_MS;
      if (isOld && !waits.has(id) && !runs.has(id)) await this.forget(id);
    }
    for (const [id, text] of Object.entries(running)) {
      const isOld = nowMs - (JSON.parse(text) as HeldJob).sinceMs > ON_ITS_WAY_MS;
      if (waits.has(id)) await this.putBack(id, null, false);
      else if (isOld && !runs.has(id)) await this.forget(id);
    }
  }

  /** Brings jobs of BullMQ into the order, by what the journal knows of them. */
  async #addUnknown(ids: readonly string[], nowMs: number): Promise<void> {
    for (let start = 0; start < ids.length; start += PIPELINE_JOBS) {
      const part = ids.slice(start, start + PIPELINE_JOBS);
      const pipeline = this.#redis.pipeline();
      for (const id of part) pipeline.hmget(jobKey(id), 'request', 'terms', 'createdMs');
      for (const [i, [error, fields]] of ((await pipeline.exec()) ?? []).entries()) {
        if (error !== null) throw error;
        const [request, terms, createdMs] = fields as (string | null)[];
        const size =
          request == null
            ? { tokens: 0, outputTokens: 0 }
            : jobSizeOf(JSON.parse(request) as Request);
        const known = terms == null ? FOREIGN_TERMS : (JSON.parse(terms) as JobTerms);
        const queuedMs = createdMs == null ? nowMs : Number(createdMs);
        await this.reserve(part[i]!, known, size, queuedMs);
        await this.enter(part[i]!);
      }
    }
  }

  async #run(
    { text, digest }: Script,
    args: readonly (string | number)[],
    moreKeys: readonly string[] = [],
  ): Promise<unknown> {
    const keys = [...this.#keys, ...moreKeys];
    try {
      return await this.#redis.evalsha(digest, keys.length, ...keys, ...args);
    } catch (error) {
      // A Redis that was started again knows no scripts.
      if (!(error instanceof Error) || !error.message.startsWith('NOSCRIPT')) throw error;
      return this.#redis.eval(text, keys.length, ...keys, ...args);
    }
  }
}

/** A record as Redis keeps it: what is null is left out, since Lua takes JSON's null for true. */
function recordOf(id: string, terms: JobTerms, size: JobSize, queuedMs: number) {
  const { priority, deadlineMs, tenant, weight, latestStartMs } = terms;
  if (latestStartMs !== undefined && deadlineMs === null) {
    throw new CaravanError('internal', `job ${id} has a latest start and no deadline`);
  }
  return {
    ...{ id, tenant: tenant ?? DEFAULT_TENANT, weight: weight ?? 1, priority },
    deadlineMs: deadlineMs === null ? null : Math.round(deadlineMs),
    queuedMs: Math.round(queuedMs),
    tokens: size.tokens,
    outputTokens: size.outputTokens,
    ...(latestStartMs === undefined ? {} : { latestStartMs: Math.round(latestStartMs) }),
    preemptions: 0,
  };
}

function jobOf(text: string): QueuedJob {
  const { id, tenant, weight, priority, deadlineMs, queuedMs, tokens, outputTokens, ...rest } =
    JSON.parse(text) as Omit<QueuedJob, 'latestStartMs'> & { latestStartMs?: number };
  return {
    ...{ id, tenant, weight, priority, deadlineMs, queuedMs, tokens, outputTokens },
    latestStartMs: rest.latestStartMs ?? null,
    preemptions: rest.preemptions,
  };
}
