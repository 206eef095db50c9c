/**
 * When a job will start and end, and whether its deadline can be promised: pure, without clock or I/O.
 *
 * A job costs engines time: its rows, and its share of the fixed part of the steps that a full batch takes together. And
 * it needs its own time in a slot: its latest start is that much before its deadline. When time is short, promised jobs go
 * by latest start; a slot that is free goes to the next one, so that each of them starts no later than the engines have
 * done the work of those before it (Graham, "Bounds on multiprocessing timing anomalies", 1969). All deadlines hold if,
 * for every job, that is no later than its latest start. What was measured corrects both parts of the reckoning.
 */
import { AGED_TURN } from './order.js';
import type { Pace } from './pace.js';

export interface Power {
  /** Engines that are alive; at zero the estimates are those of one. */
  readonly engines: number;
  /** Sequences that one engine runs at once. */
  readonly slots: number;
  /** Rows that a step has at most: decodes, and prompt tokens beside them. */
  readonly stepRows: number;
  readonly pace: Pace;
  /** How much longer jobs ran than was reckoned, by what was seen; 1 before anything was. */
  readonly slowness: number;
  /** How much more of the engines' time work took than was reckoned; 1 for as much. */
  readonly overhead: number;
}

export interface Work {
  readonly tokens: number;
  readonly outputTokens: number;
}

/** A promised job, or several of which the latest starts lie between two times. */
export interface PromisedWork extends Work {
  readonly firstStartMs: number;
  readonly lastStartMs: number;
  /** When its engine took it; null while it waits. */
  readonly sinceMs: number | null;
}

/** What stands before a new job. */
export interface Stand {
  readonly power: Power;
  /** Promised jobs that wait, by latest start, and those that run. */
  readonly promised: readonly PromisedWork[];
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
  | {
      readonly kind: 'promised';
      readonly estimate: Estimate;
      readonly latestStartMs: number;
      /** When promised jobs, this one among them, need the engines for themselves. */
      readonly pressedFromMs: number;
    }
  /** `earliestEndMs`: a deadline that could be promised instead. */
  | { readonly kind: 'refused'; readonly estimate: Estimate; readonly earliestEndMs: number };

/** Promises take this share of the engines' time: old jobs have a turn of their own, and no reckoning is exact. */
const PROMISED_SHARE = 0.97 - 1 / AGED_TURN;
/** From its latest start to a free slot: the engine must look, and another job must leave. */
const TURN_MS = 750;

/** What a job costs the engines, in milliseconds of one of them with a full batch. */
export const costMs = ({ tokens, outputTokens }: Work, { pace, slots, overhead }: Power): number =>
  overhead * (pace.rowMs * tokens + (pace.stepMs * outputTokens) / slots);

/** Prompts get at least so many rows of a step, however many sequences decode. */
const LEAST_PROMPT_ROWS = 16;

/** Prompt tokens that a step has room for beside a full batch. */
export const promptRowsOf = ({ stepRows, slots }: Pick<Power, 'stepRows' | 'slots'>): number =>
  Math.max(stepRows - slots, LEAST_PROMPT_ROWS);

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
    const left = running.reduce((sum, each) => plus(sum, demandOf(each, power, nowMs)), NO_DEMAND);
    const runningMs = engineMsOf(left);
    // All that is before it, and as much of what runs as must leave first: on average half.
    waitMs = rate / engines + runningMs / engines / (before.jobs > 0 ? 1 : Math.max(2, slots));
  }
  const startMs = nowMs + waitMs;
  return { startMs, endMs: startMs + runMs(job, power, waitMs > 0) };
}

/** What a job takes of the engines, in milliseconds of one of them. */
interface Demand {
  /** For its rows. */
  readonly rowsMs: number;
  /** For the fixed part of the steps that its output needs, and that its prompt needs: the same steps serve both. */
  readonly decodesMs: number;
  readonly promptsMs: number;
}

const NO_DEMAND: Demand = { rowsMs: 0, decodesMs: 0, promptsMs: 0 };

/** What is left of a job. */
function demandOf(
  job: Work & { readonly sinceMs: number | null },
  power: Power,
  nowMs: number,
): Demand {
  const ownMs = power.overhead * runMs(job, { ...power, slowness: 1 }, true);
  const share = job.sinceMs === null ? 1 : Math.max(0.05, 1 - (nowMs - job.sinceMs) / ownMs);
  const { pace, slots, overhead } = power;
  const promptTokens = job.tokens - job.outputTokens;
  return {
    rowsMs: share * overhead * pace.rowMs * job.tokens,
    decodesMs: (share * overhead * pace.stepMs * job.outputTokens) / slots,
    promptsMs: (share * overhead * pace.stepMs * promptTokens) / promptRowsOf(power),
  };
}

const plus = (a: Demand, b: Demand): Demand => ({
  rowsMs: a.rowsMs + b.rowsMs,
  decodesMs: a.decodesMs + b.decodesMs,
  promptsMs: a.promptsMs + b.promptsMs,
});

const engineMsOf = ({ rowsMs, decodesMs, promptsMs }: Demand): number =>
  rowsMs + Math.max(decodesMs, promptsMs);

/** Whether a deadline can be promised. */
export function admit(job: Work, deadlineMs: number, stand: Stand, nowMs: number): Verdict {
  const { power, promised, running, before } = stand;
  const engines = Math.max(1, power.engines);
  const ownMs = runMs(job, power, true);
  const isIdle = running.length < engines * power.slots && before.jobs === 0;
  const turnMs = isIdle ? 0 : TURN_MS;
  const usual = estimate(job, stand, nowMs);
  const latestStartMs = deadlineMs - ownMs - turnMs;
  /** In which the engines do this much, if nothing else comes before it. */
  const timeOf = (demand: Demand): number => engineMsOf(demand) / engines / PROMISED_SHARE;
  let sum = NO_DEMAND;
  const waiting: PromisedWork[] = [];
  for (const other of promised) {
    if (other.sinceMs === null) waiting.push(other);
    else sum = plus(sum, demandOf(other, power, nowMs));
  }
  const place = waiting.findIndex((other) => other.firstStartMs > latestStartMs);
  const own = { ...job, firstStartMs: latestStartMs, lastStartMs: latestStartMs, sinceMs: null };
  waiting.splice(place === -1 ? waiting.length : place, 0, own);
  // For the new one and those behind it, and for all: when the engines must turn to promised jobs alone.
  let [laterPressedMs, pressedFromMs] = [Infinity, Infinity];
  let isBehind = false;
  const press = (startMs: number): void => {
    const pressedMs = startMs - timeOf(sum);
    pressedFromMs = Math.min(pressedFromMs, pressedMs);
    if (isBehind) laterPressedMs = Math.min(laterPressedMs, pressedMs);
  };
  for (const other of waiting) {
    isBehind ||= other === own;
    press(other.firstStartMs);
    sum = plus(sum, demandOf(other, power, nowMs));
    // Of several the last one starts when the others are done.
    if (other.lastStartMs > other.firstStartMs) press(other.lastStartMs);
  }
  if (laterPressedMs >= nowMs) {
    const endMs = Math.min(usual.endMs, deadlineMs);
    const startMs = Math.min(usual.startMs, Math.max(nowMs, latestStartMs));
    return { kind: 'promised', estimate: { startMs, endMs }, latestStartMs, pressedFromMs };
  }
  // A deadline behind all others that holds.
  return { kind: 'refused', estimate: usual, earliestEndMs: nowMs + timeOf(sum) + ownMs + turnMs };
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
