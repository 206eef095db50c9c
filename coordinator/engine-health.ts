/**
 * How an engine is, for probes and metrics.
 *
 *   waiting ──ranks reached──> loading ──all loaded──> serving ──rank lost──> waiting
 *
 * Health means progress. Alive: what should move, moves (a step, the loading of weights). Ready: a group serves and
 * Redis answers. Started: weights are being read, or were once; from then on liveness judges, so that nobody has to
 * guess how long a large model loads.
 */
export type EnginePhase = 'waiting' | 'loading' | 'serving';

/** What a serving engine is doing. */
export interface EngineLoad {
  readonly sequences: number;
  /** Slots that sequences hold. */
  readonly slotsUsed: number;
  /** Positions of those slots that are filled. */
  readonly kvPositionsUsed: number;
  /** Since a step ended, or since there was work again, in milliseconds; 0 while there is none. */
  readonly unmovedMs: number;
}

export interface EngineSize {
  readonly tp: number;
  readonly slots: number;
  /** Of all slots. */
  readonly kvPositions: number;
}

export interface Verdict {
  readonly isOk: boolean;
  /** One line for whoever reads the probe. */
  readonly reason: string;
}

const IDLE: EngineLoad = { sequences: 0, slotsUsed: 0, kvPositionsUsed: 0, unmovedMs: 0 };

export class EngineHealth {
  readonly size: EngineSize;
  readonly #stallMs: number;
  readonly #now: () => number;
  #phase: EnginePhase = 'waiting';
  #hasServed = false;
  #isDraining = false;
  /** When the loading last moved on. */
  #loadMovedMs = 0;
  /** By rank: bytes of weights that were read, of those that it reads. */
  #loads = new Map<number, { read: number; total: number }>();
  #reached = new Set<number>();
  #load: () => EngineLoad = () => IDLE;

  /** @param now milliseconds of a clock that never goes back. */
  constructor(size: EngineSize, stallMs: number, now: () => number = () => performance.now()) {
    this.size = size;
    this.#stallMs = stallMs;
    this.#now = now;
  }

  get phase(): EnginePhase {
    return this.#phase;
  }

  get isDraining(): boolean {
    return this.#isDraining;
  }

  get ranksConnected(): number {
    return this.#reached.size;
  }

  get load(): EngineLoad {
    return this.#load();
  }

  /** Bytes of weights, all ranks together. */
  get loading(): { readonly read: number; readonly total: number } {
    const loads = [...this.#loads.values()];
    const sum = (of: 'read' | 'total'): number => loads.reduce((all, load) => all + load[of], 0);
    return { read: sum('read'), total: sum('total') };
  }

  /** A group is to be formed, for the first time or again. */
  wait(): void {
    this.#phase = 'waiting';
    this.#reached = new Set();
    this.#loads = new Map();
    this.#load = () => IDLE;
  }

  rankReached(rank: number): void {
    this.#reached.add(rank);
    if (this.#reached.size < this.size.tp || this.#phase !== 'waiting') return;
    this.#phase = 'loading';
    this.#loadMovedMs = this.#now();
  }

  rankLoading(rank: number, read: number, total: number): void {
    if (read !== this.#loads.get(rank)?.read) this.#loadMovedMs = this.#now();
    this.#loads.set(rank, { read, total });
  }

  /** All ranks have loaded. @param load of the engine, asked whenever somebody wants to know. */
  serve(load: () => EngineLoad): void {
    this.#phase = 'serving';
    this.#hasServed = true;
    this.#load = load;
  }

  drain(): void {
    this.#isDraining = true;
  }

  /** Whether starting it again could help: only where something stands that should move. */
  alive(): Verdict {
    if (this.#phase === 'loading') {
      const { read, total } = this.loading;
      return this.#moving(
        this.#now() - this.#loadMovedMs,
        `loading, ${read} of ${total} bytes`,
        'no more weights were read',
      );
    }
    if (this.#phase === 'waiting') {
      return { isOk: true, reason: `${this.#reached.size} of ${this.size.tp} ranks reached` };
    }
    const { sequences, unmovedMs } = this.load;
    return this.#moving(unmovedMs, `serving ${sequences} sequences`, 'no step has ended');
  }

  started(): Verdict {
    return this.#hasServed || this.#phase !== 'waiting' ? this.alive() : fail(this.alive().reason);
  }

  ready(isRedisUp: boolean): Verdict {
    if (this.#phase !== 'serving') return fail(`no group serves yet: ${this.alive().reason}`);
    if (this.#isDraining) return fail('draining');
    if (!isRedisUp) return fail('Redis does not answer');
    return this.alive();
  }

  #moving(unmovedMs: number, reason: string, stalled: string): Verdict {
    if (unmovedMs <= this.#stallMs) return { isOk: true, reason };
    return fail(`${stalled} for ${Math.round(unmovedMs / 1000)} s (${reason})`);
  }
}

const fail = (reason: string): Verdict => ({ isOk: false, reason });
