/** What an EDF would accept that knows what every job costs: a measure for admission. */
import { costMs, type Power } from '../coordinator/admission.js';
import type { Arrival, World } from './traffic-simulator.js';

/**
 * Tokens of the jobs with deadlines that an EDF accepts which knows what every job costs, and gives the engine to nothing
 * else: as a fluid, so that it is a little better than any engine.
 */
export function clairvoyantTokens(
  arrivals: readonly Arrival[],
  { pace, slots, maxStepRows }: World,
): number {
  const power: Power = { engines: 1, slots, stepRows: maxStepRows, pace, slowness: 1, overhead: 1 };
  /** By deadline. */
  let open: { deadlineMs: number; leftMs: number }[] = [];
  let tokens = 0;
  let lastMs = 0;
  for (const { atMs, promptTokens, outputTokens, deadlineAfterMs } of arrivals) {
    let passedMs = atMs - lastMs;
    lastMs = atMs;
    open = open.filter((job) => {
      const doneMs = Math.min(passedMs, job.leftMs);
      passedMs -= doneMs;
      job.leftMs -= doneMs;
      return job.leftMs > 0;
    });
    if (deadlineAfterMs === null) continue;
    const size = { tokens: promptTokens + outputTokens, outputTokens };
    const job = { deadlineMs: atMs + deadlineAfterMs, leftMs: costMs(size, power) };
    // Alone on the engine it takes this long.
    const aloneMs = pace.rowMs * size.tokens + pace.stepMs * outputTokens;
    const place = open.findIndex(({ deadlineMs }) => deadlineMs > job.deadlineMs);
    const next = [...open];
    next.splice(place === -1 ? open.length : place, 0, job);
    let sum = 0;
    const fits = next.every(({ deadlineMs, leftMs }) => (sum += leftMs) <= deadlineMs - atMs);
    if (!fits || aloneMs > deadlineAfterMs) continue;
    open = next;
    tokens += size.tokens;
  }
  return tokens;
}
