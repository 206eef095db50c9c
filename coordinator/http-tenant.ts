/** What the headers of a request say of its job: whose it is, how urgent, and by when it must end. */
import type { FastifyReply, FastifyRequest } from 'fastify';
import { CaravanError } from '../proto/errors.js';
import type { Estimate } from './admission.js';
import type { Journal, JobRecord } from './journal.js';
import { deadlineField, deadlineMsOf } from './openai-terms.js';
import type { JobTerms } from './request.js';
import type { Tenant } from './tenant.js';
import type { Tenants } from './tenants.js';

export interface TenantRoutes {
  readonly tenants: Tenants;
}

const single = (header: string | string[] | undefined): string | undefined =>
  Array.isArray(header) ? header[0] : header;

/** @throws CaravanError `invalid_api_key`, `invalid_request`. */
export function tenantOf({ tenants }: TenantRoutes, { headers }: FastifyRequest): Tenant {
  const { authorization, 'x-caravan-tenant': name } = headers;
  return tenants.find({ authorization, name: single(name) });
}

/** Whose a request's jobs, files and batches are kept apart for; null where everybody sees everything. */
export const ownerOf = (routes: TenantRoutes, request: FastifyRequest): string | null =>
  routes.tenants.areApart ? tenantOf(routes, request).name : null;

/** A job of the request's tenant. @throws CaravanError `not_found`, also for one that is another's. */
export async function ownJob(
  routes: TenantRoutes & { readonly journal: Journal },
  request: FastifyRequest,
  id: string,
): Promise<JobRecord> {
  const job = await routes.journal.job(id);
  if (job !== null && routes.tenants.mayMind(tenantOf(routes, request), job.terms.tenant))
    return job;
  throw new CaravanError('not_found', `job ${id} is not known`);
}

/** The terms of a body, unless headers say otherwise. @throws CaravanError `invalid_request`. */
export function termsOf({ headers }: FastifyRequest, terms: JobTerms): JobTerms {
  const priority = single(headers['x-caravan-priority']);
  const deadline = single(headers['x-caravan-deadline']);
  return {
    ...terms,
    ...(priority === undefined ? {} : { priority: priorityOf(priority) }),
    ...(deadline === undefined ? {} : { deadlineMs: headerDeadlineMs(deadline) }),
  };
}

function priorityOf(text: string): number {
  const value = /^\d{1,4}$/.test(text) ? Number(text) : 0;
  if (value >= 1 && value <= 1000) return value;
  throw new CaravanError(
    'invalid_request',
    `x-caravan-priority: must be a whole number from 1 to 1000, got ${text}`,
    { param: 'priority' },
  );
}

function headerDeadlineMs(text: string): number {
  const parsed = deadlineField.safeParse(/^[\d.]+$/.test(text) ? Number(text) : text);
  if (parsed.success) return deadlineMsOf(parsed.data);
  throw new CaravanError(
    'invalid_request',
    `x-caravan-deadline: must be seconds above 0 or a time such as 2030-01-31T08:00:00Z, got ${text}`,
    { param: 'deadline' },
  );
}

/** Headers that say when a job will probably start and end. */
export function estimateHeaders(estimate: Estimate | null): Record<string, string> {
  if (estimate === null) return {};
  const time = (ms: number): string => new Date(ms).toISOString();
  return { 'x-caravan-start': time(estimate.startMs), 'x-caravan-end': time(estimate.endMs) };
}

/** Puts what is known of the job into the answer's headers, stream or not. */
export function sendJobHeaders(
  reply: FastifyReply,
  jobId: string,
  estimate: Estimate | null,
): Record<string, string> {
  const headers = { 'x-caravan-job': jobId, ...estimateHeaders(estimate) };
  void reply.headers(headers);
  return headers;
}
