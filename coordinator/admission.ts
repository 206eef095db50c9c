/**
 * When a job will start and end, and whether its deadline can be promised: pure, without clock or I/O.
 *
 * A job costs engines time: its rows, and its share of the fixed part of the steps that a full batch takes together.
 * Promised jobs go by deadline (EDF), so that all deadlines hold if, for every one of them, the time that the jobs up to it
 * cost fits before it (the processor-demand test; Liu and Layland 1973, Baruah et al. 1990). Beside that, a job needs
 * its own time in a slot: its latest start is that much before its deadline, and what was measured of such
 * times corrects what is reckoned.
 */
import { AGED_TURN } from './order.js';
import type { Pace } from './pace.js';

export interface Power {
  /** Engines that are alive; at zero the estimates are those of one. */
  readonly engines: number;
  /** Sequences that one engine runs at once. */
  readonly slots: number;
  readonly pace: Pace;
  /** How much longer jobs ran than was reckoned, by what was seen; 1 before anything was. */
  readonly slowness: number;
}

export interface Work {
  readonly tokens: number;
  readonly outputTokens: number;
}

export interface PromisedJob extends Work {
  readonly deadlineMs: number;
  /** When its engine took it; null while it waits. */
  readonly sinceMs: number | null;
}

/** What stands before a new job. */
export interface Stand {
  readonly power: Power;
  /** All promised jobs, that wait or run, by deadline. */
  readonly promised: readonly PromisedJob[];
  /** Jobs that run, promised or not. */
  readonly running: readonly (Work & { readonly sinceMs: number })[];
  /** Work that waits and comes before it by its class, promised jobs of it included. */
  readonly before: { readonly tokens: number; readonly jobs: number };
}

export interface Estimate {
  readonly startMs: number;
  readonly endMs: number;
}

export type Verdict =
  | { readonly kind: 'promised'; readonly estimate: Estimate; readonly latestStartMs: number }
  /** `earliestEndMs`: a deadline that could be promised instead. */
  | { readonly kind: 'refused'; readonly estimate: Estimate; readonly earliestEndMs: number };

/** Promises take this share of the engines' time: old jobs have a turn of their own, and no reckoning is exact. */
const PROMISED_SHARE = 0.97 - 1 / AGED_TURN;
/** From its latest start to a free slot: the engine must look, and another job must leave. */
const TURN_MS = 750;

/** What a job costs the engines, in milliseconds of one of them with a full batch. */
export const costMs = ({ tokens, outputTokens }: Work, { pace, slots }: Power): number =>
  pace.rowMs * tokens + (pace.stepMs * outputTokens) / slots;

/** How long a job holds a slot. @param isBusy with a full batch beside it, or as many as there are now. */
export function runMs({ tokens, outputTokens }: Work, power: Power, isBusy: boolean): number {
  const { pace, slots, slowness } = power;
  const fullStepMs = pace.stepMs + pace.rowMs * slots;
  const stepMs = isBusy ? Math.max(fullStepMs, pace.recentStepMs) : pace.recentStepMs;
  const reckonedMs = pace.rowMs * (tokens - outputTokens) + stepMs * Math.max(1, outputTokens);
  return reckonedMs * (isBusy ? slowness : 1);
}

/** When a job of a class will probably start and end. */
export function estimate(job: Work, stand: Stand, nowMs: number): Estimate {
  const { power, running, before } = stand;
  const engines = Math.max(1, power.engines);
  const slots = engines * power.slots;
  let waitMs = 0;
  if (running.length >= slots || before.jobs > 0) {
    const rate = costMs({ tokens: before.tokens, outputTokens: 0 }, power);
    const runningMs = running.reduce((sum, each) => sum + demandOf(each, power, nowMs).engineMs, 0);
    // All that is before it, and as much of what runs as must leave first: on average half.
    waitMs = rate / engines + runningMs / engines / (before.jobs > 0 ? 1 : Math.max(2, slots));
  }
  const startMs = nowMs + waitMs;
  return { startMs, endMs: startMs + runMs(job, power, waitMs > 0) };
}

/** What a job takes of engines and slots, in milliseconds of one of each. */
interface Demand {
  readonly engineMs: number;
  readonly slotMs: number;
}

/** What is left of a job. */
function demandOf(
  job: Work & { readonly sinceMs: number | null },
  power: Power,
  nowMs: number,
): Demand {
  const ownMs = runMs(job, { ...power, slowness: 1 }, true);
  const share = job.sinceMs === null ? 1 : Math.max(0.05, 1 - (nowMs - job.sinceMs) / ownMs);
  return { engineMs: share * costMs(job, power), slotMs: share * ownMs };
}

const plus = (a: Demand, b: Demand): Demand => ({
  engineMs: a.engineMs + b.engineMs,
  slotMs: a.slotMs + b.slotMs,
});

/** Whether a deadline can be promised. */
export function admit(job: Work, deadlineMs: number, stand: Stand, nowMs: number): Verdict {
  const { power, promised, running, before } = stand;
  const engines = Math.max(1, power.engines);
  const ownMs = runMs(job, power, true);
  const isIdle = running.length < engines * power.slots && before.jobs === 0;
  const turnMs = isIdle ? 0 : TURN_MS;
  const usual = estimate(job, stand, nowMs);
  /** Whether what deadlines up to some time take is there until then. */
  const fits = ({ engineMs, slotMs }: Demand, untilMs: number): boolean =>
    Math.max(engineMs, slotMs / power.slots) <= (untilMs - nowMs) * engines * PROMISED_SHARE;
  const own = demandOf({ ...job, sinceMs: null }, power, nowMs);
  let sum: Demand = { engineMs: 0, slotMs: 0 };
  let isCounted = false;
  let doesFit = nowMs + ownMs + turnMs <= deadlineMs;
  for (const other of promised) {
    if (!isCounted && other.deadlineMs > deadlineMs) {
      sum = plus(sum, own);
      isCounted = true;
      doesFit &&= fits(sum, deadlineMs);
    }
    sum = plus(sum, demandOf(other, power, nowMs));
    if (isCounted) doesFit &&= fits(sum, other.deadlineMs);
  }
  if (!isCounted) {
    sum = plus(sum, own);
    doesFit &&= fits(sum, deadlineMs);
  }
  if (doesFit) {
    const latestStartMs = deadlineMs - ownMs - turnMs;
    const endMs = Math.min(usual.endMs, deadlineMs);
    const startMs = Math.min(usual.startMs, Math.max(nowMs, latestStartMs));
    return { kind: 'promised', estimate: { startMs, endMs }, latestStartMs };
  }
  // A deadline behind all others that holds.
  const lastMs = Math.max(sum.engineMs, sum.slotMs / power.slots) / engines / PROMISED_SHARE;
  const earliestEndMs = nowMs + Math.max(lastMs, ownMs + turnMs);
  return { kind: 'refused', estimate: usual, earliestEndMs };
}

/**
 * How much longer jobs run than is reckoned, learned from those that ended: the mean of the ratios and their spread, so
 * that few are beyond it.
 */
export class Slowness {
  #mean = 1;
  #spread = 0.1;
  #count = 0;

  /** @param ratio of the time that a job ran to what was reckoned. */
  add(ratio: number): void {
    // The first ones count more, so that a wrong start is soon forgotten.
    const share = Math.max(1 / (this.#count + 4), 0.01);
    this.#count += 1;
    const bounded = Math.min(Math.max(ratio, 0.05), 20);
    const distance = Math.abs(bounded - this.#mean);
    this.#mean += share * (bounded - this.#mean);
    this.#spread += share * (distance - this.#spread);
  }

  /** Mean and three times the mean distance from it. */
  get factor(): number {
    return this.#mean + 3 * this.#spread;
  }
}
