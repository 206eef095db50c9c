/** `caravan result`: waits for the end of a job and prints it. */
import type { Command } from 'commander';
import { CaravanError } from '../../proto/errors.js';
import { endingError } from '../answers.js';
import { Journal } from '../journal.js';
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
      let text = '';
      for await (const entry of journal.read(id, 0, 0, interrupted.signal)) {
        if (entry.kind === 'tokens') {
          text += entry.texts.join('');
          continue;
        }
        const { ending } = entry;
        text += entry.text;
        const completed = ending.status === 'completed' ? ending : null;
        if (json) {
          const finishReason = completed?.finishReason ?? null;
          const usage = completed === null ? null : usageBody(completed.usage);
          const result = { id, status: ending.status, text, finishReason, usage };
          process.stdout.write(`${JSON.stringify(result)}\n`);
        } else {
          process.stdout.write(`${text}\n`);
        }
        if (ending.status !== 'completed') throw endingError(ending);
      }
    } finally {
      journal.close();
    }
  });
}
