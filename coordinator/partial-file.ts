/**
 * A file that is being fetched, piece by piece, in any order. What is there survives a killed process: beside the bytes
 * lies a journal of the pieces that are whole.
 *
 *     FOLDER/.caravan-pull/NAME.part      the bytes, as long as the whole file, with holes
 *     FOLDER/.caravan-pull/NAME.journal   what it is to be, then a line for each whole piece
 *     FOLDER/NAME                         appears at once, when all is there and its checksum is right
 */
import fs from 'node:fs';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { isFileSound, spellChecksum, type Checksum } from './checksum.js';

/** What is known of a file before it is fetched. */
export interface RemoteFile {
  /** A plain file name. */
  readonly name: string;
  readonly url: string;
  readonly bytes: number;
  /** Null where the source names none: then its length is all that is checked. */
  readonly checksum: Checksum | null;
}

export interface Piece {
  readonly file: PartialFile;
  readonly number: number;
  readonly start: number;
  /** First byte beyond it. */
  readonly end: number;
}

export const partFolder = (folder: string): string => path.join(folder, '.caravan-pull');

export class PartialFile {
  readonly remote: RemoteFile;
  /** Whether pieces of an earlier process were found. */
  readonly isResumed: boolean;
  readonly #folder: string;
  readonly #part: fs.promises.FileHandle;
  readonly #journal: fs.promises.FileHandle;
  readonly #pieceBytes: number;
  readonly #done: Set<number>;

  private constructor(
    folder: string,
    remote: RemoteFile,
    handles: { readonly part: fs.promises.FileHandle; readonly journal: fs.promises.FileHandle },
    pieceBytes: number,
    done: Set<number>,
  ) {
    this.#folder = folder;
    this.remote = remote;
    this.#part = handles.part;
    this.#journal = handles.journal;
    this.#pieceBytes = pieceBytes;
    this.#done = done;
    this.isResumed = done.size > 0;
  }

  /** Goes on with what an earlier process left, if it was of the same file. @throws CaravanError `disk_full`. */
  static async open(folder: string, remote: RemoteFile, pieceBytes: number): Promise<PartialFile> {
    const parts = partFolder(folder);
    return onDisk(remote.name, async () => {
      await fs.promises.mkdir(parts, { recursive: true });
      const header = JSON.stringify({
        bytes: remote.bytes,
        checksum: spellChecksum(remote.checksum),
        pieceBytes,
      });
      const [partPath, journalPath] = pathsOf(folder, remote.name);
      const count = Math.ceil(remote.bytes / pieceBytes);
      const done = await readJournal(partPath, journalPath, header, remote.bytes, count);
      const part = await fs.promises.open(partPath, fs.constants.O_RDWR | fs.constants.O_CREAT);
      await part.truncate(remote.bytes);
      // Written anew: the last line of a killed process may be cut off.
      const journal = await fs.promises.open(journalPath, 'w');
      await journal.write([header, ...done, ''].join('\n'));
      return new PartialFile(folder, remote, { part, journal }, pieceBytes, done);
    });
  }

  /** The pieces that are still to be fetched. */
  missing(): Piece[] {
    const count = Math.ceil(this.remote.bytes / this.#pieceBytes);
    return Array.from({ length: count }, (_, number) => ({
      file: this,
      number,
      start: number * this.#pieceBytes,
      end: Math.min((number + 1) * this.#pieceBytes, this.remote.bytes),
    })).filter(({ number }) => !this.#done.has(number));
  }

  /** @throws CaravanError `disk_full`. */
  async write(bytes: Uint8Array, position: number): Promise<void> {
    await onDisk(this.remote.name, async () => {
      for (let done = 0; done < bytes.length;) {
        const { bytesWritten } = await this.#part.write(bytes, done, null, position + done);
        done += bytesWritten;
      }
    });
  }

  /** All bytes of the piece have been written. */
  async complete({ number }: Piece): Promise<void> {
    this.#done.add(number);
    await onDisk(this.remote.name, () => this.#journal.write(`${number}\n`));
  }

  /**
   * Checks the whole and puts it in its place. What is wrong is thrown away.
   *
   * @throws CaravanError `checksum_mismatch`.
   */
  async finish(signal: AbortSignal): Promise<void> {
    const { name, checksum } = this.remote;
    const [partPath, journalPath] = pathsOf(this.#folder, name);
    await onDisk(name, () => this.#part.sync());
    await this.close();
    if (checksum !== null && !(await isFileSound(partPath, checksum, signal))) {
      await this.discard();
      throw new CaravanError(
        'checksum_mismatch',
        `${name}: what came is not what the source says it is (${spellChecksum(checksum) ?? ''}); it was thrown away`,
      );
    }
    await fs.promises.rename(partPath, path.join(this.#folder, name));
    await fs.promises.rm(journalPath, { force: true });
  }

  /** Throws away what was fetched. */
  async discard(): Promise<void> {
    await this.close();
    for (const file of pathsOf(this.#folder, this.remote.name)) {
      await fs.promises.rm(file, { force: true });
    }
  }

  async close(): Promise<void> {
    await this.#part.close();
    await this.#journal.close();
  }
}

const pathsOf = (folder: string, name: string): [part: string, journal: string] => {
  const base = path.join(partFolder(folder), name);
  return [`${base}.part`, `${base}.journal`];
};

/** Numbers of whole pieces; none where the journal is of another file, or there is none. */
async function readJournal(
  partPath: string,
  journalPath: string,
  header: string,
  byteCount: number,
  count: number,
): Promise<Set<number>> {
  const part = await fs.promises.stat(partPath).catch(() => null);
  const text = await fs.promises.readFile(journalPath, 'utf8').catch(() => '');
  const lines = text.split('\n');
  if (part?.size !== byteCount || lines[0] !== header) return new Set();
  // What follows the last line break is cut off, or empty.
  const numbers = lines.slice(1, -1).map(Number);
  return new Set(numbers.filter((n) => Number.isInteger(n) && n >= 0 && n < count));
}

/** @throws CaravanError `disk_full` in place of the operating system's words for it. */
export async function onDisk<T>(name: string, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (cause) {
    const { code = '', message } = cause as NodeJS.ErrnoException;
    if (code === 'ENOSPC' || code === 'EDQUOT') {
      const text = `${name}: the disk is full; what is there is kept, and the same command goes on`;
      throw new CaravanError('disk_full', text, { cause });
    }
    if (code === 'EACCES' || code === 'EROFS' || code === 'ENOTDIR' || code === 'EPERM') {
      throw new CaravanError('bad_usage', `${name}: cannot be written: ${message}`, { cause });
    }
    throw cause;
  }
}
