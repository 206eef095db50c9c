/** Slots of an engine: the lowest free one first, so that those in use stay neighbours. */
export class Slots {
  readonly count: number;
  readonly #isTaken: boolean[];
  #freeCount: number;

  constructor(count: number) {
    this.count = count;
    this.#isTaken = new Array<boolean>(count).fill(false);
    this.#freeCount = count;
  }

  get freeCount(): number {
    return this.#freeCount;
  }

  /** The lowest free slot, or null. */
  take(): number | null {
    const slot = this.#isTaken.indexOf(false);
    if (slot === -1) return null;
    this.#isTaken[slot] = true;
    this.#freeCount -= 1;
    return slot;
  }

  release(slot: number): void {
    if (this.#isTaken[slot] !== true) return;
    this.#isTaken[slot] = false;
    this.#freeCount += 1;
  }
}
