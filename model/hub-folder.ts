/** Where models of a Hugging Face hub lie once `caravan pull` has fetched them, and what it wrote down of them. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';

/** A repository, as `hf:ORG/NAME[@REV]` names it. */
export interface HubSource {
  readonly organization: string;
  readonly name: string;
  /** A branch, tag or commit; `main` unless it is named. */
  readonly revision: string;
}

const sourcePattern = /^hf:([\w.-]+)\/([\w.-]+)(?:@([\w./-]+))?$/;

export const isHubModel = (model: string): boolean => model.startsWith('hf:');

/** @throws CaravanError `bad_usage` when it is not `hf:ORG/NAME[@REV]`. */
export function parseHubSource(text: string): HubSource {
  const [, organization, name, revision = 'main'] = sourcePattern.exec(text) ?? [];
  // A name of dots alone, or one within a revision, would lead out of the folder.
  const isSafe = ![organization, name, ...revision.split('/')].some((part) =>
    /^\.*$/.test(part ?? ''),
  );
  if (organization === undefined || name === undefined || !isSafe) {
    throw new CaravanError('bad_usage', `${text}: must be hf:ORG/NAME or hf:ORG/NAME@REVISION`);
  }
  return { organization, name, revision };
}

/** The folder of everything that is fetched: $CARAVAN_HOME, else the user's cache folder. */
export function caravanHome(env: NodeJS.ProcessEnv): string {
  const cache = env['XDG_CACHE_HOME'] ?? path.join(os.homedir(), '.cache');
  return env['CARAVAN_HOME'] ?? path.join(cache, 'caravan');
}

/** CARAVAN_HOME/hub/ORG/NAME, or …/NAME@REV. */
export function hubFolder(source: HubSource, env: NodeJS.ProcessEnv): string {
  const { organization, name, revision } = source;
  const suffix = revision === 'main' ? '' : `@${revision.replaceAll('/', '-')}`;
  return path.join(caravanHome(env), 'hub', organization, `${name}${suffix}`);
}

/** Stands in a folder when everything is there, and says what. */
export const MANIFEST_FILE = '.caravan-pull.json';

const manifestFile = z.object({
  version: z.literal(1),
  /** What was asked for; of a signed URL only the model's name. */
  source: z.string(),
  /** The hub's commit; null where there is none. */
  revision: z.string().nullable(),
  files: z.array(
    z.object({
      name: z.string(),
      bytes: z.number(),
      /** `sha256:HEX`, `git:HEX` (a git blob's SHA-1) or `md5:HEX`; null where the source names none. */
      checksum: z.string().nullable(),
      /** When it was checked: a file that has changed since is checked again. */
      modifiedMs: z.number(),
    }),
  ),
});

export type PullManifest = z.infer<typeof manifestFile>;

/** What a pull wrote down, or null where none has ended, or it cannot be read. */
export function readManifest(folder: string): PullManifest | null {
  try {
    const text = fs.readFileSync(path.join(folder, MANIFEST_FILE), 'utf8');
    return manifestFile.safeParse(JSON.parse(text)).data ?? null;
  } catch {
    return null;
  }
}

/** Whether a pull into this folder has ended, and its files are still there. */
export const isPulled = (folder: string): boolean =>
  readManifest(folder)?.files.every(({ name, bytes }) => {
    const stat = fs.statSync(path.join(folder, name), { throwIfNoEntry: false });
    return stat?.size === bytes;
  }) ?? false;

/**
 * What `--model hf:ORG/NAME` opens: the folder, or its GGUF file.
 *
 * @throws CaravanError `bad_usage`, or `not_found` when it has not been pulled.
 */
export function pulledModelPath(model: string, env: NodeJS.ProcessEnv): string {
  const folder = hubFolder(parseHubSource(model), env);
  if (!isPulled(folder)) {
    throw new CaravanError('not_found', `${model}: is not in ${folder}; run caravan pull ${model}`);
  }
  const names = (readManifest(folder)?.files ?? []).map(({ name }) => name);
  const gguf = names.filter((name) => name.endsWith('.gguf')).sort()[0];
  return gguf === undefined ? folder : path.join(folder, gguf);
}
