/** A client that leaves before its answer takes its job with it; a gateway that stops does not. */
import type { FastifyReply } from 'fastify';
import { CaravanError } from '../proto/errors.js';
import type { Answers } from './answers.js';

/**
 * @param job the client's own, or null for whoever only looks on.
 * @returns aborts when the client leaves or the gateway stops.
 */
export function whileThere(
  { answers, stopping }: { readonly answers: Answers; readonly stopping: AbortSignal },
  reply: FastifyReply,
  job: { readonly jobId: string; readonly model: string } | null,
): AbortSignal {
  const left = new AbortController();
  const onClose = (): void => {
    // Closed after the last byte is the normal end; closed because we stop is not the client's wish.
    if (reply.raw.writableFinished || stopping.aborted) return;
    left.abort(new CaravanError('cancelled', 'the client left'));
    // The job's own ending may have come first; then there is nothing to cancel.
    if (job !== null) answers.cancel(job.jobId, job.model).catch(() => undefined);
  };
  // A client may have left while its job was being queued.
  if (reply.raw.destroyed) onClose();
  else reply.raw.once('close', onClose);
  return AbortSignal.any([left.signal, stopping]);
}
