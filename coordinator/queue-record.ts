/** Jobs as the scripts of a queue's order keep them: see queue-order-scripts. */
import { CaravanError } from '../proto/errors.js';
import { laneOf, type QueuedJob } from './order.js';
import type { JobSize } from './queue-order.js';
import type { JobTerms } from './request.js';

export const DEFAULT_TENANT = 'default';

/** The order's view of a job that is submitted. */
export function queuedJobOf(
  id: string,
  terms: JobTerms,
  size: JobSize,
  queuedMs: number,
): QueuedJob {
  const { priority, deadlineMs, tenant, weight, latestStartMs } = terms;
  if (latestStartMs !== undefined && deadlineMs === null) {
    throw new CaravanError('internal', `job ${id} has a latest start and no deadline`);
  }
  return {
    ...{ id, tenant: tenant ?? DEFAULT_TENANT, weight: weight ?? 1, priority },
    deadlineMs: deadlineMs === null ? null : Math.round(deadlineMs),
    queuedMs: Math.round(queuedMs),
    tokens: size.tokens,
    outputTokens: size.outputTokens,
    latestStartMs: latestStartMs === undefined ? null : Math.round(latestStartMs),
    preemptions: 0,
  };
}

/** A record as Redis keeps it: what is null is left out, since Lua takes JSON's null for true. */
export function recordOf(job: QueuedJob) {
  const { deadlineMs, latestStartMs, ...rest } = job;
  return {
    ...{ ...rest, lane: laneOf(job) },
    ...(deadlineMs === null ? {} : { deadlineMs }),
    ...(latestStartMs === null ? {} : { latestStartMs }),
  };
}

export function jobOf(text: string): QueuedJob {
  const { id, tenant, weight, priority, queuedMs, tokens, outputTokens, ...rest } = JSON.parse(
    text,
  ) as Omit<QueuedJob, Optional> & Partial<Pick<QueuedJob, Optional>>;
  return {
    ...{ id, tenant, weight, priority, queuedMs, tokens, outputTokens },
    deadlineMs: rest.deadlineMs ?? null,
    latestStartMs: rest.latestStartMs ?? null,
    preemptions: rest.preemptions,
  };
}

type Optional = 'deadlineMs' | 'latestStartMs';
