/** What an engine tells gateways for their promises: what its steps cost, and how true its reckoning was. */
import { runMs, Slowness } from './admission.js';
import type { RunJob } from './job-runner.js';
import { Overhead } from './overhead.js';
import { PaceMeter, type Pace } from './pace.js';
import type { StepFigures } from './step-figures.js';

export class EnginePace {
  readonly #meter = new PaceMeter();
  readonly #slowness = new Slowness();
  readonly #overhead: Overhead;
  readonly #slots: number;
  #stepRows = 0;
  /** When the last step ended, if sequences were left for the next one; else null. */
  #busySinceMs: number | null = null;

  /** @param slots of the engine. */
  constructor(slots: number) {
    this.#slots = slots;
    this.#overhead = new Overhead(slots);
  }

  /** @param nowMs its end. @param freeSlotCount after it. */
  addStep(figures: StepFigures, nowMs: number, freeSlotCount: number): void {
    const { rows, promptTokens, draftTokens, acceptedTokens, stepRows, totalMs } = figures;
    const before = this.#meter.pace;
    this.#meter.add(rows, totalMs);
    this.#stepRows = stepRows;
    const wallMs = this.#busySinceMs === null ? totalMs : nowMs - this.#busySinceMs;
    this.#busySinceMs = freeSlotCount < this.#slots ? nowMs : null;
    if (before === null) return;
    const decodes = rows - promptTokens - draftTokens + acceptedTokens;
    const isFull = figures.sequences >= this.#slots || freeSlotCount === 0;
    this.#overhead.add(
      { rows, promptRows: promptTokens, decodes, stepRows, isFull, wallMs },
      before,
    );
  }

  /** A job has ended by itself: if it was promised, its time is compared with what is reckoned for such jobs. */
  addJob({ held, done }: RunJob, nowMs: number): void {
    const { pace } = this.#meter;
    if (pace === null || held.latestStartMs === null || done.tokens === 0) return;
    const power = { engines: 1, slots: this.#slots, stepRows: this.#stepRows, pace };
    const reckonedMs = runMs(done, { ...power, slowness: 1, overhead: 1 }, true);
    this.#slowness.add((nowMs - held.sinceMs) / reckonedMs);
  }

  /** For the heartbeat; empty before the first step. */
  get beat(): {
    readonly pace?: Pace;
    readonly slowness?: number;
    readonly overhead?: number;
    readonly stepRows?: number;
  } {
    const { pace } = this.#meter;
    if (pace === null) return {};
    const [slowness, overhead] = [this.#slowness.factor, this.#overhead.factor];
    return { pace, slowness, overhead, stepRows: this.#stepRows };
  }
}
