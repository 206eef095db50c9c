/**
 * How much more of an engine's time work takes than its pace says: pure.
 *
 * Two things are seen of the steps. Their pace is one: waits between steps, or a pace that is wrong, make the same steps
 * take longer on the clock than is reckoned for them. How full they are is the other: `costMs` reckons with steps in
 * which every slot decodes, and steps full of prompts have a fixed part, too. The second is known from steps with all
 * slots taken only.
 */
import { promptRowsOf } from './admission.js';
import type { Pace } from './pace.js';

export interface SeenStep {
  /** One a decode, one a prompt token. */
  readonly rows: number;
  readonly promptRows: number;
  /** Sequences that got a token. */
  readonly decodes: number;
  /** Rows that it could have had. */
  readonly stepRows: number;
  /** Whether all slots were taken. */
  readonly isFull: boolean;
  /** From its start, or the end of the step before it, to its end. */
  readonly wallMs: number;
}

/** After so much time in steps one of them counts half. */
const HALF_LIFE_MS = 60_000;
/** Before anything was seen, so much time is taken to have been seen with this overhead: promises begin cautiously. */
const ASSUMED_MS = 5_000;
const ASSUMED = 1.4;
/** A step that took this many times what was reckoned was disturbed: it says nothing of the next. */
const DISTURBED_RATIO = 20;
const [LEAST, MOST] = [0.25, 20];

export class Overhead {
  readonly #slots: number;
  #assumedMs = ASSUMED_MS;
  #wallMs = 0;
  #reckonedMs = 0;
  #fullStepsMs = 0;
  #fullRowsMs = 0;
  #fullDecodesMs = 0;
  #fullPromptsMs = 0;

  /** @param slots of the engine. */
  constructor(slots: number) {
    this.#slots = slots;
  }

  /** @param pace that the work is reckoned with. */
  add(
    { rows, promptRows, decodes, stepRows, isFull, wallMs }: SeenStep,
    { stepMs, rowMs }: Pace,
  ): void {
    const reckonedMs = stepMs + rowMs * rows;
    if (wallMs > DISTURBED_RATIO * reckonedMs) return;
    const kept = 0.5 ** (reckonedMs / HALF_LIFE_MS);
    this.#assumedMs *= kept;
    this.#wallMs = kept * this.#wallMs + wallMs;
    this.#reckonedMs = kept * this.#reckonedMs + reckonedMs;
    if (!isFull) return;
    this.#fullStepsMs = kept * this.#fullStepsMs + reckonedMs;
    this.#fullRowsMs = kept * this.#fullRowsMs + rowMs * rows;
    this.#fullDecodesMs = kept * this.#fullDecodesMs + (stepMs * decodes) / this.#slots;
    this.#fullPromptsMs =
      kept * this.#fullPromptsMs +
      (stepMs * promptRows) / promptRowsOf({ slots: this.#slots, stepRows });
  }

  /** The time that work takes, as a multiple of what is reckoned for it. */
  get factor(): number {
    const assumed = this.#assumedMs;
    const drift = (ASSUMED * assumed + this.#wallMs) / (assumed + this.#reckonedMs);
    const fullCostMs = this.#fullRowsMs + Math.max(this.#fullDecodesMs, this.#fullPromptsMs);
    const fullness = (assumed + this.#fullStepsMs) / (assumed + fullCostMs);
    return Math.min(Math.max(drift * fullness, LEAST), MOST);
  }
}
