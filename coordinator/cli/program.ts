/** The whole command line: one file per command. */
import { Command } from 'commander';
import { packageVersion } from '../package-root.js';

interface CommandFile {
  readonly register: (program: Command) => void;
}

/**
 * In the order of the help text. A command's file is read when the command is called: together they are most of what this
 * program is made of, and most of the time that a short command would take.
 */
const commands: Readonly<Record<string, () => Promise<CommandFile>>> = {
  up: () => import('./up.js'),
  generate: () => import('./generate.js'),
  eval: () => import('./eval.js'),
  inspect: () => import('./inspect.js'),
  tokenize: () => import('./tokenize.js'),
  submit: () => import('./submit.js'),
  jobs: () => import('./jobs.js'),
  result: () => import('./result.js'),
  cancel: () => import('./cancel.js'),
  batch: () => import('./batch.js'),
  bench: () => import('./bench.js'),
  coordinator: () => import('./coordinator.js'),
  gateway: () => import('./gateway.js'),
  pull: () => import('./pull.js'),
  cache: () => import('./cache.js'),
  doctor: () => import('./doctor.js'),
};

/** Commands that open the model that `--model` names. Others only name it, or say what is wrong with it. */
const openers = ['up', 'generate', 'eval', 'inspect', 'tokenize', 'coordinator'];

/** Ranks are processes of another room, which this one never imports: the launcher starts them. */
const workerHelp = `
One more command, of the launcher itself:
  worker --listen HOST:PORT [--device cpu]  one rank; see \`caravan worker --help\`
`;

/**
 * The command line. Errors are thrown as CommanderError, and nothing is printed for them.
 *
 * @param called the command that will be called, if that is known: the others are left out.
 */
export async function createProgram(called?: string): Promise<Command> {
  const program = new Command('caravan')
    .description('Serves Llama 2 on many devices at once.')
    .version(packageVersion(), '-V, --version', 'print the version')
    .helpOption('-h, --help', 'print help')
    .helpCommand(false)
    .addHelpText('after', workerHelp)
    // A failure is printed once, in one line, by main.
    .configureOutput({ outputError: () => undefined })
    .exitOverride();
  const isKnown = called !== undefined && Object.hasOwn(commands, called);
  const names = isKnown ? [called] : Object.keys(commands);
  // At once, and then in their order.
  const files = await Promise.all(names.map((name) => commands[name]!()));
  for (const { register } of files) register(program);
  program.hook('preAction', async (_, command) => {
    if (!openers.includes(command.name())) return;
    const { pullNamedModel } = await import('./pull.js');
    await pullNamedModel(command);
  });
  return program;
}
