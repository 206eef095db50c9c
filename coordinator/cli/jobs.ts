/** `caravan jobs`: what waits, runs and has ended, and another try for what has failed. */
import type { Command } from 'commander';
import { z } from 'zod';
import { CaravanError } from '../../proto/errors.js';
import { Answers } from '../answers.js';
import { Journal, type JobRecord } from '../journal.js';
import { unknownJob } from '../journal-reader.js';
import { GatewayMetrics } from '../metrics.js';
import { JobQueue } from '../queue.js';
import { Store } from '../store.js';
import { checked, declareSettings } from './options.js';

const DEFAULT_LIMIT = 50;

export function register(program: Command): void {
  const jobs = program
    .command('jobs')
    .description('Lists jobs, and tries one again that has failed.');
  registerList(jobs);
  registerRetry(jobs);
}

function registerList(jobs: Command): void {
  const command = jobs
    .command('list', { isDefault: true })
    .description('Lists jobs of all models: what waits, runs and has ended.')
    .option('--dead', 'only those that ended every engine that ran them, the latest first')
    .option(
      '--limit <n>',
      `jobs of each state and model (default: ${DEFAULT_LIMIT})`,
      checked(z.coerce.number().int().min(1).max(10_000), 'a whole number from 1 to 10000'),
    );
  const settings = declareSettings(command, ['redis', 'json'], { required: ['redis'] });
  command.action(async () => {
    const { redis, json } = settings();
    const { limit = DEFAULT_LIMIT, dead } = command.opts<{ limit?: number; dead?: true }>();
    const store = await Store.open(redis, 'impatient');
    const journal = await Journal.open(redis, 'impatient');
    try {
      const records: JobRecord[] = [];
      if (dead === true) {
        for (const id of await journal.dead(limit)) {
          const record = await journal.job(id);
          // Marked before it ended: the ending follows.
          if (record?.status === 'failed') process.stdout.write(`${deadLineOf(record, json)}\n`);
        }
        return;
      }
      for (const { name } of await store.cards()) {
        const queue = new JobQueue(redis, name);
        for (const id of await queue.ids(limit)) {
          const record = await journal.job(id);
          if (record !== null) records.push(record);
        }
        await queue.close();
      }
      records.sort((a, b) => a.createdMs - b.createdMs);
      for (const record of records) process.stdout.write(`${lineOf(record, json)}\n`);
      if (records.length === 0 && !json) process.stderr.write('no jobs\n');
    } finally {
      journal.close();
      store.close();
    }
  });
}

function registerRetry(jobs: Command): void {
  const command = jobs
    .command('retry')
    .description(
      'Submits the request of a job that did not complete again, as a new job without a deadline.',
    )
    .argument('<id>', 'the job');
  const settings = declareSettings(command, ['redis', 'json'], { required: ['redis'] });
  command.action(async (id: string) => {
    const { redis, json } = settings();
    const journal = await Journal.open(redis, 'impatient');
    const answers = new Answers(redis, journal, new GatewayMetrics(), () => undefined);
    try {
      const job = await journal.job(id);
      if (job === null) throw unknownJob(id);
      if (job.ending === null || job.ending.status === 'completed') {
        throw new CaravanError(
          'bad_usage',
          `job ${id} is ${job.status}: there is nothing to retry`,
        );
      }
      const { priority, tenant, weight } = job.terms;
      const owner = {
        ...(tenant === undefined ? {} : { tenant }),
        ...(weight === undefined ? {} : { weight }),
      };
      const terms = { priority, deadlineMs: null, ...owner };
      const { id: retry } = await answers.submit({ request: job.request, terms });
      await journal.unmarkDead(id);
      process.stdout.write(json ? `${JSON.stringify({ id: retry })}\n` : `${retry}\n`);
    } finally {
      await answers.close();
      journal.close();
    }
  });
}

function deadLineOf({ id, model, createdMs, ending }: JobRecord, json: boolean): string {
  const created = new Date(createdMs).toISOString();
  const { code, message } = ending?.status === 'failed' ? ending : { code: '', message: '' };
  if (json) return JSON.stringify({ id, model, created, code, message });
  return [id, model, created, message].join('  ');
}

function lineOf({ id, model, status, terms, createdMs, ending }: JobRecord, json: boolean): string {
  const created = new Date(createdMs).toISOString();
  const { priority, deadlineMs } = terms;
  if (json) {
    const deadline = deadlineMs === null ? null : new Date(deadlineMs).toISOString();
    return JSON.stringify({ id, model, status, priority, created, deadline, ending });
  }
  const tokens = ending?.status === 'completed' ? `${ending.usage.completionTokens} tokens` : '';
  return [id, status.padEnd(9), model, created, `priority ${priority}`, tokens]
    .join('  ')
    .trimEnd();
}
