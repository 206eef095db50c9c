/** What the long-running processes have in common: signals, a parent to report to, a log. */
import pino, { type Logger } from 'pino';
import type { LoadProgress } from '../proto/gen/cluster.js';

/** Lines of JSON on stderr; stdout is for results. */
export const openLog = (name: string, level: string): Logger =>
  pino({ name, level, base: { pid: process.pid } }, pino.destination(2));

export interface Shutdown {
  /** The first SIGTERM or SIGINT: finish what runs, take nothing new. */
  readonly draining: AbortSignal;
  /** The second, the end of the time that draining may take, or the parent is gone: stop at once, lose nothing. */
  readonly stopping: AbortSignal;
}

/** Listens for signals, and for the end of a parent that forked us. @param drainTimeoutMs without end if left out. */
export function listenForShutdown(drainTimeoutMs?: number): Shutdown {
  const drain = new AbortController();
  const stop = new AbortController();
  const onSignal = (): void => {
    if (drain.signal.aborted) stop.abort();
    else if (drainTimeoutMs !== undefined) {
      setTimeout(() => {
        stop.abort();
      }, drainTimeoutMs).unref();
    }
    drain.abort();
  };
  process.on('SIGTERM', onSignal);
  process.on('SIGINT', onSignal);
  if (process.send !== undefined) {
    process.on('disconnect', () => {
      drain.abort();
      stop.abort();
    });
  }
  return { draining: drain.signal, stopping: stop.signal };
}

/** Tells a parent that forked us, if there is one. */
export function reportReady(details: object): void {
  process.send?.({ type: 'ready', ...details });
}

/** The setting in milliseconds; setTimeout takes no more than 24 days. */
export const drainTimeoutMs = (settings: {
  readonly drainTimeout: number | undefined;
}): number | undefined =>
  settings.drainTimeout === undefined
    ? undefined
    : Math.min(1000 * settings.drainTimeout, 2 ** 31 - 1);

/** How far a rank has loaded, told to a parent that forked us, if there is one. */
export function reportLoading(rank: number, progress: LoadProgress): void {
  process.send?.({ type: 'loading', rank, progress });
}
