/** Entry of the command line: every failure is one line on stderr and an exit code. */
import { CommanderError } from 'commander';
import { toCaravanError } from '../../proto/errors.js';
import { createProgram } from './program.js';

function fail(message: string, exitCode: 1 | 2): void {
  process.stderr.write(`caravan: ${message.replace(/\s*\n\s*/g, ' ').trim()}\n`);
  process.exitCode = exitCode;
}

/** A reader that has seen enough (`| head`) is no failure. */
process.stdout.on('error', (error: NodeJS.ErrnoException) => {
  if (error.code === 'EPIPE') process.exit(0);
  throw error;
});

try {
  const program = await createProgram(process.argv[2]);
  await program.parseAsync(process.argv);
} catch (thrown) {
  if (thrown instanceof CommanderError) {
    // Help and version end this way too, with 0, as a call without a command does with its help.
    const isHelp = thrown.code.startsWith('commander.help') || thrown.code === 'commander.version';
    if (!isHelp) {
      const message = thrown.message.replace(/^error: /, '');
      fail(`${message}; see caravan --help`, 2);
    } else if (thrown.exitCode !== 0) {
      fail('a command is needed; see caravan --help', 2);
    }
  } else {
    const error = toCaravanError(thrown);
    fail(error.message, error.code === 'bad_usage' ? 2 : 1);
    // A channel to a parent or a connection to a dead Redis must not keep what has failed.
    process.exit();
  }
}
