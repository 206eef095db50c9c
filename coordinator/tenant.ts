/** Whose a job is, and what it may have of the engines. */

export interface Tenant {
  readonly name: string;
  /** Share of the engines, relative to other tenants. */
  readonly weight: number;
  /** Jobs that wait or run, at most; null for no limit. */
  readonly maxJobs: number | null;
  /** Prompt and output tokens that wait, at most. */
  readonly maxQueuedTokens: number | null;
  readonly requestsPerMinute: number | null;
  /** The least priority number that its jobs may have. */
  readonly mostUrgent: number;
}

/** What a request says of its tenant. */
export interface TenantClaim {
  readonly authorization: string | undefined;
  /** The header `x-caravan-tenant`. */
  readonly name: string | undefined;
}

export const tenantName = /^[\w.-]{1,64}$/;
