/**
 * How far the ranks of a group have loaded, on stderr: a bar for each on a terminal, a line now and then elsewhere, and
 * nothing at all where they are quick.
 */
import type { LoadProgress } from '../proto/gen/cluster.js';
import { ProgressBar, type Screen } from './progress-bar.js';

/** Whoever is done by then needs no bar. */
const QUICK_MS = 500;
/** More bars than that are no sight: all ranks share one. */
const MOST_BARS = 16;

export class LoadBars {
  readonly #bars: readonly ProgressBar[];
  readonly #rankCount: number;
  /** By rank; null until it says something. */
  readonly #latest: (LoadProgress | null)[];
  /** By rank: what its bar knows of. */
  readonly #shown: { done: number; total: number }[];
  readonly #quickMs: number;
  #startMs: number | null = null;
  #isShown = false;

  /** @param quickMs how long nothing is shown. */
  constructor(rankCount: number, screen: Screen, quickMs = QUICK_MS) {
    this.#quickMs = quickMs;
    this.#rankCount = rankCount;
    this.#latest = Array.from({ length: rankCount }, () => null);
    this.#shown = Array.from({ length: rankCount }, () => ({ done: 0, total: 0 }));
    if (rankCount > MOST_BARS) {
      this.#bars = [new ProgressBar(`${rankCount} ranks`, screen)];
      return;
    }
    const rows = screen.isTTY === true ? new BarRows(screen, rankCount) : null;
    const digits = String(rankCount - 1).length;
    this.#bars = Array.from({ length: rankCount }, (_, rank) => {
      const title = `rank ${String(rank).padStart(digits)}`;
      return new ProgressBar(title, rows === null ? screen : rows.row(rank));
    });
  }

  progress(rank: number, progress: LoadProgress): void {
    this.#latest[rank] = progress;
    const nowMs = performance.now();
    this.#startMs ??= nowMs;
    if (nowMs - this.#startMs < this.#quickMs) return;
    this.#isShown = true;
    this.#latest.forEach((latest, other) => {
      if (latest !== null) this.#show(other, latest);
    });
  }

  /** All ranks have loaded, or none will. */
  end(): void {
    if (!this.#isShown) return;
    for (const bar of this.#bars) bar.end();
    this.#isShown = false;
  }

  #show(rank: number, { bytesRead, bytesTotal, isCached }: LoadProgress): void {
    const shown = this.#shown[rank]!;
    const bar = this.#bars.length === this.#rankCount ? this.#bars[rank]! : this.#bars[0]!;
    if (bytesTotal !== shown.total) bar.expect(bytesTotal - shown.total);
    // A rank whose cached weights turn out to be damaged begins anew.
    if (bytesRead !== shown.done) bar.advance(bytesRead - shown.done, bytesRead > shown.done);
    if (isCached && shown.total === 0) bar.note('cached');
    this.#shown[rank] = { done: bytesRead, total: bytesTotal };
  }
}

/** Lines of a terminal that are drawn again and again, one below the other. */
class BarRows {
  readonly #screen: Screen;
  readonly #lines: string[];
  #isDrawn = false;

  constructor(screen: Screen, count: number) {
    this.#screen = screen;
    this.#lines = Array.from({ length: count }, () => '');
  }

  /** A screen of one line. */
  row(index: number): Screen {
    const { columns } = this.#screen;
    const write = (text: string): void => {
      if (text === '\n') {
        if (index === this.#lines.length - 1) this.#screen.write(text);
        return;
      }
      this.#lines[index] = text;
      const up = this.#isDrawn && this.#lines.length > 1 ? `\u001b[${this.#lines.length - 1}A` : '';
      this.#isDrawn = true;
      this.#screen.write(up + this.#lines.map((line) => line || '\r\u001b[K').join('\n'));
    };
    return { isTTY: true, write, ...(columns === undefined ? {} : { columns }) };
  }
}
