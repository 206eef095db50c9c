/** What an engine tells gateways for their promises: what its steps cost, and how true its reckoning was. */
import { runMs, Slowness } from './admission.js';
import type { RunJob } from './job-runner.js';
import { PaceMeter, type Pace } from './pace.js';

export class EnginePace {
  readonly #meter = new PaceMeter();
  readonly #slowness = new Slowness();
  readonly #slots: number;

  /** @param slots of the engine. */
  constructor(slots: number) {
    this.#slots = slots;
  }

  /** @param rows of a step: one a decode, one a prompt token. @param totalMs that the step took. */
  addStep(rows: number, totalMs: number): void {
    this.#meter.add(rows, totalMs);
  }

  /** A job has ended by itself: if it was promised, its time is compared with what is reckoned for such jobs. */
  addJob({ held, done }: RunJob, nowMs: number): void {
    const { pace } = this.#meter;
    if (pace === null || held.latestStartMs === null || done.tokens === 0) return;
    const reckonedMs = runMs(done, { engines: 1, slots: this.#slots, pace, slowness: 1 }, true);
    this.#slowness.add((nowMs - held.sinceMs) / reckonedMs);
  }

  /** For the heartbeat; empty before the first step. */
  get beat(): { readonly pace?: Pace; readonly slowness?: number } {
    const { pace } = this.#meter;
    return pace === null ? {} : { pace, slowness: this.#slowness.factor };
  }
}
