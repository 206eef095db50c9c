/** The order's sorted sets in memory, as the scripts of queue-order keep them in Redis: for tests of what is chosen. */
import { compareJobs, type Choice, type OrderView, type QueuedJob } from '../coordinator/order.js';

export class OrderBook {
  /** By tenant, in the order of `compareJobs`. */
  readonly #lanes = new Map<string, QueuedJob[]>();
  /** Promised jobs, by latest start; all jobs, by age. */
  readonly #due: QueuedJob[] = [];
  readonly #ages: QueuedJob[] = [];
  readonly #served = new Map<string, number>();
  #floor = 0;
  #turn = 0;

  get size(): number {
    return this.#ages.length;
  }

  add(job: QueuedJob): void {
    const lane = this.#lanes.get(job.tenant) ?? [];
    this.#lanes.set(job.tenant, lane);
    insert(lane, job, compareJobs);
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
      oldest: this.#ages[0] ?? null,
      served: this.#served,
      floor: this.#floor,
      turn: this.#turn,
    };
  }

  /** When the next promised job must start; Infinity for none. */
  get nextDueMs(): number {
    return this.#due[0]?.latestStartMs ?? Infinity;
  }

  take({ job, start, charge, floor }: Choice): void {
    remove(this.#lanes.get(job.tenant)!, job, compareJobs);
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

const byAge = (a: QueuedJob, b: QueuedJob): number => a.queuedMs - b.queuedMs || compareJobs(a, b);
const byLatestStart = (a: QueuedJob, b: QueuedJob): number =>
  a.latestStartMs! - b.latestStartMs! || compareJobs(a, b);

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
