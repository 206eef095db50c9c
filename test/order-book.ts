/** The order's sorted sets in memory, as the scripts of queue-order keep them in Redis: for tests of what is chosen. */
import { laneOf, type Choice, type OrderView, type QueuedJob } from '../coordinator/order.js';

export class OrderBook {
  /** By tenant, in the order of `compareJobs`. */
  readonly #lanes = new Map<string, QueuedJob[]>();
  /** Promised jobs, by latest start; all jobs, by age. */
  readonly #due: QueuedJob[] = [];
  readonly #ages: QueuedJob[] = [];
  /** See `OrderView`. */
  pressedFromMs = Infinity;
  readonly #served = new Map<string, number>();
  #floor = 0;
  #turn = 0;

  get size(): number {
    return this.#ages.length;
  }

  add(job: QueuedJob): void {
    const lane = this.#lanes.get(job.tenant) ?? [];
    this.#lanes.set(job.tenant, lane);
    insert(lane, job, byLane);
    insert(this.#ages, job, byAge);
    if (job.latestStartMs !== null) insert(this.#due, job, byLatestStart);
  }

  view(nowMs: number): OrderView {
    const due: QueuedJob[] = [];
    for (const job of this.#due) {
      if (job.latestStartMs! > nowMs || due.length === 64) break;
      due.push(job);
    }
    return {
      heads: [...this.#lanes.values()].flatMap(([head]) => (head === undefined ? [] : [head])),
      due,
      nextDue: this.#due[0] ?? null,
      pressedFromMs: this.pressedFromMs,
      oldest: this.#ages[0] ?? null,
      served: this.#served,
      floor: this.#floor,
      turn: this.#turn,
    };
  }

  take({ job, start, charge, floor }: Choice): void {
    remove(this.#lanes.get(job.tenant)!, job, byLane);
    remove(this.#ages, job, byAge);
    if (job.latestStartMs !== null) remove(this.#due, job, byLatestStart);
    this.#served.set(job.tenant, Math.max(this.#served.get(job.tenant) ?? 0, start) + charge);
    this.#floor = Math.max(this.#floor, floor);
    this.#turn += 1;
  }

  /** A tenant is not charged for what its job did not use. */
  refund({ tenant, weight }: QueuedJob, tokens: number): void {
    this.#served.set(tenant, (this.#served.get(tenant) ?? 0) - Math.max(0, tokens) / weight);
  }
}

/** Texts of jobs by which they are sorted, made once. */
const lanes = new WeakMap<QueuedJob, string>();

function knownLane(job: QueuedJob): string {
  const lane = lanes.get(job) ?? laneOf(job);
  lanes.set(job, lane);
  return lane;
}

/** As `compareJobs` says. */
function byLane(a: QueuedJob, b: QueuedJob): number {
  const [one, other] = [knownLane(a), knownLane(b)];
  return one < other ? -1 : one > other ? 1 : 0;
}

const byAge = (a: QueuedJob, b: QueuedJob): number => a.queuedMs - b.queuedMs || byLane(a, b);
const byLatestStart = (a: QueuedJob, b: QueuedJob): number =>
  a.latestStartMs! - b.latestStartMs! || byLane(a, b);

type Compare = (a: QueuedJob, b: QueuedJob) => number;

/** Where a job stands or would stand. */
function placeOf(sorted: readonly QueuedJob[], job: QueuedJob, compare: Compare): number {
  let [from, to] = [0, sorted.length];
  while (from < to) {
    const middle = (from + to) >> 1;
    if (compare(sorted[middle]!, job) < 0) from = middle + 1;
    else to = middle;
  }
  return from;
}

function insert(sorted: QueuedJob[], job: QueuedJob, compare: Compare): void {
  sorted.splice(placeOf(sorted, job, compare), 0, job);
}

function remove(sorted: QueuedJob[], job: QueuedJob, compare: Compare): void {
  const place = placeOf(sorted, job, compare);
  if (sorted[place]?.id !== job.id) throw new Error(`${job.id} is not in the order`);
  sorted.splice(place, 1);
}
