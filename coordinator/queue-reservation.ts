/** What must hold for a job to find room in a queue, and what its asking for room came to. */
import type { Request } from './request.js';

/** What may be in the queue; null for no limit. */
export interface QueueLimits {
  readonly jobs: number | null;
  readonly tokens: number | null;
  readonly tenantJobs: number | null;
  readonly tenantTokens: number | null;
  readonly tenantRequestsPerMinute: number | null;
}

/** What must hold for a job to be let in, and what follows for the queue. */
export interface ReserveCheck {
  readonly limits?: QueueLimits;
  /** Of the promises that were reckoned with. */
  readonly version?: number;
  /** With this one among them, promised jobs need the engines for themselves from then on. */
  readonly pressedFromMs?: number;
  /** What is written into the journal in the same moment, should it not know the job. */
  readonly request?: Request;
}

export type Reserved =
  | {
      readonly kind: 'reserved' | 'known';
      /** Whether the job was written into the journal. */
      readonly isWritten: boolean;
    }
  | { readonly kind: 'raced' }
  | { readonly kind: 'full'; readonly limit: keyof QueueLimits; readonly stands: number };

const limitNames: readonly (keyof QueueLimits)[] = [
  'jobs',
  'tokens',
  'tenantJobs',
  'tenantTokens',
  'tenantRequestsPerMinute',
];

/** What the script that reserves has answered. */
export function reservedOf(answer: unknown): Reserved {
  const [kind, second, stands] = answer as
    ['raced'] | ['reserved' | 'known', number] | ['full', number, string];
  if (kind === 'raced') return { kind };
  if (kind !== 'full') return { kind, isWritten: second === 1 };
  return { kind, limit: limitNames[second - 1]!, stands: Number(stands) };
}

/** The check, as the script that reserves is told of it. */
export const reserveArgs = ({
  limits,
  version,
  pressedFromMs,
}: ReserveCheck): (string | number)[] => [
  ...limitNames.map((name) => limits?.[name] ?? ''),
  version ?? '',
  pressedFromMs === undefined ? '' : Math.round(pressedFromMs),
];
