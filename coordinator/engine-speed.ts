/**
 * How fast an engine is, measured over the steps that it computes; the time between them does not count.
 *
 * Steps of few sequences are slow for each token, so that an engine with little to do would underrate itself: speeds are
 * kept by how many sequences a step had (1, 2 to 3, 4 to 7, …), and the busiest kind says what the engine can.
 */

/** One kind of steps. */
export interface Speed {
  /** Least sequences of a step of this kind: a power of two. */
  readonly sequences: number;
  /** Prompt and output tokens a second of such steps. */
  readonly tokensPerSecond: number;
}

/** Rows after which a measurement counts half. */
const HALF_LIFE_ROWS = 4_096;
/** Less than this says nothing: the first steps are slower than all others. */
const LEAST_STEPS = 16;
const LEAST_MS = 250;

export class EngineSpeed {
  readonly #kinds = new Map<number, { rows: number; ms: number; steps: number; totalMs: number }>();

  /**
   * @param rows of a step: one a decode, one a prompt token.
   * @param sequences that took part.
   * @param totalMs that the step took.
   */
  add(rows: number, sequences: number, totalMs: number): void {
    const kind = 2 ** Math.floor(Math.log2(Math.max(1, sequences)));
    const before = this.#kinds.get(kind) ?? { rows: 0, ms: 0, steps: 0, totalMs: 0 };
    const kept = 0.5 ** (rows / HALF_LIFE_ROWS);
    this.#kinds.set(kind, {
      rows: before.rows * kept + rows,
      ms: before.ms * kept + totalMs,
      steps: before.steps + 1,
      totalMs: before.totalMs + totalMs,
    });
  }

  /** Kinds of steps that were seen often enough, those of few sequences first. */
  get speeds(): Speed[] {
    return [...this.#kinds]
      .filter(([, { steps, totalMs }]) => steps >= LEAST_STEPS && totalMs >= LEAST_MS)
      .sort(([a], [b]) => a - b)
      .map(([sequences, { rows, ms }]) => ({ sequences, tokensPerSecond: (1000 * rows) / ms }));
  }

  /** What it can, as far as it has shown it; null before. */
  get tokensPerSecond(): number | null {
    return this.speeds.at(-1)?.tokensPerSecond ?? null;
  }
}

export interface Capacity {
  readonly tokensPerSecond: number;
  /** Whether at least half of the slots were in use: less says too little. */
  readonly isUnderLoad: boolean;
}

/**
 * What one engine of a model can.
 *
 * @param living speeds of the engines that are alive: their mean counts, kind by kind.
 * @param remembered speeds of engines that were: they count where no living engine has been as busy.
 * @param slots of an engine: kinds of steps with more are of another one.
 * @returns null when nothing was measured yet.
 */
export function capacityOf(
  living: readonly (readonly Speed[])[],
  remembered: readonly Speed[],
  slots: number,
): Capacity | null {
  const kinds = [...living.flat(), ...remembered]
    .map(({ sequences }) => sequences)
    .filter((sequences) => sequences <= slots);
  if (kinds.length === 0) return null;
  const busiest = Math.max(...kinds);
  const of = (speeds: readonly Speed[]): number[] =>
    speeds.filter(({ sequences }) => sequences === busiest).map((speed) => speed.tokensPerSecond);
  const alive = of(living.flat());
  const rates = alive.length > 0 ? alive : of(remembered);
  return {
    tokensPerSecond: rates.reduce((sum, rate) => sum + rate, 0) / rates.length,
    isUnderLoad: 2 * busiest >= slots,
  };
}
