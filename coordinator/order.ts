/**
 * Which waiting job comes next, and which running one makes room: pure, without clock or I/O.
 *
 * A choice looks, in this order, at
 *   1. every AGED_TURN-th time, the job that has waited longest, if that is long: nothing starves;
 *   2. jobs that were promised to end by their deadline: those that must start now, the earliest deadline first; and,
 *      while together they need all the time that is left for them, the one that must start next;
 *   3. the lowest priority number. Within it promised jobs come first, the earliest deadline before others; then the
 *      tenants take turns by what they were served, and a tenant's own jobs come by deadline, then by age.
 *
 * Fair shares are start-time fair queuing (Goyal, Vin, Cheng: "Start-time Fair Queuing", 1996): a tenant's virtual time
 * grows by tokens / weight of each of its jobs, whatever the job was chosen for; the tenant that is furthest behind
 * comes next; one that was away starts at the virtual time of the last job chosen, without a claim to what it missed.
 */

/** What the order knows of a job that waits. */
export interface QueuedJob {
  readonly id: string;
  readonly tenant: string;
  /** Share of the tenant, relative to those of others; above 0. */
  readonly weight: number;
  /** 1 (most urgent) to 1000: the class. */
  readonly priority: number;
  /** Unix time in milliseconds; null for none. */
  readonly deadlineMs: number | null;
  /** When it was submitted. */
  readonly queuedMs: number;
  /** Prompt and output tokens that are still to be computed, at most. */
  readonly tokens: number;
  /** Output tokens of its longest sequence that are still to come, at most. */
  readonly outputTokens: number;
  /** When it must start to end by its deadline, if that was promised; else null. */
  readonly latestStartMs: number | null;
  /** How often it has made room for a more urgent one. */
  readonly preemptions: number;
}

/** A job that an engine runs. */
export interface HeldJob extends QueuedJob {
  /** When this engine took it. */
  readonly sinceMs: number;
}

/** The part of the queue that decides. */
export interface OrderView {
  /** Of every tenant the waiting job that comes first by `compareJobs`. */
  readonly heads: readonly QueuedJob[];
  /** Promised jobs whose latest start has come. */
  readonly due: readonly QueuedJob[];
  /** Of the promised jobs that wait, the one that must start first. */
  readonly nextDue: QueuedJob | null;
  /** From then on promised jobs need the engines for themselves to end in time; Infinity where nothing is promised. */
  readonly pressedFromMs: number;
  /** The one that has waited longest. */
  readonly oldest: QueuedJob | null;
  /** Virtual times of tenants, in tokens / weight; 0 where left out. */
  readonly served: ReadonlyMap<string, number>;
  /** Virtual time of the last job that was chosen by its class. */
  readonly floor: number;
  /** Choices so far. */
  readonly turn: number;
}

export interface Choice {
  readonly job: QueuedJob;
  readonly reason: 'aged' | 'promised' | 'class';
  /** Virtual time at which its tenant starts it; `charge` later it ends. */
  readonly start: number;
  readonly charge: number;
  /** The view's floor after this choice. */
  readonly floor: number;
}

export interface OrderRules {
  /** A job that has waited this long gets its turn whatever else there is. */
  readonly agedAfterMs: number;
}

/** One choice in so many is for the job that has waited longest. */
export const AGED_TURN = 20;

/** The order of one tenant's jobs: by class, then by deadline, then by age. Total: ids differ. */
export function compareJobs(a: QueuedJob, b: QueuedJob): number {
  const [one, other] = [laneOf(a), laneOf(b)];
  return one < other ? -1 : one > other ? 1 : 0;
}

const NUMBER_DIGITS = 15;
const padded = (ms: number): string => String(Math.round(ms)).padStart(NUMBER_DIGITS, '0');

/** The same order as a text: texts of one tenant compare as `compareJobs` does, and its first one is its head. */
export function laneOf({ tenant, priority, deadlineMs, queuedMs, id }: QueuedJob): string {
  const when = deadlineMs === null ? `F${padded(queuedMs)}` : `D${padded(deadlineMs)}`;
  return `${tenant}/${String(priority).padStart(4, '0')}/${when}/${padded(queuedMs)}/${id}`;
}

/** @returns null when nothing waits. */
export function chooseJob(view: OrderView, nowMs: number, rules: OrderRules): Choice | null {
  const { oldest, due, turn } = view;
  const isAgedTurn = turn % AGED_TURN === AGED_TURN - 1;
  if (oldest !== null && isAgedTurn && nowMs - oldest.queuedMs >= rules.agedAfterMs) {
    return choiceOf(view, oldest, 'aged');
  }
  const mostDue = first(due, byDeadline) ?? (nowMs >= view.pressedFromMs ? view.nextDue : null);
  if (mostDue !== null) return choiceOf(view, mostDue, 'promised');
  const priority = Math.min(...view.heads.map((job) => job.priority));
  const heads = view.heads.filter((job) => job.priority === priority);
  const promised = heads.filter(({ latestStartMs }) => latestStartMs !== null);
  const next =
    first(promised, byDeadline) ??
    first(heads, (a, b) => startOf(view, a) - startOf(view, b) || compareJobs(a, b));
  return next === null ? null : choiceOf(view, next, 'class');
}

function choiceOf(view: OrderView, job: QueuedJob, reason: Choice['reason']): Choice {
  const start = startOf(view, job);
  // Jobs that come out of turn are paid for, but do not make the others forget what they have a claim to.
  const isInTurn = reason === 'class' && job.latestStartMs === null;
  const floor = isInTurn ? Math.max(view.floor, start) : view.floor;
  return { job, reason, start, charge: job.tokens / job.weight, floor };
}

const startOf = ({ served, floor }: OrderView, { tenant }: QueuedJob): number =>
  Math.max(floor, served.get(tenant) ?? 0);

const byDeadline = (a: QueuedJob, b: QueuedJob): number =>
  (a.deadlineMs ?? Infinity) - (b.deadlineMs ?? Infinity) || compareJobs(a, b);

function first<T>(jobs: readonly T[], compare: (a: T, b: T) => number): T | null {
  let best: T | null = null;
  for (const job of jobs) if (best === null || compare(job, best) < 0) best = job;
  return best;
}

/** Among the jobs that an engine runs, prompts of a lower number are computed first: promised ones, then by class. */
export const urgencyOf = ({ latestStartMs, priority }: QueuedJob): number =>
  latestStartMs ?? UNPROMISED_URGENCY + priority;

/** Behind every time. */
const UNPROMISED_URGENCY = 1e14;

/** A job makes room this often at most, so that every one of them ends. */
export const MAX_PREEMPTIONS = 3;
/** A job that was just taken has cost a prefill: it is left to give something for it. */
const MIN_HELD_MS = 1_000;
/** A class preempts those whose number is this many times its own. */
const PREEMPTING_RATIO = 4;
/** A promised job that could start this much later may make room, too. */
const PROMISED_SLACK_MS = 5_000;

/**
 * The running job that makes room for a chosen one: the least urgent of those that may.
 *
 * @returns null when the chosen one must wait for a slot.
 */
export function chooseVictim(
  { job, reason }: Pick<Choice, 'job' | 'reason'>,
  held: readonly HeldJob[],
  nowMs: number,
): HeldJob | null {
  if (reason === 'aged') return null;
  const isDue = job.latestStartMs !== null && job.latestStartMs <= nowMs;
  const mayYield = (other: HeldJob): boolean => {
    if (other.preemptions >= MAX_PREEMPTIONS || nowMs - other.sinceMs < MIN_HELD_MS) return false;
    const { latestStartMs } = other;
    if (latestStartMs !== null && latestStartMs - nowMs < PROMISED_SLACK_MS) return false;
    if (reason === 'class') return job.priority * PREEMPTING_RATIO <= other.priority;
    // One that was promised, too, leaves only for one that must start now: what it has cost is lost.
    return latestStartMs === null || (isDue && byDeadline(job, other) < 0);
  };
  return first(held.filter(mayYield), byLeastUrgent);
}

const byLeastUrgent = (a: HeldJob, b: HeldJob): number =>
  Number(a.latestStartMs !== null) - Number(b.latestStartMs !== null) ||
  b.priority - a.priority ||
  (b.deadlineMs ?? Infinity) - (a.deadlineMs ?? Infinity) ||
  b.sinceMs - a.sinceMs ||
  compareJobs(a, b);
