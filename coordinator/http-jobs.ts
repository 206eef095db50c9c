/** What can be asked of a single job, whoever submitted it: how it stands, and that it ends. */
import type { FastifyInstance } from 'fastify';
import type { Answers } from './answers.js';
import { ownJob, type TenantRoutes } from './http-tenant.js';
import type { Journal } from './journal.js';
import { jobBody } from './openai-job.js';

export interface JobRoutes extends TenantRoutes {
  readonly journal: Journal;
  readonly answers: Answers;
}

type OfJob = { Params: { id: string } };

export function addJobRoutes(app: FastifyInstance, routes: JobRoutes): void {
  app.get<OfJob>('/v1/jobs/:id', async (request) =>
    jobBody(await ownJob(routes, request, request.params.id)),
  );
  app.post<OfJob>('/v1/jobs/:id/cancel', async (request) => {
    const { id } = request.params;
    const { model } = await ownJob(routes, request, id);
    await routes.answers.cancel(id, model);
    return jobBody(await ownJob(routes, request, id));
  });
}
