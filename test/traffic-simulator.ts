/**
 * A simulator of time: an engine whose steps cost what they cost, requests that arrive as a trace says, and the
 * production order, preemption, admission and step planning between them. Nothing waits; an hour takes seconds.
 */
import {
  admit,
  runMs,
  Slowness,
  type Power,
  type PromisedWork,
  type Stand,
} from '../coordinator/admission.js';
import {
  chooseJob,
  chooseVictim,
  urgencyOf,
  type HeldJob,
  type QueuedJob,
} from '../coordinator/order.js';
import { Overhead } from '../coordinator/overhead.js';
import { SteadyPace, type Pace } from '../coordinator/pace.js';
import { planStep } from '../coordinator/scheduler.js';
import { clairvoyantTokens } from './clairvoyant.js';
import { OrderBook } from './order-book.js';
import { Random } from './random.js';

export interface Arrival {
  readonly atMs: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
  readonly tenant: string;
  readonly weight: number;
  readonly priority: number;
  /** From its arrival; null for none. */
  readonly deadlineAfterMs: number | null;
}

export interface World {
  /** What a step really costs. */
  readonly pace: Pace;
  readonly slots: number;
  readonly maxStepRows: number;
  /** Every reading of the pace is off by up to this share, anew each time. */
  readonly readingError: number;
  /** All readings are off by this share. */
  readonly bias: number;
  /** What is reckoned for a job is off by up to this share, for each job anew: admission hears of another size. */
  readonly jobError: number;
  readonly agedAfterMs: number;
  readonly seed: number;
}

export interface Outcome {
  readonly jobs: number;
  readonly accepted: number;
  readonly refused: number;
  /** Accepted jobs that ended after their deadline, and by how much the worst. */
  readonly missed: number;
  readonly worstLatenessMs: number;
  /** Tokens of accepted jobs with a deadline, and of those that a clairvoyant EDF accepts. */
  readonly acceptedTokens: number;
  readonly clairvoyantTokens: number;
  /** By how much the share of a tenant was off, while all of them had jobs waiting; null when that was never so. */
  readonly fairShareError: number | null;
  readonly sharedMs: number;
  /** Jobs that never ended. */
  readonly starved: number;
  readonly longestWaitMs: number;
  readonly preemptions: number;
  readonly busyShare: number;
  readonly endMs: number;
  readonly slowness: number;
  readonly overhead: number;
}

const READING_EVERY_MS = 2_000;
const PREEMPT_EVERY_MS = 500;

interface SimulatedJob {
  readonly arrival: Arrival;
  readonly queued: QueuedJob;
  /** What was reckoned for its run, without the correction by what was seen. */
  readonly reckonedMs: number;
  generated: number;
}

interface RunningJob extends SimulatedJob {
  readonly slot: number;
  readonly held: HeldJob;
  readonly urgency: number;
  readonly draft: readonly number[];
  prefillLeft: number;
}

export function simulate(arrivals: readonly Arrival[], world: World): Outcome {
  return new Simulation(arrivals, world).run();
}

class Simulation {
  readonly #arrivals: readonly Arrival[];
  readonly #world: World;
  readonly #random: Random;
  readonly #book = new OrderBook();
  readonly #steady = new SteadyPace();
  readonly #slowness = new Slowness();
  readonly #overhead: Overhead;
  readonly #jobs = new Map<string, SimulatedJob>();
  readonly #promised = new Map<string, PromisedWork>();
  /** Ids of the same, by latest start. */
  readonly #promisedIds: string[] = [];
  readonly #freeSlots: number[];
  #running: RunningJob[] = [];
  #waitingTokens = new Map<number, { tokens: number; jobs: number }>();
  #waitingByTenant = new Map<string, number>();
  #nowMs = 0;
  #nextReadingMs = 0;
  #nextPreemptMs = 0;
  #recentStepMs: number;
  readonly #served = new Map<string, number>();
  readonly #tenantWeights = new Map<string, number>();
  #sharedMs = 0;
  #busyMs = 0;
  #ended = 0;
  #accepted = 0;
  #refused = 0;
  #missed = 0;
  #worstLatenessMs = 0;
  #acceptedTokens = 0;
  #longestWaitMs = 0;
  #preemptions = 0;

  constructor(arrivals: readonly Arrival[], world: World) {
    this.#arrivals = arrivals;
    this.#world = world;
    this.#random = new Random(world.seed);
    this.#overhead = new Overhead(world.slots);
    this.#freeSlots = Array.from({ length: world.slots }, (_, i) => i);
    this.#recentStepMs = world.pace.stepMs + world.pace.rowMs;
    for (const { tenant, weight } of arrivals) this.#tenantWeights.set(tenant, weight);
  }

  run(): Outcome {
    let next = 0;
    for (;;) {
      if (this.#running.length === 0 && this.#book.size === 0) {
        const arrival = this.#arrivals[next];
        if (arrival === undefined) break;
        this.#nowMs = Math.max(this.#nowMs, arrival.atMs);
      }
      this.#read();
      while ((this.#arrivals[next]?.atMs ?? Infinity) <= this.#nowMs) {
        this.#submit(this.#arrivals[next]!, next);
        next += 1;
      }
      this.#fill();
      this.#makeRoom();
      this.#step();
    }
    return this.#outcome();
  }

  /** Engines tell how fast they are, with an error. */
  #read(): void {
    if (this.#nowMs < this.#nextReadingMs) return;
    this.#nextReadingMs = this.#nowMs + READING_EVERY_MS;
    const { pace, readingError, bias } = this.#world;
    const off = (1 + bias) * (1 + readingError * (2 * this.#random.next() - 1));
    this.#steady.add(
      {
        stepMs: pace.stepMs * off,
        rowMs: pace.rowMs * off,
        recentStepMs: this.#recentStepMs * off,
      },
      this.#nowMs,
    );
  }

  #power(slowness: number): Power {
    const { slots, maxStepRows: stepRows } = this.#world;
    const overhead = this.#overhead.factor;
    return { engines: 1, slots, stepRows, pace: this.#steady.pace!, slowness, overhead };
  }

  #submit(arrival: Arrival, number: number): void {
    const { promptTokens, outputTokens, priority, deadlineAfterMs } = arrival;
    const off = 1 + this.#world.jobError * (2 * this.#random.next() - 1);
    const size = {
      tokens: Math.ceil(off * (promptTokens + outputTokens)),
      outputTokens: Math.ceil(off * outputTokens),
    };
    const deadlineMs = deadlineAfterMs === null ? null : arrival.atMs + deadlineAfterMs;
    let latestStartMs: number | null = null;
    if (deadlineMs !== null) {
      const verdict = admit(size, deadlineMs, this.#stand(priority), this.#nowMs);
      if (verdict.kind === 'refused') {
        this.#refused += 1;
        return;
      }
      ({ latestStartMs } = verdict);
      this.#book.pressedFromMs = verdict.pressedFromMs;
      this.#acceptedTokens += promptTokens + outputTokens;
    }
    this.#accepted += 1;
    const id = `job-${String(number).padStart(6, '0')}`;
    const { tenant, weight } = arrival;
    const queued: QueuedJob = {
      ...{ id, tenant, weight, priority, deadlineMs, queuedMs: arrival.atMs, ...size },
      ...{ latestStartMs, preemptions: 0 },
    };
    const reckonedMs = runMs(size, this.#power(1), true);
    this.#jobs.set(id, { arrival, queued, reckonedMs, generated: 0 });
    if (latestStartMs !== null) {
      const start = latestStartMs;
      const starts = { firstStartMs: start, lastStartMs: start };
      this.#promised.set(id, { ...size, ...starts, sinceMs: null });
      const later = this.#promisedIds.findIndex(
        (other) => this.#promised.get(other)!.firstStartMs > start,
      );
      this.#promisedIds.splice(later === -1 ? this.#promisedIds.length : later, 0, id);
    }
    this.#book.add(queued);
    this.#countWaiting(queued, 1);
  }

  #stand(priority: number): Stand {
    const before = { tokens: 0, jobs: 0 };
    for (const [other, { tokens, jobs }] of this.#waitingTokens) {
      if (other > priority) continue;
      before.tokens += tokens;
      before.jobs += jobs;
    }
    return {
      power: this.#power(this.#slowness.factor),
      promised: this.#promisedIds.map((id) => this.#promised.get(id)!),
      running: this.#running.map(({ held }) => held),
      before,
    };
  }

  #countWaiting({ priority, tokens, tenant }: QueuedJob, sign: 1 | -1): void {
    const stands = this.#waitingTokens.get(priority) ?? { tokens: 0, jobs: 0 };
    stands.tokens += sign * tokens;
    stands.jobs += sign;
    this.#waitingTokens.set(priority, stands);
    this.#waitingByTenant.set(tenant, (this.#waitingByTenant.get(tenant) ?? 0) + sign);
  }

  #fill(): void {
    while (this.#freeSlots.length > 0) {
      const { agedAfterMs } = this.#world;
      const choice = chooseJob(this.#book.view(this.#nowMs), this.#nowMs, { agedAfterMs });
      if (choice === null) return;
      this.#book.take(choice);
      this.#countWaiting(choice.job, -1);
      const job = this.#jobs.get(choice.job.id)!;
      const held: HeldJob = { ...choice.job, sinceMs: this.#nowMs };
      const prefillLeft = job.arrival.promptTokens + job.generated;
      const slot = this.#freeSlots.pop()!;
      this.#running.push({ ...job, held, prefillLeft, slot, urgency: urgencyOf(held), draft: [] });
      const promise = this.#promised.get(held.id);
      if (promise !== undefined) {
        this.#promised.set(held.id, { ...promise, sinceMs: this.#nowMs });
      }
      this.#longestWaitMs = Math.max(this.#longestWaitMs, this.#nowMs - held.queuedMs);
    }
  }

  #makeRoom(): void {
    if (this.#freeSlots.length > 0 || this.#nowMs < this.#nextPreemptMs) return;
    this.#nextPreemptMs = this.#nowMs + PREEMPT_EVERY_MS;
    // One job makes room for one other; the next choice may ask again.
    for (let i = 0; i < this.#world.slots; i += 1) {
      const { agedAfterMs } = this.#world;
      const choice = chooseJob(this.#book.view(this.#nowMs), this.#nowMs, { agedAfterMs });
      if (choice === null) return;
      const held = this.#running.map((job) => job.held);
      const victim = chooseVictim(choice, held, this.#nowMs);
      if (victim === null) return;
      this.#putBack(this.#running.find(({ held: { id } }) => id === victim.id)!);
      this.#fill();
    }
  }

  #putBack(job: RunningJob): void {
    this.#preemptions += 1;
    this.#leave(job);
    const { tokens, outputTokens, preemptions } = job.held;
    const done = job.generated - this.#jobs.get(job.held.id)!.generated;
    const queued: QueuedJob = {
      ...job.queued,
      // What it has written is fed again, like its prompt.
      tokens,
      outputTokens: Math.max(1, outputTokens - done),
      preemptions: preemptions + 1,
    };
    this.#book.refund(job.held, tokens);
    this.#jobs.set(queued.id, { ...job, queued, generated: job.generated });
    const promise = this.#promised.get(queued.id);
    if (promise !== undefined) this.#promised.set(queued.id, { ...promise, sinceMs: null });
    this.#book.add(queued);
    this.#countWaiting(queued, 1);
  }

  #leave(job: RunningJob): void {
    this.#running = this.#running.filter((other) => other !== job);
    this.#freeSlots.push(job.slot);
  }

  #step(): void {
    if (this.#running.length === 0) return;
    const { pace, maxStepRows } = this.#world;
    const isShared = [...this.#tenantWeights.keys()].every(
      (tenant) => (this.#waitingByTenant.get(tenant) ?? 0) > 0,
    );
    const plan = planStep(this.#running, { tokenBudget: maxStepRows, maxChunkTokens: maxStepRows });
    const rows = plan.decodes.length + plan.chunks.reduce((sum, { count }) => sum + count, 0);
    const stepMs = pace.stepMs + pace.rowMs * rows;
    const ended = plan.chunks.filter(({ sequence, count }) => sequence.prefillLeft === count);
    const decodes = plan.decodes.length + ended.length;
    const isFull = this.#freeSlots.length === 0;
    const promptRows = rows - plan.decodes.length;
    const seen = { rows, promptRows, decodes, stepRows: maxStepRows, isFull, wallMs: stepMs };
    this.#overhead.add(seen, this.#steady.pace!);
    this.#nowMs += stepMs;
    this.#busyMs += stepMs;
    this.#recentStepMs += 0.02 * (stepMs - this.#recentStepMs);
    if (isShared) this.#sharedMs += stepMs;
    const serve = ({ queued: { tenant } }: RunningJob, tokens: number): void => {
      if (isShared) this.#served.set(tenant, (this.#served.get(tenant) ?? 0) + tokens);
    };
    for (const job of plan.decodes) {
      job.generated += 1;
      serve(job, 1);
    }
    for (const { sequence: job, count } of plan.chunks) {
      job.prefillLeft -= count;
      if (job.prefillLeft === 0) job.generated += 1;
      serve(job, count);
    }
    for (const job of [...this.#running]) {
      if (job.generated >= job.arrival.outputTokens) this.#end(job);
    }
  }

  #end(job: RunningJob): void {
    this.#leave(job);
    this.#ended += 1;
    const { id, deadlineMs, sinceMs, preemptions } = job.held;
    if (preemptions === 0 && deadlineMs !== null) {
      this.#slowness.add((this.#nowMs - sinceMs) / job.reckonedMs);
    }
    if (this.#promised.delete(id)) this.#promisedIds.splice(this.#promisedIds.indexOf(id), 1);
    if (deadlineMs === null || this.#nowMs <= deadlineMs) return;
    this.#missed += 1;
    this.#worstLatenessMs = Math.max(this.#worstLatenessMs, this.#nowMs - deadlineMs);
  }

  #outcome(): Outcome {
    return {
      jobs: this.#arrivals.length,
      accepted: this.#accepted,
      refused: this.#refused,
      missed: this.#missed,
      worstLatenessMs: this.#worstLatenessMs,
      acceptedTokens: this.#acceptedTokens,
      clairvoyantTokens: clairvoyantTokens(this.#arrivals, this.#world),
      fairShareError: this.#sharedMs > 0 ? this.#fairShareError() : null,
      sharedMs: this.#sharedMs,
      starved: this.#accepted - this.#ended,
      longestWaitMs: this.#longestWaitMs,
      preemptions: this.#preemptions,
      busyShare: this.#busyMs / this.#nowMs,
      endMs: this.#nowMs,
      slowness: this.#slowness.factor,
      overhead: this.#overhead.factor,
    };
  }

  #fairShareError(): number {
    const total = [...this.#served.values()].reduce((a, b) => a + b, 0);
    const weights = [...this.#tenantWeights.values()].reduce((a, b) => a + b, 0);
    return Math.max(
      ...[...this.#tenantWeights].map(([tenant, weight]) =>
        Math.abs((this.#served.get(tenant) ?? 0) / total / (weight / weights) - 1),
      ),
    );
  }
}
