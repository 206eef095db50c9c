/** `caravan result`: waits for the end of a job and prints it. */
import type { Command } from 'commander';
import { CaravanError } from '../../proto/errors.js';
import { endingError } from '../answers.js';
import { Journal } from '../journal.js';
import { sequenceCount } from '../job-sequences.js';
import { usageBody } from '../openai-answer.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('result')
    .description('Waits for the end of a job and prints its text; exit code 0 when it completed.')
    .argument('<id>', 'the job');
  const settings = declareSettings(command, ['redis', 'json'], { required: ['redis'] });
  command.action(async (id: string) => {
    const { redis, json } = settings();
    const journal = await Journal.open(redis, 'impatient');
    const interrupted = new AbortController();
    process.once('SIGINT', () => {
      interrupted.abort(new CaravanError('cancelled', 'interrupted; the job goes on'));
    });
    try {
      const job = await journal.job(id);
      const texts = Array<string>(job === null ? 1 : sequenceCount(job.request)).fill('');
      const starts = texts.map(() => 0);
      for await (const { index, entry } of journal.readAll(id, starts, interrupted.signal)) {
        texts[index]! += entry.kind === 'tokens' ? entry.texts.join('') : entry.text;
        if (entry.kind !== 'end') continue;
        const { ending } = entry;
        const completed = ending.status === 'completed' ? ending : null;
        if (json) {
          const finishReason = completed?.finishReason ?? null;
          const usage = completed === null ? null : usageBody(completed.usage);
          const several = texts.length > 1 ? { texts } : {};
          const result = { id, status: ending.status, text: texts[0], finishReason, usage };
          process.stdout.write(`${JSON.stringify({ ...result, ...several })}\n`);
        } else {
          process.stdout.write(`${texts.join('\n')}\n`);
        }
        if (ending.status !== 'completed') throw endingError(ending);
      }
    } finally {
      journal.close();
    }
  });
}
