/** `caravan cancel`: withdraws a job, waiting or running. */
import type { Command } from 'commander';
import { Journal } from '../journal.js';
import { unknownJob } from '../journal-reader.js';
import { JobQueue } from '../queue.js';
import { cancelJob } from '../unheld-jobs.js';
import { declareSettings } from './options.js';

const outcomes = {
  cancelled: 'cancelled',
  requested: 'its engine was asked to end it',
  already: 'it had ended already',
} as const;

export function register(program: Command): void {
  const command = program
    .command('cancel')
    .description('Cancels a job, waiting or running.')
    .argument('<id>', 'the job');
  const settings = declareSettings(command, ['redis', 'json'], { required: ['redis'] });
  command.action(async (id: string) => {
    const { redis, json } = settings();
    const journal = await Journal.open(redis, 'impatient');
    try {
      const job = await journal.job(id);
      if (job === null) throw unknownJob(id);
      const queue = new JobQueue(redis, job.model);
      const outcome = await cancelJob(journal, queue, id).finally(() => queue.close());
      process.stdout.write(
        json ? `${JSON.stringify({ id, outcome })}\n` : `${id}: ${outcomes[outcome]}\n`,
      );
    } finally {
      journal.close();
    }
  });
}
