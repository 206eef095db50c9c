/** `caravan jobs`: what waits, runs and has ended. */
import type { Command } from 'commander';
import { z } from 'zod';
import { Journal, type JobRecord } from '../journal.js';
import { JobQueue } from '../queue.js';
import { Store } from '../store.js';
import { checked, declareSettings } from './options.js';

const DEFAULT_LIMIT = 50;

export function register(program: Command): void {
  const command = program
    .command('jobs')
    .description('Lists jobs of all models: what waits, runs and has ended.')
    .option(
      '--limit <n>',
      `jobs of each state and model (default: ${DEFAULT_LIMIT})`,
      checked(z.coerce.number().int().min(1).max(10_000), 'a whole number from 1 to 10000'),
    );
  const settings = declareSettings(command, ['redis', 'json'], { required: ['redis'] });
  command.action(async () => {
    const { redis, json } = settings();
    const { limit = DEFAULT_LIMIT } = command.opts<{ limit?: number }>();
    const store = await Store.open(redis, 'impatient');
    const journal = await Journal.open(redis, 'impatient');
    try {
      const records: JobRecord[] = [];
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
