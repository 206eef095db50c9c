/** What can be asked of a single job, whoever submitted it: how it stands, and that it ends. */
import type { FastifyInstance } from 'fastify';
import { CaravanError } from '../proto/errors.js';
import type { Answers } from './answers.js';
import type { Journal, JobRecord } from './journal.js';
import { jobBody } from './openai-job.js';

export interface JobRoutes {
  readonly journal: Journal;
  readonly answers: Answers;
}

type OfJob = { Params: { id: string } };

export function addJobRoutes(app: FastifyInstance, { journal, answers }: JobRoutes): void {
  const find = async (id: string): Promise<JobRecord> => {
    const job = await journal.job(id);
    if (job === null) throw new CaravanError('not_found', `job ${id} is not known`);
    return job;
  };
  app.get<OfJob>('/v1/jobs/:id', async ({ params: { id } }) => jobBody(await find(id)));
  app.post<OfJob>('/v1/jobs/:id/cancel', async ({ params: { id } }) => {
    const { model } = await find(id);
    await answers.cancel(id, model);
    return jobBody(await find(id));
  });
}
