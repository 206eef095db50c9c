/** The order of one model's queue, as Redis keeps it beside BullMQ's own structures: see queue-order-scripts. */
import type { Redis } from 'ioredis';
import type { Stand } from './admission.js';
import { spansFrom, workOf } from './demand-spans.js';
import { sequenceCount, sequenceRequest } from './job-sequences.js';
import { jobKey } from './journal-keys.js';
import { createArgs } from './journal-scripts.js';
import type { Choice, HeldJob, OrderView } from './order.js';
import { enterScript, reserveScript } from './queue-entry-scripts.js';
import {
  adoptScript,
  bullParts,
  confirmScript,
  forgetScript,
  lookScript,
  orderParts,
  promoteScript,
  PROMOTED_MS,
  putBackScript,
  standScript,
} from './queue-order-scripts.js';
import {
  holdScript,
  hurryScript,
  mendScript,
  overdueScript,
  standingScript,
} from './queue-mend-scripts.js';
import { reserveArgs, type ReserveCheck } from './queue-reservation.js';
import { jobOf, queuedJobOf, recordOf } from './queue-record.js';
import type { JobTerms, Request } from './request.js';
import type { Commands, Script } from './store-script.js';

/** What the order knows of a job that was added to BullMQ by others and that no journal knows. */
const FOREIGN_TERMS: JobTerms = { priority: 100, deadlineMs: null };
/** What is in one of the two alone may be on its way into the other. */
const SETTLED_MS = 2_000;
/** An engine that has not ended a job so long after its deadline has died. */
const LATE_ENGINE_MS = 15_000;
/** Running jobs that an estimate reckons with. */
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

/** A job that the order has and BullMQ has lost. */
export interface LostJob {
  readonly id: string;
  readonly terms: JobTerms;
}

/** What stands in a queue, for all classes. */
export interface StandOfQueue extends Pick<Stand, 'promised' | 'running'> {
  /** Waiting tokens by priority. */
  readonly loads: ReadonlyMap<number, number>;
  readonly waitingJobs: number;
  /** Grows with every promise that is made or is no more. */
  readonly version: number;
}

export type Look =
  | { readonly kind: 'paused' }
  | {
      readonly kind: 'view';
      readonly view: OrderView;
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
    for (const each of [reserveScript, enterScript]) each.define(redis);
  }

  /** Makes room for a job that is not in BullMQ yet. */
  async reserve(id: string, terms: JobTerms, size: JobSize, nowMs: number): Promise<void> {
    await reserveScript.run(this.#redis, ...this.#reserving(id, terms, size, nowMs, {}));
  }

  /** As `reserve`, if `check` holds, as the next one of commands that this connection sends together. */
  reserveWith(
    commands: Commands,
    id: string,
    terms: JobTerms,
    size: JobSize,
    nowMs: number,
    check: ReserveCheck,
  ): void {
    reserveScript.queue(commands, ...this.#reserving(id, terms, size, nowMs, check));
  }

  /** BullMQ has the job: engines can choose it. */
  async enter(id: string): Promise<void> {
    await this.#run(enterScript, [id]);
  }

  /** As `enter`, as the next one of commands that this connection sends together. */
  enterWith(commands: Commands, id: string): void {
    enterScript.queue(commands, this.#keys, [id]);
  }

  async stand(): Promise<StandOfQueue> {
    const spans = spansFrom(Date.now());
    const fields = spans.flatMap(({ field }) => [`${field}:t`, `${field}:o`]);
    const [demands, texts, loads, waitingJobs, version] = (await this.#run(standScript, [
      ...[MAX_STANDING, ...fields],
    ])) as [(string | null)[], string[], string[], number, number];
    const running = texts.map((text) => {
      const { tokens, outputTokens, latestStartMs, sinceMs } = JSON.parse(text) as HeldJob;
      return { tokens, outputTokens, latestStartMs: latestStartMs as number | undefined, sinceMs };
    });
    const byPriority = new Map<number, number>();
    for (let i = 0; i < loads.length; i += 2) {
      byPriority.set(Number(loads[i]), Number(loads[i + 1]));
    }
    return {
      promised: [
        ...running.flatMap(({ latestStartMs, ...work }) =>
          latestStartMs === undefined
            ? []
            : [{ ...work, firstStartMs: latestStartMs, lastStartMs: latestStartMs }],
        ),
        ...workOf(spans, demands),
      ],
      running,
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
    const [heads, due, oldest, times, floor, turn, next, pressed, strays, ...differences] =
      rest as [
        ...[string[], string[], string, string[], string, string, string, string],
        ...number[],
      ];
    const served = new Map<string, number>();
    for (let i = 0; i < times.length; i += 2) served.set(times[i]!, Number(times[i + 1]));
    return {
      kind,
      view: {
        heads: heads.map(jobOf),
        due: due.map(jobOf),
        nextDue: next === '' ? null : jobOf(next),
        pressedFromMs: pressed === '' ? Infinity : Number(pressed),
        oldest: oldest === '' ? null : jobOf(oldest),
        served,
        floor: Number(floor),
        turn: Number(turn),
      },
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

  /** An engine runs the job, though Redis may have forgotten that it ever was in the queue. */
  async hold(job: HeldJob, engineId: string): Promise<void> {
    await this.#run(holdScript, [
      JSON.stringify({ ...recordOf(job), sinceMs: job.sinceMs, engine: engineId }),
    ]);
  }

  /** From `nowMs` on the job's time is over. */
  async hurry(id: string, nowMs: number): Promise<void> {
    await this.#run(hurryScript, [id, nowMs]);
  }

  /** Takes in jobs that BullMQ would hand out unchosen, and those that it alone knows. */
  async adopt(nowMs: number): Promise<void> {
    const ids = (await this.#run(adoptScript, [`bull:${this.#queue}:`, nowMs])) as string[];
    await this.#addUnknown(ids, nowMs);
  }

  /**
   * Makes the order, BullMQ and the journal agree on who waits and who runs.
   *
   * @returns jobs that BullMQ is to be given anew.
   */
  async reconcile(nowMs: number): Promise<LostJob[]> {
    await this.adopt(nowMs);
    const key = (part: (typeof orderParts)[number] | (typeof bullParts)[number]): string =>
      this.#keys[[...orderParts, ...bullParts].indexOf(part)]!;
    const results = await this.#redis
      .multi()
      .zrange(key('prioritized'), 0, '-1')
      .lrange(key('active'), 0, -1)
      .zrange(key('delayed'), 0, '-1')
      .zrange(key('ages'), 0, '-1')
      .hkeys(key('waiting'))
      .hkeys(key('running'))
      .hkeys(key('odd'))
      .exec();
    const [prioritized, active, delayed, ages, waiting, running, odd] = (results ?? []).map(
      ([error, answer]) => {
        if (error !== null) throw error;
        return answer as string[];
      },
    ) as [string[], string[], string[], string[], string[], string[], string[]];
    const entered = new Set(ages);
    const strangers = prioritized.filter((id) => !entered.has(id));
    // Where BullMQ would give them to an engine there is nothing to wait for.
    const lost = await this.mend(strangers, nowMs, 0);
    const [waits, runs, pauses] = [new Set(prioritized), new Set(active), new Set(delayed)];
    const differing = new Set(odd);
    for (const id of waiting) if (!waits.has(id) && !pauses.has(id)) differing.add(id);
    for (const id of running) if (!runs.has(id) && !pauses.has(id)) differing.add(id);
    return [...lost, ...(await this.mend([...differing], nowMs))];
  }

  /**
   * Settles what becomes of jobs that may stand differently in the order and in BullMQ.
   *
   * @param settledMs how long they must have differed.
   * @returns those that BullMQ is to be given anew.
   */
  async mend(ids: readonly string[], nowMs: number, settledMs = SETTLED_MS): Promise<LostJob[]> {
    const lost: LostJob[] = [];
    for (let start = 0; start < ids.length; start += PIPELINE_JOBS) {
      const part = ids.slice(start, start + PIPELINE_JOBS);
      const [unknown, absent, terms] = (await this.#run(mendScript, [
        ...[nowMs, settledMs, ...part],
      ])) as [string[], string[], string[]];
      await this.#addUnknown(unknown, nowMs);
      for (const [i, id] of absent.entries()) {
        lost.push({ id, terms: JSON.parse(terms[i]!) as JobTerms });
      }
    }
    return lost;
  }

  /** Whether BullMQ has the job among those that have not ended. */
  async isStanding(id: string): Promise<boolean> {
    return (await this.#run(standingScript, [id])) !== '';
  }

  /** Ids of jobs whose deadline has passed and that no engine ends, at most `limit`. */
  async overdue(nowMs: number, limit: number): Promise<string[]> {
    return (await this.#run(overdueScript, [nowMs, LATE_ENGINE_MS, limit])) as string[];
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

  /** Keys and arguments of `reserveScript`. */
  #reserving(
    id: string,
    terms: JobTerms,
    size: JobSize,
    nowMs: number,
    check: ReserveCheck,
  ): [keys: string[], args: (string | number)[]] {
    const job = queuedJobOf(id, terms, size, nowMs);
    const minute = Math.floor(nowMs / 60_000);
    return [
      [...this.#keys, `caravan:requests:${job.tenant}:${minute}`, jobKey(id)],
      [
        JSON.stringify(recordOf(job)),
        ...reserveArgs(check),
        ...(check.request === undefined ? [] : createArgs(check.request, terms)),
      ],
    ];
  }

  async #run(script: Script, args: readonly (string | number)[]): Promise<unknown> {
    return script.run(this.#redis, this.#keys, args);
  }
}
