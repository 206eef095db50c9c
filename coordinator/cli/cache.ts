/** `caravan cache`: what ranks on this machine have kept of their weights. */
import fs from 'node:fs';
import path from 'node:path';
import type { Command } from 'commander';
import { CaravanError } from '../../proto/errors.js';
import {
  defaultWeightCacheFolder,
  isAbandoned,
  listCachedWeights,
  type CachedWeights,
} from '../../model/weight-cache-folder.js';
import { spellBytes } from '../progress-bar.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const cache = program
    .command('cache')
    .description('Lists and removes weights that ranks have kept for their next start.')
    .helpCommand(false);
  registerList(cache);
  registerRemove(cache);
}

function registerList(cache: Command): void {
  const command = cache
    .command('ls')
    .description('Lists the weights that are kept here, the last used first.');
  const settings = declareSettings(command, ['weightCache', 'json']);
  command.action(() => {
    const { weightCache, json } = settings();
    const { folder, files } = read(weightCache);
    if (json) {
      process.stdout.write(`${JSON.stringify({ folder, files: files.map(toJson) })}\n`);
      return;
    }
    process.stdout.write(files.map((file) => `${toText(file)}\n`).join(''));
    process.stderr.write(`${folder}: ${files.length} files, ${spellBytes(sumOf(files))}\n`);
  });
}

function registerRemove(cache: Command): void {
  const command = cache
    .command('rm')
    .description('Removes kept weights: those of a model, by its name or by file, or all.')
    .argument('[names...]', 'names of models or files, as ls shows them')
    .option('--all', 'remove all');
  const settings = declareSettings(command, ['weightCache', 'json']);
  command.action((names: readonly string[]) => {
    const { weightCache, json } = settings();
    const { all } = command.opts<{ all?: true }>();
    if ((names.length === 0) !== (all === true)) {
      throw new CaravanError('bad_usage', 'cache rm needs either names of models or --all');
    }
    const { folder, files } = read(weightCache);
    const isNamed = (file: CachedWeights, name: string): boolean =>
      file.model === name || path.basename(file.file) === name;
    const unknown = names.find((name) => !files.some((file) => isNamed(file, name)));
    if (unknown !== undefined) {
      throw new CaravanError('not_found', `${unknown}: no weights of it are in ${folder}`);
    }
    const removed = files.filter(
      (file) => all === true || names.some((name) => isNamed(file, name)),
    );
    // What is being written stays: its rank would only write it to a file without a name.
    const going = removed.filter((file) => file.isWhole || isAbandoned(file));
    for (const { file } of going) fs.rmSync(file, { force: true });
    if (json) process.stdout.write(`${JSON.stringify({ folder, files: going.map(toJson) })}\n`);
    else process.stderr.write(`${going.length} files removed, ${spellBytes(sumOf(going))}\n`);
  });
}

function read(weightCache: string | undefined): { folder: string; files: CachedWeights[] } {
  if (weightCache === 'off') {
    throw new CaravanError('bad_usage', '--weight-cache off: name the folder to look into');
  }
  const folder = path.resolve(weightCache ?? defaultWeightCacheFolder(process.env));
  try {
    return { folder, files: listCachedWeights(folder) };
  } catch (cause) {
    const { message } = cause as Error;
    throw new CaravanError('bad_usage', `--weight-cache ${folder}: ${message}`, { cause });
  }
}

const sumOf = (files: readonly CachedWeights[]): number =>
  files.reduce((sum, { byteCount }) => sum + byteCount, 0);

const toJson = ({ file, model, mode, rank, tp, byteCount, usedMs, isWhole }: CachedWeights) => ({
  ...{ file: path.basename(file), model, weights: mode, rank, tp, bytes: byteCount },
  ...{ used: new Date(usedMs).toISOString(), isWhole },
});

function toText({ file, byteCount, usedMs, isWhole }: CachedWeights): string {
  const used = new Date(usedMs).toISOString().slice(0, 16).replace('T', ' ');
  const note = isWhole ? '' : '  (being written)';
  return `${used}  ${spellBytes(byteCount).padStart(9)}  ${path.basename(file)}${note}`;
}
