/**
 * How the promised work that waits is kept, so that what it comes to is read in constant time: pure.
 *
 * By spans of the latest start, of 1, 8, 64, 512 and 4,096 seconds at once. A reader takes fine ones for what comes soon and
 * coarse ones for what comes late:
 *
 *   now - 2 min      now + 4 min      now + 34 min      now + 4.5 h      now + 36 h      now + 30 days
 *     └── of 1 s ──────┴── of 8 s ──────┴── of 64 s ──────┴── of 512 s ────┴── of 4,096 s ──┘
 */
import type { PromisedWork } from './admission.js';

/** Seconds of a span, level by level: each is so many of the level before it. */
export const FACTOR = 8;
export const LEVELS = 5;
const OVERDUE_S = 120;
const FINEST_S = 256;
const COARSEST_S = 30 * 86_400;

interface Span {
  /** As the scripts name it: `LEVEL:NUMBER`. */
  readonly field: string;
  readonly fromMs: number;
  readonly toMs: number;
}

/** The spans that a reader takes, the earliest first, without gap or overlap. */
export function spansFrom(nowMs: number): Span[] {
  const nowS = Math.floor(nowMs / 1000);
  const spans: Span[] = [];
  let fromS = nowS - OVERDUE_S;
  for (let level = 0; level < LEVELS; level += 1) {
    const seconds = FACTOR ** level;
    const isLast = level === LEVELS - 1;
    const wishedS = nowS + (isLast ? COARSEST_S : FINEST_S * seconds);
    // The next level begins where one of its spans does.
    const toS = Math.ceil(wishedS / (seconds * FACTOR)) * seconds * FACTOR;
    for (; fromS < toS; fromS += seconds) {
      const field = `${level}:${fromS / seconds}`;
      spans.push({ field, fromMs: fromS * 1000, toMs: (fromS + seconds) * 1000 });
    }
  }
  return spans;
}

/**
 * What the spans hold, as work to start within them.
 *
 * @param sums tokens and output tokens of each span in turn, null for none; empty where nothing is promised.
 */
export function workOf(spans: readonly Span[], sums: readonly (string | null)[]): PromisedWork[] {
  return spans.flatMap(({ fromMs, toMs }, i) => {
    const [tokens = null, outputTokens = null] = sums.slice(2 * i, 2 * i + 2);
    if (tokens === null && outputTokens === null) return [];
    const work = { tokens: Number(tokens ?? 0), outputTokens: Number(outputTokens ?? 0) };
    return [{ ...work, firstStartMs: fromMs, lastStartMs: toMs, sinceMs: null }];
  });
}
