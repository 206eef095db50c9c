/** What Redis never answers must not be waited for once nobody wants it any more. */

/** How long an answer may still take then. */
const GRACE_MS = 2_000;

/** Resolves a while after the signal aborts. */
export function graceAfter(signal: AbortSignal): { late: Promise<'late'>; dispose: () => void } {
  let timer: NodeJS.Timeout | undefined;
  let onAbort = (): void => undefined;
  const late = new Promise<'late'>((resolve) => {
    onAbort = () => {
      timer = setTimeout(resolve, GRACE_MS, 'late');
    };
    if (signal.aborted) onAbort();
    else signal.addEventListener('abort', onAbort, { once: true });
  });
  const dispose = (): void => {
    clearTimeout(timer);
    signal.removeEventListener('abort', onAbort);
  };
  return { late, dispose };
}
