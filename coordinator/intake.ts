/**
 * Lets jobs into the queue: within its limits and those of their tenants, with an estimate, and, where they have a
 * deadline, with the promise that it will hold, or not at all.
 */
import { CaravanError } from '../proto/errors.js';
import { admit, estimate, type Estimate, type Power, type Stand } from './admission.js';
import { meanPace, SteadyPace } from './pace.js';
import type { JobQueue } from './queue.js';
import type { JobSize, StandOfQueue } from './queue-order.js';
import type { QueueLimits, ReserveCheck, Reserved } from './queue-reservation.js';
import type { JobTerms, Request } from './request.js';
import type { EngineBeat, Store } from './store.js';
import type { Tenant } from './tenant.js';

export interface IntakeRules {
  readonly admission: 'estimate' | 'off';
  /** Jobs of a model that wait, at most. */
  readonly maxQueuedJobs: number;
  /** Prompt and output tokens of a model that wait, at most. */
  readonly maxQueuedTokens: number;
  /** How long jobs are kept once they have ended. */
  readonly retentionS: number;
}

/** A job that was let in. */
export interface Admitted {
  readonly terms: JobTerms;
  /** Null where nothing was measured yet. */
  readonly estimate: Estimate | null;
}

interface Reckoned extends Admitted {
  /** Of the promises that were reckoned with. */
  readonly version: number;
  /** Where it is promised: see `Verdict`. */
  readonly pressedFromMs?: number;
}

/** Engines are asked for their pace this often; they say something new every two seconds. */
const POWER_EVERY_MS = 1_000;
/** Without deadlines, estimates may be this old. */
const STAND_EVERY_MS = 200;
/** Two gateways that promise at once: one of them reckons again. */
const PROMISE_ATTEMPTS = 8;
/** When the queue is full and nobody knows how fast it empties. */
const UNKNOWN_RETRY_S = 10;
const MAX_RETRY_S = 300;

interface KnownPower {
  readonly steady: SteadyPace;
  power: Power | null;
  atMs: number;
}

export class Intake {
  readonly #store: Store;
  readonly #rules: IntakeRules;
  readonly #powers = new Map<string, KnownPower>();
  readonly #stands = new Map<string, { readonly atMs: number; readonly stand: StandOfQueue }>();

  constructor(store: Store, rules: IntakeRules) {
    this.#store = store;
    this.#rules = rules;
  }

  /**
   * Puts a job into its queue, and into the journal.
   *
   * @param tenant whose quotas count; null for jobs that have none, as those of batches.
   * @throws CaravanError `queue_full`, `rate_limited`, `deadline_unmeetable`, `redis_unavailable`.
   */
  async admit(
    queue: JobQueue,
    id: string,
    request: Request,
    terms: JobTerms,
    size: JobSize,
    tenant: Tenant | null,
  ): Promise<Admitted> {
    const { model } = request;
    const { maxQueuedJobs, maxQueuedTokens, retentionS } = this.#rules;
    const own = tenant === null ? {} : { tenant: tenant.name, weight: tenant.weight };
    const kept: JobTerms = { ...terms, ...own, retentionS };
    if (tenant !== null && terms.priority < tenant.mostUrgent) {
      throw new CaravanError(
        'invalid_request',
        `priority: tenant ${tenant.name} may ask for ${tenant.mostUrgent} and more, got ${terms.priority}`,
        { param: 'priority' },
      );
    }
    const limits: QueueLimits = {
      jobs: maxQueuedJobs,
      tokens: maxQueuedTokens,
      tenantJobs: tenant?.maxJobs ?? null,
      tenantTokens: tenant?.maxQueuedTokens ?? null,
      tenantRequestsPerMinute: tenant?.requestsPerMinute ?? null,
    };
    for (let attempt = 1; ; attempt += 1) {
      const admitted = await this.#reckon(queue, model, kept, size, tenant);
      const { version, pressedFromMs } = admitted;
      // The last attempt does not mind: promises that were made meanwhile are few.
      const isChecked = pressedFromMs !== undefined && attempt < PROMISE_ATTEMPTS;
      const check: ReserveCheck = {
        ...{ limits, request, ...(isChecked ? { version } : {}) },
        ...(pressedFromMs === undefined ? {} : { pressedFromMs }),
      };
      const reserved = await queue.enqueue(id, admitted.terms, size, check);
      if (reserved.kind === 'full') throw this.#refusal(model, reserved, limits);
      const { terms: promised, estimate } = admitted;
      if (reserved.kind !== 'raced') return { terms: promised, estimate };
    }
  }

  /** Terms and estimate of a job as things stand. @throws CaravanError `deadline_unmeetable`. */
  async #reckon(
    queue: JobQueue,
    model: string,
    terms: JobTerms,
    size: JobSize,
    tenant: Tenant | null,
  ): Promise<Reckoned> {
    if (this.#rules.admission === 'off' || tenant === null) {
      return { terms, estimate: null, version: 0 };
    }
    const { deadlineMs, priority } = terms;
    const power = await this.#powerOf(model);
    if (power === null) return { terms, estimate: null, version: 0 };
    const nowMs = Date.now();
    const stood = await this.#standOf(queue, model, deadlineMs === null, nowMs);
    const stand: Stand = { ...stood, power, before: beforeOf(stood, priority) };
    const { version } = stood;
    if (deadlineMs === null) return { terms, estimate: estimate(size, stand, nowMs), version };
    const verdict = admit(size, deadlineMs, stand, nowMs);
    if (verdict.kind === 'promised') {
      // What no engine is there for cannot be promised, only not be refused.
      if (power.engines === 0) return { terms, estimate: verdict.estimate, version };
      const { latestStartMs, pressedFromMs } = verdict;
      const promised = { ...terms, latestStartMs };
      return { terms: promised, estimate: verdict.estimate, version, pressedFromMs };
    }
    const earliestS = Math.ceil((verdict.earliestEndMs - nowMs) / 1000);
    const wishedS = (deadlineMs - nowMs) / 1000;
    const wished = wishedS > 0 ? `${wishedS.toFixed(1)} s from now` : 'a time that has passed';
    throw new CaravanError(
      'deadline_unmeetable',
      `deadline: ${wished} cannot be met at the measured speed; ${earliestS} s could`,
      { param: 'deadline' },
    );
  }

  async #powerOf(model: string): Promise<Power | null> {
    const nowMs = Date.now();
    let known = this.#powers.get(model);
    if (known === undefined) {
      known = { steady: new SteadyPace(), power: null, atMs: -Infinity };
      this.#powers.set(model, known);
    }
    if (nowMs - known.atMs < POWER_EVERY_MS) return known.power;
    known.atMs = nowMs;
    const engines = (await this.#store.engines()).filter((engine) => engine.model === model);
    const reading =
      meanPace(engines.flatMap(({ pace }) => (pace === undefined ? [] : [pace]))) ??
      (await this.#store.lastPace(model));
    if (reading === null) return known.power;
    known.steady.add(reading, nowMs);
    const isNone = engines.length === 0;
    const meanOf = (of: (engine: EngineBeat) => number): number =>
      engines.reduce((sum, engine) => sum + of(engine), 0) / engines.length;
    const slots = isNone
      ? ((await this.#store.card(model))?.maxBatchSize ?? 1)
      : meanOf((engine) => engine.slots);
    const overhead = isNone ? 1 : meanOf((engine) => engine.overhead ?? 1);
    const stepRows = isNone ? Infinity : meanOf((engine) => engine.stepRows ?? Infinity);
    const slowness = Math.max(1, ...engines.map((engine) => engine.slowness ?? 1));
    const pace = known.steady.pace!;
    known.power = { engines: engines.length, slots, stepRows, pace, slowness, overhead };
    return known.power;
  }

  async #standOf(
    queue: JobQueue,
    model: string,
    mayBeOld: boolean,
    nowMs: number,
  ): Promise<StandOfQueue> {
    const kept = this.#stands.get(model);
    if (mayBeOld && kept !== undefined && nowMs - kept.atMs < STAND_EVERY_MS) return kept.stand;
    const stand = await queue.stand();
    this.#stands.set(model, { atMs: nowMs, stand });
    return stand;
  }

  /** What a client is told whose job finds no room. */
  #refusal(
    model: string,
    { limit, stands }: Extract<Reserved, { kind: 'full' }>,
    limits: QueueLimits,
  ): CaravanError {
    const most = limits[limit] ?? 0;
    const power = this.#powers.get(model)?.power ?? null;
    const { words, code } = limitWords[limit];
    const message = `${words} would be ${stands}, and at most ${most} are taken`;
    let retryAfterS = UNKNOWN_RETRY_S;
    if (limit === 'tenantRequestsPerMinute') {
      retryAfterS = Math.ceil((60_000 - (Date.now() % 60_000)) / 1000);
    } else if (power !== null) {
      const engines = Math.max(1, power.engines);
      const isTokens = limit === 'tokens' || limit === 'tenantTokens';
      const rows = isTokens ? stands - most : power.slots;
      retryAfterS = Math.ceil((rows * power.pace.rowMs) / engines / 1000);
    }
    retryAfterS = Math.min(Math.max(retryAfterS, 1), MAX_RETRY_S);
    return new CaravanError(code, `${message}; try again in ${retryAfterS} s`, { retryAfterS });
  }
}

function beforeOf({ loads, waitingJobs }: StandOfQueue, priority: number): Stand['before'] {
  let [tokens, total] = [0, 0];
  for (const [other, load] of loads) {
    total += load;
    if (other <= priority) tokens += load;
  }
  // Jobs are not counted by class: as many as the tokens' share of all.
  const jobs = total === 0 ? 0 : Math.ceil((waitingJobs * tokens) / total);
  return { tokens, jobs };
}

const limitWords: Readonly<
  Record<
    keyof QueueLimits,
    { readonly words: string; readonly code: 'queue_full' | 'rate_limited' }
  >
> = {
  jobs: { words: 'jobs in the queue', code: 'queue_full' },
  tokens: { words: 'tokens in the queue', code: 'queue_full' },
  tenantJobs: { words: "the tenant's jobs", code: 'rate_limited' },
  tenantTokens: { words: "the tenant's tokens in the queue", code: 'rate_limited' },
  tenantRequestsPerMinute: { words: "the tenant's requests of this minute", code: 'rate_limited' },
};
