/** How fast an engine is, measured over the steps that it computes: the time between them does not count. */

/** Rows after which a measurement counts half. */
const HALF_LIFE_ROWS = 4_096;

export class Throughput {
  #rows = 0;
  #ms = 0;

  /** @param rows of a step: one a decode, one a prompt token. @param totalMs that the step took. */
  add(rows: number, totalMs: number): void {
    const kept = 0.5 ** (rows / HALF_LIFE_ROWS);
    this.#rows = this.#rows * kept + rows;
    this.#ms = this.#ms * kept + totalMs;
  }

  /** Prompt and output tokens a second; null before the first step. */
  get tokensPerSecond(): number | null {
    return this.#ms > 0 ? (1000 * this.#rows) / this.#ms : null;
  }
}
