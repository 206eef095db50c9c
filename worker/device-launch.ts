/**
 * Runs that a device is given as one: CUDA captures what its stream is told, and repeats all of it at a single call. Of
 * single rows issuing the kernels one by one takes longer than computing them.
 *
 * What a kernel was told from host memory is captured with it: total lengths of attention, which are therefore rounded up,
 * and captured anew when they grow past that. Addresses are those of bound tensors, which stay.
 */
import { toCaravanError } from '../proto/errors.js';

export interface Captured {
  launch(): void;
  release(): void;
}

export interface Capturer {
  /** Notes what `issue` tells the device, without doing it. @throws whatever keeps it from that. */
  capture(issue: () => void): Captured;
}

/** Attention's total lengths are rounded up to multiples of this where they may be captured. */
export const CAPTURED_LENGTHS = 256;

/** Whether a device captures; it no longer does after the first failure. */
export class Capturing {
  /** Why not; null as long as it does. */
  fault: string | null;
  readonly #capturer: Capturer | null;

  /** @param capturer null where there is none, for the reason given. */
  constructor(capturer: Capturer | null, reason: string) {
    this.#capturer = capturer;
    this.fault = capturer === null ? reason : null;
  }

  /** @returns null where nothing can be captured: then nothing was done. */
  capture(issue: () => void): Captured | null {
    if (this.#capturer === null || this.fault !== null) return null;
    try {
      return this.#capturer.capture(issue);
    } catch (error) {
      this.fault = toCaravanError(error).message;
      return null;
    }
  }
}

/** Kernels choose their ways, and the runtime takes its memory, in the first runs of a shape. */
export const RUNS_BEFORE_CAPTURE = 2;

/** Tells the device what to compute, with inputs and outputs in place. */
interface Runnable {
  run(): void;
}

/** Some runs, one after the other; of shapes that come again, captured. */
export class Launch {
  readonly #runs: readonly Runnable[];
  readonly #capturing: Capturing | null;
  #runsBefore = 0;
  #captured: Captured | null = null;
  #total = 0;

  /** @param capturing null for shapes that do not come again. */
  constructor(runs: readonly Runnable[], capturing: Capturing | null) {
    this.#runs = runs;
    this.#capturing = capturing;
  }

  isCapturedFor(total: number): boolean {
    return this.#captured !== null && this.#total === total;
  }

  get isCaptured(): boolean {
    return this.#captured !== null;
  }

  /** @param total what the runs read from host memory: another one cannot be had from what was captured. */
  run(total = 0): void {
    if (this.#captured !== null && this.#total !== total) {
      this.release();
      // One more to take what memory the new length needs.
      this.#runsBefore = RUNS_BEFORE_CAPTURE - 1;
    }
    if (this.#captured === null && this.#capturing?.fault === null) this.#tryCapture(total);
    if (this.#captured === null) this.#issue();
    else this.#captured.launch();
  }

  release(): void {
    this.#captured?.release();
    this.#captured = null;
  }

  #tryCapture(total: number): void {
    this.#runsBefore += 1;
    if (this.#runsBefore <= RUNS_BEFORE_CAPTURE) return;
    this.#captured = this.#capturing!.capture(() => {
      this.#issue();
    });
    this.#total = total;
  }

  #issue(): void {
    for (let i = 0; i < this.#runs.length; i += 1) this.#runs[i]!.run();
  }
}
