/**
 * Which engine takes a job first.
 *
 * StatefulSets and LeaderWorkerSets take away the highest ordinal first when they shrink: so new work goes to low ones,
 * and high ones become idle. An engine fetches a job at once only if none below it has a free slot; else it leaves them a
 * moment, `MAX_DELAY_MS` at most.
 */
import type { EngineBeat } from './store.js';

const DELAY_MS = 100;
const MAX_DELAY_MS = 400;

/** @returns milliseconds that a fetch leaves to others; 0 where none below has a free slot. */
export function takeDelayMs(
  own: { readonly model: string; readonly ordinal: number | undefined },
  engines: readonly EngineBeat[],
): number {
  const { ordinal } = own;
  if (ordinal === undefined) return 0;
  const before = engines.filter(
    (engine) =>
      engine.model === own.model &&
      engine.ordinal !== undefined &&
      engine.ordinal < ordinal &&
      engine.isDraining !== true &&
      engine.active < engine.slots,
  );
  return Math.min(before.length * DELAY_MS, MAX_DELAY_MS);
}
