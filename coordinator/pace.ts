/**
 * What an engine's steps cost, learned from the steps themselves: pure.
 *
 *   duration of a step = stepMs + rowMs × rows
 *
 * fitted by least squares, in which old steps count less and less.
 */

export interface Pace {
  /** Of a step, however many rows it has. */
  readonly stepMs: number;
  /** Of each row: one a decode, one a prompt token. */
  readonly rowMs: number;
  /** Of a step as they come now: what a token takes in the batch that there is. */
  readonly recentStepMs: number;
}

/** Steps after which one counts half. */
const HALF_LIFE_STEPS = 1_000;
const KEPT = 0.5 ** (1 / HALF_LIFE_STEPS);
const KEPT_RECENT = 0.5 ** (1 / 50);
/** A step that took this many times what was expected was disturbed: it says nothing of the next. */
const DISTURBED_RATIO = 20;
/** Steps with one row count tell nothing of the cost of a row: this share of them is taken for it. */
const ROW_SHARE = 0.5;

export class PaceMeter {
  #count = 0;
  #rows = 0;
  #ms = 0;
  #rowsSquared = 0;
  #rowsMs = 0;
  #recentMs = 0;

  add(rows: number, ms: number): void {
    const { pace } = this;
    if (pace !== null && this.#count > 20 && ms > DISTURBED_RATIO * expectedMs(pace, rows)) return;
    this.#count = KEPT * this.#count + 1;
    this.#rows = KEPT * this.#rows + rows;
    this.#ms = KEPT * this.#ms + ms;
    this.#rowsSquared = KEPT * this.#rowsSquared + rows * rows;
    this.#rowsMs = KEPT * this.#rowsMs + rows * ms;
    this.#recentMs = pace === null ? ms : KEPT_RECENT * this.#recentMs + (1 - KEPT_RECENT) * ms;
  }

  /** Null before the first step. */
  get pace(): Pace | null {
    if (this.#count === 0) return null;
    const [meanRows, meanMs] = [this.#rows / this.#count, this.#ms / this.#count];
    const variance = this.#rowsSquared / this.#count - meanRows ** 2;
    const covariance = this.#rowsMs / this.#count - meanRows * meanMs;
    const most = meanMs / meanRows;
    const isTold = variance > 1e-3 * meanRows ** 2;
    const slope = isTold ? covariance / variance : ROW_SHARE * most;
    // Neither part can be less than nothing.
    const rowMs = Math.min(Math.max(slope, 0.01 * most), most);
    return { stepMs: meanMs - rowMs * meanRows, rowMs, recentStepMs: this.#recentMs };
  }
}

const expectedMs = ({ stepMs, rowMs }: Pace, rows: number): number => stepMs + rowMs * rows;

/** Of several engines: what each of them does on average. */
export function meanPace(paces: readonly Pace[]): Pace | null {
  if (paces.length === 0) return null;
  const mean = (of: (pace: Pace) => number): number =>
    paces.reduce((sum, pace) => sum + of(pace), 0) / paces.length;
  return {
    stepMs: mean(({ stepMs }) => stepMs),
    rowMs: mean(({ rowMs }) => rowMs),
    recentStepMs: mean(({ recentStepMs }) => recentStepMs),
  };
}

/** After this long a reading counts half: what steps cost hardly changes, how full they are does. */
const COST_HALF_LIFE_MS = 600_000;
const RECENT_HALF_LIFE_MS = 60_000;

/** What several readings of a pace come to: each one may be off. */
export class SteadyPace {
  #pace: Pace | null = null;
  #costWeight = 0;
  #recentWeight = 0;
  #lastMs = 0;

  add(reading: Pace, nowMs: number): void {
    const passedMs = nowMs - this.#lastMs;
    this.#costWeight = this.#costWeight * 0.5 ** (passedMs / COST_HALF_LIFE_MS) + 1;
    this.#recentWeight = this.#recentWeight * 0.5 ** (passedMs / RECENT_HALF_LIFE_MS) + 1;
    this.#lastMs = nowMs;
    const old = this.#pace ?? reading;
    const mix = (a: number, b: number, weight: number): number => a + (b - a) / weight;
    this.#pace = {
      stepMs: mix(old.stepMs, reading.stepMs, this.#costWeight),
      rowMs: mix(old.rowMs, reading.rowMs, this.#costWeight),
      recentStepMs: mix(old.recentStepMs, reading.recentStepMs, this.#recentWeight),
    };
  }

  /** Null before the first reading. */
  get pace(): Pace | null {
    return this.#pace;
  }
}
