/** The whole command line: one file per command. */
import { Command } from 'commander';
import { packageVersion } from '../package-root.js';
import { register as registerBatch } from './batch.js';
import { register as registerBench } from './bench.js';
import { register as registerCache } from './cache.js';
import { register as registerCancel } from './cancel.js';
import { register as registerCoordinator } from './coordinator.js';
import { register as registerDoctor } from './doctor.js';
import { register as registerEval } from './eval.js';
import { register as registerGateway } from './gateway.js';
import { register as registerGenerate } from './generate.js';
import { register as registerInspect } from './inspect.js';
import { register as registerJobs } from './jobs.js';
import { pullNamedModel, register as registerPull } from './pull.js';
import { register as registerResult } from './result.js';
import { register as registerSubmit } from './submit.js';
import { register as registerTokenize } from './tokenize.js';
import { register as registerUp } from './up.js';

/** In the order of the help text. */
const commands = [
  registerUp,
  registerGenerate,
  registerEval,
  registerInspect,
  registerTokenize,
  registerSubmit,
  registerJobs,
  registerResult,
  registerCancel,
  registerBatch,
  registerBench,
  registerCoordinator,
  registerGateway,
  registerPull,
  registerCache,
  registerDoctor,
];

/** Ranks are processes of another room, which this one never imports: the launcher starts them. */
const workerHelp = `
One more command, of the launcher itself:
  worker --listen HOST:PORT [--device cpu]  one rank; see \`caravan worker --help\`
`;

/** Errors are thrown as CommanderError, and nothing is printed for them. */
export function createProgram(): Command {
  const program = new Command('caravan')
    .description('Serves Llama 2 on many devices at once.')
    .version(packageVersion(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print help')
    .helpCommand(false)
    .addHelpText('after', workerHelp)
    // A failure is printed once, in one line, by main.
    .configureOutput({ outputError: () => undefined })
    .exitOverride();
  for (const register of commands) register(program);
  program.hook('preAction', (_, command) => pullNamedModel(command));
  return program;
}
