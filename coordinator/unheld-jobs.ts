/**
 * Jobs end in time without an engine, too: those whose deadline passes while they wait, and those whose engine died
 * before it could end them. The journal's script ends a job once, whoever else tries.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Journal } from './journal.js';
import type { JobQueue } from './queue.js';

const SWEEP_EVERY_MS = 1_000;
/** Jobs of one sweep of a model. */
const SWEPT_JOBS = 200;

/**
 * Cancels a job, whatever its state.
 *
 * @returns `requested` when an engine has it and will end it.
 * @throws CaravanError `not_found`, `redis_unavailable`.
 */
export async function cancelJob(
  journal: Journal,
  queue: JobQueue,
  id: string,
): Promise<'cancelled' | 'requested' | 'already'> {
  const outcome = await journal.requestCancel(id);
  if (outcome === 'already') return outcome;
  if (outcome === 'requested') {
    if (await queue.isHeld(id)) {
      // Should its engine be dead, it is ended later.
      await queue.hurry(id);
      return outcome;
    }
    if ((await journal.endUnheld(id)) === 'already') return 'already';
  }
  await queue.remove(id);
  return 'cancelled';
}

/** Ends the jobs of a queue whose time is over and that no engine ends. */
export async function endOverdue(journal: Journal, queue: JobQueue): Promise<void> {
  for (const id of await queue.overdue(SWEPT_JOBS)) {
    await journal.endUnheld(id);
    await queue.remove(id);
  }
}

/** Does so now and then for all models, until the signal aborts. */
export async function endOverdueJobs(
  journal: Journal,
  models: () => Promise<readonly string[]>,
  queueOf: (model: string) => JobQueue,
  signal: AbortSignal,
): Promise<void> {
  while (!signal.aborted) {
    try {
      for (const model of await models()) await endOverdue(journal, queueOf(model));
    } catch {
      // Redis is away: whoever needs it says so.
    }
    await delay(SWEEP_EVERY_MS, undefined, { signal }).catch(() => undefined);
  }
}
