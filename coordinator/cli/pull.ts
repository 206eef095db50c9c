/** `caravan pull`: fetches a model from a Hugging Face hub, or by Meta's signed URL. */
import path from 'node:path';
import type { Command } from 'commander';
import {
  caravanHome,
  hubFolder,
  isHubModel,
  isPulled,
  parseHubSource,
} from '../../model/hub-folder.js';
import { CaravanError } from '../../proto/errors.js';
import { readConfigFile, resolveConfig } from '../config.js';
import { hubSettings } from '../hub.js';
import { parseMetaSource, pullFromMeta } from '../meta-download.js';
import { ProgressBar, spellBytes } from '../progress-bar.js';
import { pullFromHub, type Pulled, type PullOptions } from '../pull.js';
import { Web } from '../web.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('pull')
    .description("Fetches a model from a Hugging Face hub, or by the signed URL of Meta's e-mail.")
    .argument('<source>', 'hf:ORG/NAME, hf:ORG/NAME@REVISION, or meta:SIGNED_URL')
    .argument('[name]', 'with meta: which model, 7b to 70b-chat')
    .option('--to <folder>', "folder to fetch into (default: one of the user's cache)");
  const settings = declareSettings(command, ['json']);
  command.action(async (source: string, name: string | undefined) => {
    const { json } = settings();
    const { to } = command.opts<{ to?: string }>();
    const pulled = await pull(source, name, to);
    const { folder, fetchedBytes, manifest } = pulled;
    if (json) {
      const files = manifest.files.map(({ name: file, bytes, checksum }) => ({
        ...{ name: file, bytes, checksum },
      }));
      const { revision } = manifest;
      const report = { folder, source: manifest.source, revision, fetchedBytes, files };
      process.stdout.write(`${JSON.stringify(report)}\n`);
      return;
    }
    say(`${manifest.files.length} files, ${spellBytes(fetchedBytes)} fetched`);
    process.stdout.write(`${folder}\n`);
  });
}

const say = (line: string): void => {
  process.stderr.write(`${line}\n`);
};

function pull(source: string, name: string | undefined, to: string | undefined): Promise<Pulled> {
  const home = caravanHome(process.env);
  if (isHubModel(source)) {
    if (name !== undefined) {
      throw new CaravanError('bad_usage', `${name}: only meta: takes a model's name`);
    }
    const hub = parseHubSource(source);
    const folder = to ?? hubFolder(hub, process.env);
    return interruptible(folder, source, (options) =>
      pullFromHub(hub, hubSettings(process.env), options),
    );
  }
  if (!source.startsWith('meta:')) {
    throw new CaravanError('bad_usage', `${source}: must be hf:ORG/NAME or meta:SIGNED_URL`);
  }
  if (name === undefined) {
    throw new CaravanError(
      'bad_usage',
      'meta:SIGNED_URL needs the name of a model: 7b to 70b-chat',
    );
  }
  const meta = parseMetaSource(source, name);
  const folder = to ?? path.join(home, 'meta', meta.model);
  return interruptible(folder, `meta:${meta.model}`, (options) => pullFromMeta(meta, options));
}

/** Runs a pull with a bar on stderr, until it ends or Ctrl-C. */
async function interruptible(
  folder: string,
  title: string,
  run: (options: PullOptions) => Promise<Pulled>,
): Promise<Pulled> {
  const web = new Web();
  const interrupted = new AbortController();
  const interrupt = (): void => {
    interrupted.abort(
      new CaravanError('cancelled', `${title}: interrupted; the same command goes on where it was`),
    );
  };
  process.once('SIGINT', interrupt);
  process.once('SIGTERM', interrupt);
  const bar = new ProgressBar(title, process.stderr);
  try {
    const absolute = path.resolve(folder);
    return await run({ web, folder: absolute, bar, say, signal: interrupted.signal });
  } catch (error) {
    bar.end();
    throw error;
  } finally {
    process.removeListener('SIGINT', interrupt);
    process.removeListener('SIGTERM', interrupt);
    await web.close();
  }
}

/**
 * Fetches what is missing of `--model hf:ORG/NAME` before a command opens it. Once it is all there, nothing is asked of
 * the hub: `caravan pull` looks for something newer.
 */
export async function pullNamedModel(command: Command): Promise<void> {
  const { model } = resolveConfig(['model'], {
    flags: command.opts<Record<string, unknown>>(),
    env: process.env,
    file: readConfigFile(process.env),
  });
  if (!isHubModel(model)) return;
  if (!isPulled(hubFolder(parseHubSource(model), process.env)))
    await pull(model, undefined, undefined);
}
