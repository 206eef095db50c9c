/**
 * Keeps a computing process responsive: lets the event loop serve the network in time, and tells how
 * long it could not.
 */

/**
 * Yield when this much time has passed. A turn of the event loop costs some µs, and the less time this is, the longer
 * segments may be, and with them the chunks of prompts (`adaptBudget`).
 */
const YIELD_AFTER_MS = 3;

export class Pacer {
  #servedMs = performance.now();
  #longestMs = 0;

  /** To be called when the event loop has just run. */
  served(): void {
    const now = performance.now();
    this.#longestMs = Math.max(this.#longestMs, now - this.#servedMs);
    this.#servedMs = now;
  }

  /** Whether the event loop has waited long enough to be let in. */
  get isDue(): boolean {
    return performance.now() - this.#servedMs > YIELD_AFTER_MS;
  }

  /** Lets the event loop run once. */
  yield(): Promise<void> {
    return new Promise((resolve) => {
      setImmediate(() => {
        this.served();
        resolve();
      });
    });
  }

  /** The longest stretch without the event loop since the last call, in microseconds. */
  takeLongestUs(): number {
    const longest = Math.round(1000 * this.#longestMs);
    this.#longestMs = 0;
    return longest;
  }

  /** Starts a new stretch: the process was idle until now. */
  restart(): void {
    this.#servedMs = performance.now();
  }
}
