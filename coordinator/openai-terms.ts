/** Fields of a body beside OpenAI's: how urgent a job is, and by when it must end. */
import { z } from 'zod';
import type { JobTerms } from './request.js';

const DEFAULT_PRIORITY = 100;
const MAX_SECONDS = 31_536_000;

const error = 'must be seconds above 0, or a time such as 2030-01-31T08:00:00Z';
/** Seconds from now, or a time with its offset. */
export const deadlineField = z.union(
  [z.number().gt(0).max(MAX_SECONDS), z.iso.datetime({ offset: true, error })],
  { error },
);

/** Unix time in milliseconds. */
export const deadlineMsOf = (deadline: z.infer<typeof deadlineField>): number =>
  typeof deadline === 'number' ? Date.now() + 1000 * deadline : Date.parse(deadline);

export const termFields = {
  priority: z.number().int().min(1).max(1000).nullish(),
  deadline: deadlineField.nullish(),
  /** As `deadline`, in seconds alone. */
  deadline_s: z.number().gt(0).max(MAX_SECONDS).nullish(),
};

/** The terms that a body asks for. */
export function termsOfBody({
  priority,
  deadline,
  deadline_s: seconds,
}: {
  readonly priority?: number | null | undefined;
  readonly deadline?: number | string | null | undefined;
  readonly deadline_s?: number | null | undefined;
}): JobTerms {
  const wished = deadline ?? seconds;
  return {
    priority: priority ?? DEFAULT_PRIORITY,
    deadlineMs: wished == null ? null : deadlineMsOf(wished),
  };
}
