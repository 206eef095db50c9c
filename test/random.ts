/** Seeded randomness for tests: Mulberry32, by Tommy Ettinger (public domain). */
export class Random {
  #state: number;

  constructor(seed: number) {
    this.#state = seed >>> 0;
  }

  /** In [0, 1). */
  next(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0;
    let t = this.#state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  }

  /** A whole number from 0 to count - 1. */
  below(count: number): number {
    return Math.floor(this.next() * count);
  }

  pick<T>(from: readonly T[]): T {
    return from[this.below(from.length)]!;
  }

  /** Standard normal (Box–Muller). */
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.next())) * Math.cos(2 * Math.PI * this.next());
  }

  /** `count` characters from every part of Unicode that a prompt may hold, spaces among them. */
  text(count: number): string {
    const blocks = [
      () => 0x20,
      () => 0x20 + this.below(95),
      () => 0x61 + this.below(26),
      () => 0xa0 + this.below(0x500),
      () => 0x3040 + this.below(0x100),
      () => 0x4e00 + this.below(0x5000),
      () => 0x1f300 + this.below(0x300),
      () => 9 + this.below(2),
    ];
    return Array.from({ length: count }, () => String.fromCodePoint(this.pick(blocks)())).join('');
  }
}
