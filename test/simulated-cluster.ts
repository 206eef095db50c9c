/**
 * A cluster in simulated time. What decides is the production code: the scheduler of steps, the measured speed, the
 * meter of work behind the scaler, what a Pod costs to take away. What is simulated is the time that steps and loading take.
 */
import { deletionCost } from '../coordinator/pod-deletion-cost.js';
import { EngineHealth } from '../coordinator/engine-health.js';
import { EngineSpeed, type Speed } from '../coordinator/engine-speed.js';
import { remainingTokens } from '../coordinator/queue-backlog.js';
import type { ModelCard } from '../coordinator/request.js';
import { planStep, type StepPlan } from '../coordinator/scheduler.js';
import type { EngineBeat } from '../coordinator/store.js';
import { WorkMeter } from '../coordinator/work.js';
import { EventQueue } from './event-queue.js';

export interface Arrival {
  readonly atS: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
}

/** An engine whose steps take a time that is linear in what they do. */
export interface EngineModel {
  readonly slots: number;
  readonly maxSeqLen: number;
  readonly maxStepRows: number;
  readonly loadS: number;
  /** Of a step: at least, for each decoding sequence, and for each prompt token. */
  readonly stepMs: { readonly base: number; readonly decode: number; readonly prefill: number };
}

interface Job extends Arrival {
  written: number;
  firstTokenS: number | null;
  endS: number | null;
  takes: number;
}

interface SimSequence {
  readonly slot: number;
  readonly job: Job;
  prefillLeft: number;
  readonly draft: readonly number[];
}

export const MODEL = 'simulated';

class SimEngine {
  readonly id: number;
  readonly model: EngineModel;
  readonly startedS: number;
  readonly speed = new EngineSpeed();
  readonly health: EngineHealth;
  readonly freeSlots: number[];
  sequences: SimSequence[] = [];
  plan: StepPlan<SimSequence> | null = null;
  endedS: number | null = null;

  constructor(id: number, model: EngineModel, startedS: number) {
    this.id = id;
    this.model = model;
    this.startedS = startedS;
    this.freeSlots = Array.from({ length: model.slots }, (_, slot) => slot);
    const size = { tp: 1, slots: model.slots, kvPositions: model.slots * model.maxSeqLen };
    this.health = new EngineHealth(size, Infinity, () => 0);
    this.health.rankReached(0);
  }

  get canTake(): boolean {
    const { phase, isDraining } = this.health;
    return phase === 'serving' && !isDraining && this.freeSlots.length > 0;
  }
}

/** What happened. */
export interface Outcome {
  /** Jobs that ended, each once. */
  readonly completed: number;
  /** Of all jobs: those whose first token came in time. */
  readonly attainment: number;
  readonly ttftS: { readonly p50: number; readonly p99: number };
  readonly engineSeconds: number;
  /** How often the number of engines left zero and came back to it. */
  readonly roundTrips: number;
  /** Longest time from the first waiting job at zero engines to an engine that serves. */
  readonly coldStartS: number;
  readonly mostEngines: number;
  /** Jobs that were moved by draining. */
  readonly moved: number;
  /** Groups that were taken away while they loaded. */
  readonly lostLoads: number;
  /** (samples) every few seconds: time, arrivals a second, jobs that wait, engines that exist, engines that serve. */
  readonly samples: readonly (readonly [number, number, number, number, number])[];
}

export interface ClusterOptions {
  readonly engine: EngineModel;
  readonly ttftLimitS: number;
  /** Seconds that a draining engine has before its jobs go to others. */
  readonly drainTimeoutS: number;
  readonly startPods: number;
}

const SAMPLE_EVERY_S = 10;

export class SimulatedCluster {
  readonly #options: ClusterOptions;
  readonly #engines: SimEngine[] = [];
  readonly #remembered = new Map<number, number>();
  readonly #waiting: Job[] = [];
  readonly #jobs: Job[] = [];
  readonly #events = new EventQueue();
  readonly #samples: [number, number, number, number, number][] = [];
  #order = 0;
  #nowS = 0;
  #random = 1;
  #arrived = 0;
  #moved = 0;
  #lostLoads = 0;
  #engineSeconds = 0;
  #roundTrips = 0;
  #wantedS: number | null = null;
  #coldStartS = 0;
  #most = 0;
  /** What the scaler is asked: production code over this cluster's jobs and engines. */
  readonly work: WorkMeter;

  constructor(options: ClusterOptions) {
    this.#options = options;
    const { slots, maxSeqLen } = options.engine;
    const card = { name: MODEL, maxSeqLen, maxBatchSize: slots } as ModelCard;
    this.work = new WorkMeter(
      {
        count: () => {
          const sum = (jobs: readonly Job[]): number =>
            jobs.reduce((tokens, { promptTokens, outputTokens, written }) => {
              const size = { promptTokens, maxTokens: outputTokens };
              return tokens + remainingTokens([size], [written], maxSeqLen);
            }, 0);
          const active = this.#active;
          const oldestS = this.#waiting[0]?.atS ?? this.#nowS;
          return Promise.resolve({
            jobs: this.#waiting.length + active.length,
            tokens: sum(this.#waiting) + sum(active),
            oldestWaitingMs: 1000 * (this.#nowS - oldestS),
          });
        },
      },
      {
        card: () => Promise.resolve(card),
        engines: () => Promise.resolve(this.#beats()),
        loadingEngines: () =>
          Promise.resolve(
            this.#engines.flatMap(({ id, health }) =>
              health.phase === 'loading' && !health.isDraining ? [String(id)] : [],
            ),
          ),
        rememberedSpeeds: () =>
          Promise.resolve(
            [...this.#remembered].map(([sequences, tokensPerSecond]): Speed => ({
              ...{ sequences, tokensPerSecond },
            })),
          ),
      },
    );
    this.scaleTo(options.startPods);
  }

  get waiting(): number {
    return this.#waiting.length;
  }

  get activeCount(): number {
    return this.#active.length;
  }

  /** Engines that are wanted: those that drain are not among them. */
  get pods(): number {
    return this.#engines.filter((engine) => !engine.health.isDraining).length;
  }

  get #active(): Job[] {
    return this.#engines.flatMap((engine) => engine.sequences.map(({ job }) => job));
  }

  #beats(): EngineBeat[] {
    return this.#engines
      .filter((engine) => engine.health.phase === 'serving')
      .map((engine) => {
        const speeds = engine.speed.speeds;
        for (const speed of speeds) this.#remembered.set(speed.sequences, speed.tokensPerSecond);
        const { slots } = engine.model;
        const active = engine.sequences.length;
        const { isDraining } = engine.health;
        const engineId = String(engine.id);
        return { model: MODEL, engineId, active, slots, tp: 1, speeds, isDraining };
      });
  }

  /**
   * Plays arrivals until `untilS`, and lets `control` change the number of Pods every `controlEveryS`.
   */
  async run(
    arrivals: readonly Arrival[],
    untilS: number,
    controlEveryS: number,
    control: (nowS: number) => Promise<void>,
  ): Promise<Outcome> {
    let next = 0;
    let sampledS = -Infinity;
    for (let tickS = 0; tickS <= untilS; tickS += controlEveryS) {
      for (;;) {
        const arrivalS = arrivals[next]?.atS ?? Infinity;
        const eventS = this.#events.nextS;
        if (Math.min(arrivalS, eventS) > tickS) break;
        if (arrivalS <= eventS) {
          this.#arrive(arrivals[next]!);
          next += 1;
        } else {
          const event = this.#events.take();
          this.#nowS = event.atS;
          event.run();
        }
      }
      this.#nowS = tickS;
      await control(tickS);
      this.#most = Math.max(this.#most, this.#engines.length);
      if (tickS - sampledS >= SAMPLE_EVERY_S) {
        const rate = this.#arrived / SAMPLE_EVERY_S;
        const serving = this.#engines.filter(({ health }) => health.phase === 'serving').length;
        this.#samples.push([tickS, rate, this.#waiting.length, this.#engines.length, serving]);
        this.#arrived = 0;
        sampledS = tickS;
      }
    }
    return this.#outcome(untilS);
  }

  /** Starts engines, or drains those whose Pods are the cheapest to take away. */
  scaleTo(pods: number): void {
    while (this.pods < pods) this.#start();
    while (this.pods > pods) {
      const candidates = this.#engines.filter((engine) => !engine.health.isDraining);
      // As a ReplicaSet does: Pods that are not ready first, then by cost.
      const unready = candidates.filter(({ health }) => health.phase !== 'serving');
      const first = unready.length > 0 ? unready : candidates;
      const costs = first.map((engine) => deletionCost(engine.health));
      const chosen = first[costs.indexOf(Math.min(...costs))]!;
      if (chosen.health.phase !== 'serving') this.#lostLoads += 1;
      this.#drain(chosen);
    }
  }

  #start(): void {
    const engine = new SimEngine((this.#order += 1), this.#options.engine, this.#nowS);
    if (this.#engines.length === 0 && this.#waiting.length > 0) this.#wantedS ??= this.#nowS;
    this.#engines.push(engine);
    this.#at(this.#nowS + this.#options.engine.loadS, () => {
      if (engine.endedS !== null) return;
      engine.health.serve(() => {
        const sequences = engine.sequences.length;
        return { sequences, slotsUsed: sequences, kvPositionsUsed: 0, unmovedMs: 0 };
      });
      if (this.#wantedS !== null) {
        this.#coldStartS = Math.max(this.#coldStartS, this.#nowS - this.#wantedS);
        this.#wantedS = null;
      }
      this.#assign();
    });
  }

  #drain(engine: SimEngine): void {
    engine.health.drain();
    if (engine.sequences.length === 0) {
      this.#end(engine);
      return;
    }
    this.#at(this.#nowS + this.#options.drainTimeoutS, () => {
      if (engine.endedS !== null) return;
      // What is left goes on elsewhere, from its next token; what is being computed is lost.
      for (const { job } of engine.sequences) {
        this.#moved += 1;
        this.#waiting.unshift(job);
      }
      engine.sequences = [];
      this.#end(engine);
      this.#assign();
    });
  }

  #end(engine: SimEngine): void {
    this.#beats();
    engine.endedS = this.#nowS;
    this.#engineSeconds += this.#nowS - engine.startedS;
    this.#engines.splice(this.#engines.indexOf(engine), 1);
    if (this.#engines.length === 0) this.#roundTrips += 1;
  }

  #arrive(arrival: Arrival): void {
    this.#nowS = arrival.atS;
    this.#arrived += 1;
    const job = { ...arrival, written: 0, firstTokenS: null, endS: null, takes: 0 };
    this.#jobs.push(job);
    this.#waiting.push(job);
    if (this.#engines.length === 0) this.#wantedS ??= this.#nowS;
    this.#assign();
  }

  /** Any engine with a free slot may be the first to fetch. */
  #assign(): void {
    while (this.#waiting.length > 0) {
      const free = this.#engines.filter((engine) => engine.canTake);
      if (free.length === 0) return;
      this.#random = (this.#random * 48_271) % 0x7fffffff;
      const engine = free[this.#random % free.length]!;
      const job = this.#waiting.shift()!;
      job.takes += 1;
      const prefillLeft = job.promptTokens + job.written;
      engine.sequences.push({ slot: engine.freeSlots.pop()!, job, prefillLeft, draft: [] });
      if (engine.plan === null) this.#step(engine);
    }
  }

  #step(engine: SimEngine): void {
    if (engine.sequences.length === 0) {
      engine.plan = null;
      if (engine.health.isDraining && engine.endedS === null) this.#end(engine);
      return;
    }
    const { maxStepRows, stepMs } = engine.model;
    const limits = { tokenBudget: maxStepRows, maxChunkTokens: maxStepRows };
    const plan = planStep(engine.sequences, limits);
    engine.plan = plan;
    const prefillRows = plan.chunks.reduce((rows, { count }) => rows + count, 0);
    const decodes = plan.decodes.length;
    const ms = stepMs.base + stepMs.decode * decodes + stepMs.prefill * prefillRows;
    engine.speed.add(decodes + prefillRows, engine.sequences.length, ms);
    this.#at(this.#nowS + ms / 1000, () => {
      if (engine.endedS !== null) return;
      for (const sequence of plan.decodes) this.#token(engine, sequence);
      for (const { sequence, count } of plan.chunks) {
        sequence.prefillLeft -= count;
        if (sequence.prefillLeft === 0) this.#token(engine, sequence);
      }
      engine.plan = null;
      this.#assign();
      this.#stepOn(engine);
    });
  }

  #stepOn(engine: SimEngine): void {
    if (engine.plan === null) this.#step(engine);
  }

  #token(engine: SimEngine, sequence: SimSequence): void {
    const { job } = sequence;
    job.written += 1;
    job.firstTokenS ??= this.#nowS;
    if (job.written < job.outputTokens) return;
    if (job.endS !== null) throw new Error('a job ended twice');
    job.endS = this.#nowS;
    engine.sequences.splice(engine.sequences.indexOf(sequence), 1);
    engine.freeSlots.push(sequence.slot);
  }

  #outcome(untilS: number): Outcome {
    for (const engine of this.#engines) this.#engineSeconds += untilS - engine.startedS;
    const waits = this.#jobs
      .map(({ atS, firstTokenS }) => (firstTokenS ?? Infinity) - atS)
      .sort((a, b) => a - b);
    const at = (share: number): number => waits[Math.floor(share * (waits.length - 1))]!;
    const inTime = waits.filter((wait) => wait <= this.#options.ttftLimitS).length;
    return {
      completed: this.#jobs.filter(({ endS }) => endS !== null).length,
      attainment: inTime / this.#jobs.length,
      ttftS: { p50: at(0.5), p99: at(0.99) },
      engineSeconds: this.#engineSeconds,
      roundTrips: this.#roundTrips,
      coldStartS: this.#coldStartS,
      mostEngines: this.#most,
      moved: this.#moved,
      lostLoads: this.#lostLoads,
      samples: this.#samples,
    };
  }

  #at(atS: number, run: () => void): void {
    this.#events.add(atS, run);
  }
}
