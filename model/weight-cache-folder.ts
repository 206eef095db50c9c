/**
 * The folder of the weight cache: one file for each rank of each way to hold a checkpoint. Names say what is in them:
 *
 *   llama-2-7b.int8.0of2.3f0c9a…e1.weights        whole
 *   llama-2-7b.int8.0of2.3f0c9a…e1.weights.….new   being written, or left by a process that was killed
 *
 * The ranks of one group share the digest. A file's time of change is when it was last used: the least recently used
 * go first when there are too many bytes.
 */
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { caravanHome } from './hub-folder.js';

export interface CachedWeights {
  readonly file: string;
  /** Name of the checkpoint. */
  readonly model: string;
  readonly mode: string;
  readonly rank: number;
  readonly tp: number;
  /** Hexadecimal; the same for all ranks of a group. */
  readonly digest: string;
  readonly byteCount: number;
  readonly usedMs: number;
  /** False while it is being written. */
  readonly isWhole: boolean;
}

/** What a file is of. */
export type CacheKey = Pick<CachedWeights, 'model' | 'mode' | 'rank' | 'tp' | 'digest'>;

const NAME = /^(.+)\.([a-z0-9+]+)\.(\d+)of(\d+)\.([0-9a-f]{32})\.weights(\.[0-9a-f-]+\.new)?$/;

/** A file that is being written changes all the time; one that has not for so long was left behind. */
const ABANDONED_AFTER_MS = 3_600_000;

/** In CARAVAN_HOME, else in the user's cache folder. */
export const defaultWeightCacheFolder = (env: NodeJS.ProcessEnv): string =>
  path.join(caravanHome(env), 'weights');

export function cacheFileName({ model, mode, rank, tp, digest }: CacheKey): string {
  const name = model.replace(/[^\w.-]/g, '_').slice(0, 100) || 'model';
  return `${name}.${mode}.${rank}of${tp}.${digest}.weights`;
}

/** Where a file is written before it gets its name. */
export const unfinishedName = (file: string): string => `${file}.${randomUUID()}.new`;

/** What is in the folder, the most recently used first; nothing where there is no folder. */
export function listCachedWeights(folder: string): CachedWeights[] {
  let names: string[];
  try {
    names = fs.readdirSync(folder);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return [];
    throw error;
  }
  const found: CachedWeights[] = [];
  for (const name of names) {
    const [, model, mode, rank, tp, digest, unfinished] = NAME.exec(name) ?? [];
    if (model === undefined) continue;
    const file = path.join(folder, name);
    const stat = fs.statSync(file, { throwIfNoEntry: false });
    if (stat?.isFile() !== true) continue;
    found.push({
      ...{ file, model, mode: mode!, rank: Number(rank), tp: Number(tp), digest: digest! },
      ...{ byteCount: stat.size, usedMs: stat.mtimeMs, isWhole: unfinished === undefined },
    });
  }
  return found.sort((a, b) => b.usedMs - a.usedMs);
}

/** Says that a file was used now. */
export function touchCached(file: string): void {
  const now = new Date();
  try {
    fs.utimesSync(file, now, now);
  } catch {
    // Removed meanwhile, or a folder that cannot be written: its order is all that is lost.
  }
}

/** Whether it was left behind by a process that is gone. */
export const isAbandoned = ({ isWhole, usedMs }: CachedWeights, nowMs = Date.now()): boolean =>
  !isWhole && nowMs - usedMs > ABANDONED_AFTER_MS;

/**
 * Removes what was left behind, and the least recently used files of other groups until all whole ones, with
 * `byteCount` more, have at most `maxBytes`. Files of the group itself stay: its ranks would only push each other out.
 *
 * @returns whether there is room then; if not, nothing but what was left behind is removed.
 */
export function makeRoom(
  folder: string,
  byteCount: number,
  maxBytes: number,
  groupDigest: string,
): boolean {
  const files = listCachedWeights(folder);
  for (const file of files.filter((one) => isAbandoned(one))) fs.rmSync(file.file, { force: true });
  // What others are writing is counted by them, when it is whole.
  const kept = files.filter(({ isWhole }) => isWhole);
  const removable = kept.filter(({ digest }) => digest !== groupDigest);
  const sum = (list: readonly CachedWeights[]): number =>
    list.reduce((total, file) => total + file.byteCount, 0);
  let excess = sum(kept) + byteCount - maxBytes;
  if (excess > sum(removable)) return false;
  while (excess > 0) {
    const oldest = removable.pop()!;
    fs.rmSync(oldest.file, { force: true });
    excess -= oldest.byteCount;
  }
  return true;
}
