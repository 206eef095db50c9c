/**
 * Fetches a model into a folder, once: what is there and sound is kept, what an interrupted pull left is gone on with,
 * and a manifest says when all is there.
 */
import fs from 'node:fs';
import path from 'node:path';
import {
  MANIFEST_FILE,
  readManifest,
  type HubSource,
  type PullManifest,
} from '../model/hub-folder.js';
import { makeFolder } from '../model/folder.js';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { isFileSound, spellChecksum } from './checksum.js';
import { download, type DownloadOptions } from './download.js';
import { Hub, type HubSettings } from './hub.js';
import { onDisk, partFolder, type RemoteFile } from './partial-file.js';
import type { ProgressBar } from './progress-bar.js';
import { chooseLayout, weightFilesOf } from './pull-layout.js';
import { lockFolder } from './pull-lock.js';
import type { Web, WebResponse } from './web.js';

export interface PullOptions {
  readonly web: Web;
  readonly folder: string;
  readonly bar: ProgressBar;
  /** Says one line to the user. */
  readonly say: (line: string) => void;
  readonly signal: AbortSignal;
  /** How files are fetched; tests make pieces small and pauses short. */
  readonly tuning?: Pick<DownloadOptions, 'connections' | 'pieceBytes' | 'stallMs' | 'retryMs'>;
}

export interface Pulled {
  readonly folder: string;
  readonly manifest: PullManifest;
  /** Bytes that came over the wire. */
  readonly fetchedBytes: number;
}

/**
 * Fetches the files of one layout of a repository.
 *
 * @throws CaravanError `hub_unavailable`, `unauthorized`, `not_found`, `unsupported_model`, `checksum_mismatch`,
 *   `disk_full`.
 */
export function pullFromHub(
  source: HubSource,
  settings: HubSettings,
  options: PullOptions,
): Promise<Pulled> {
  return intoFolder(options, async (fetchAll) => {
    const hub = new Hub(settings, options.web);
    const id = `hf:${source.organization}/${source.name}`;
    const repository = await hub.open(source, options.signal);
    const layout = chooseLayout(id, repository.names);
    const how = {
      headers: hub.headers,
      explain: (response: WebResponse, name: string) => hub.explain(response, source, name),
    };
    let files = layout.names.map((name) => repository.file(name));
    if (layout.index !== null) {
      // The index first: it names the files that hold the weights.
      await fetchAll([repository.file(layout.index)], how);
      const index = await fs.promises.readFile(path.join(options.folder, layout.index), 'utf8');
      files = files.concat(weightFilesOf(id, index).map((name) => repository.file(name)));
    }
    await fetchAll(files, how);
    return { source: `${id}@${source.revision}`, revision: repository.commit, files };
  });
}

/** Fetches files, and keeps those that are there. Files that it has fetched before are passed over. */
export type FetchAll = (
  files: readonly RemoteFile[],
  how: Pick<DownloadOptions, 'headers' | 'explain'>,
) => Promise<void>;

/** What a pull ends with. */
export interface Whole {
  readonly source: string;
  readonly revision: string | null;
  readonly files: readonly RemoteFile[];
}

/** Holds the folder, lets `work` fetch into it, and writes the manifest. */
export async function intoFolder(
  { web, folder, bar, say, signal, tuning }: PullOptions,
  work: (fetchAll: FetchAll) => Promise<Whole>,
): Promise<Pulled> {
  try {
    makeFolder(folder);
  } catch (cause) {
    throw new CaravanError(
      'bad_usage',
      `${folder}: cannot be made: ${toCaravanError(cause).message}`,
      {
        cause,
      },
    );
  }
  const release = await lockFolder(
    folder,
    () => {
      say(`another caravan pull fetches into ${folder}; waiting for it`);
    },
    signal,
  );
  let fetchedBytes = 0;
  try {
    const known = readManifest(folder);
    const fetchAll: FetchAll = async (files, how) => {
      const missing: RemoteFile[] = [];
      for (const file of files) {
        bar.note(`checking ${file.name}`);
        if (!(await isThere(folder, file, known, signal))) missing.push(file);
      }
      if (missing.length === 0) return;
      // Until all is there again, nothing says so.
      await fs.promises.rm(path.join(folder, MANIFEST_FILE), { force: true });
      bar.expect(missing.reduce((sum, { bytes }) => sum + bytes, 0));
      const left = new Map<string, boolean>();
      await download(folder, missing, {
        ...tuning,
        ...how,
        web,
        signal,
        onBytes: (name, byteCount) => {
          // The first of each file are those that were left by an earlier process.
          const isNew = left.has(name);
          left.set(name, true);
          if (isNew && byteCount > 0) fetchedBytes += byteCount;
          bar.advance(byteCount, isNew);
          bar.note(name);
        },
      });
    };
    const { files, ...whole } = await work(fetchAll);
    const manifest: PullManifest = {
      version: 1,
      ...whole,
      files: await Promise.all(
        files.map(async ({ name, bytes, checksum }) => {
          const { mtimeMs } = await fs.promises.stat(path.join(folder, name));
          return { name, bytes, checksum: spellChecksum(checksum), modifiedMs: mtimeMs };
        }),
      ),
    };
    await onDisk(MANIFEST_FILE, () => writeManifest(folder, manifest));
    await fs.promises.rm(partFolder(folder), { recursive: true, force: true });
    bar.end();
    return { folder, manifest, fetchedBytes };
  } finally {
    release();
  }
}

/** Whether the file is there and is what it should be. What was checked once and has not changed is not read again. */
async function isThere(
  folder: string,
  { name, bytes, checksum }: RemoteFile,
  known: PullManifest | null,
  signal: AbortSignal,
): Promise<boolean> {
  const file = path.join(folder, name);
  const stat = await fs.promises.stat(file).catch(() => null);
  if (stat?.size !== bytes) return false;
  if (checksum === null) return true;
  const entry = known?.files.find((one) => one.name === name);
  const isKnown = entry?.checksum === spellChecksum(checksum) && entry.modifiedMs === stat.mtimeMs;
  return isKnown || isFileSound(file, checksum, signal);
}

async function writeManifest(folder: string, manifest: PullManifest): Promise<void> {
  const file = path.join(folder, MANIFEST_FILE);
  await fs.promises.writeFile(`${file}.new`, `${JSON.stringify(manifest, null, 1)}\n`);
  await fs.promises.rename(`${file}.new`, file);
}
