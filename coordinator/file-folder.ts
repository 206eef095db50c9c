/** Files in a folder, which several gateways may share. */
import { randomBytes } from 'node:crypto';
import fs from 'node:fs/promises';
import path from 'node:path';
import { makeFolder } from '../model/folder.js';
import { CaravanError } from '../proto/errors.js';
import { storageError, type FileStorage, type StoredObject } from './file-storage.js';

/** An object that is being written has this at its name's end; a killed process leaves it behind. */
const PARTIAL = '.partial';

export class FileFolder implements FileStorage {
  readonly place: string;

  constructor(folder: string) {
    this.place = path.resolve(folder);
  }

  async write(
    key: string,
    source: AsyncIterable<Uint8Array>,
    signal?: AbortSignal,
  ): Promise<number> {
    const file = this.#pathOf(key);
    const partial = `${file}.${randomBytes(6).toString('hex')}${PARTIAL}`;
    const open = async (): Promise<fs.FileHandle> => {
      makeFolder(path.dirname(file));
      return fs.open(partial, 'wx');
    };
    const handle = await this.#call(open);
    try {
      let bytes = 0;
      for await (const piece of source) {
        signal?.throwIfAborted();
        await this.#call(() => writeWhole(handle, piece));
        bytes += piece.length;
      }
      signal?.throwIfAborted();
      await this.#call(async () => {
        // What is named is on the disk: a power cut leaves no empty file under a name that Redis knows.
        await handle.sync();
        await handle.close();
        await fs.rename(partial, file);
        await syncFolder(path.dirname(file));
      });
      return bytes;
    } catch (error) {
      await handle.close().catch(() => undefined);
      await fs.rm(partial, { force: true }).catch(() => undefined);
      throw error;
    }
  }

  async read(key: string, start: number, end: number): Promise<Buffer> {
    return this.#call(async () => {
      const handle = await fs.open(this.#pathOf(key), 'r');
      try {
        const buffer = Buffer.allocUnsafe(end - start);
        let filled = 0;
        while (filled < buffer.length) {
          const { bytesRead } = await handle.read(
            buffer,
            filled,
            buffer.length - filled,
            start + filled,
          );
          if (bytesRead === 0) break;
          filled += bytesRead;
        }
        return buffer.subarray(0, filled);
      } finally {
        await handle.close();
      }
    });
  }

  async size(key: string): Promise<number | null> {
    try {
      return (await fs.stat(this.#pathOf(key))).size;
    } catch (cause) {
      if (isMissing(cause)) return null;
      throw storageError(this.place, cause);
    }
  }

  async remove(key: string): Promise<void> {
    await this.#call(async () => {
      const file = this.#pathOf(key);
      await fs.rm(file, { force: true });
      // The folder of a batch goes with its last part; others stay, being full or top folders.
      if (key.split('/').length > 2) await fs.rmdir(path.dirname(file)).catch(() => undefined);
    });
  }

  async *list(prefix: string): AsyncGenerator<StoredObject> {
    for await (const entry of this.#entries(prefix)) {
      const key = `${prefix}${entry.name}`;
      if (entry.isDirectory()) {
        yield* this.list(`${key}/`);
        continue;
      }
      const stat = await fs.stat(path.join(this.place, key)).catch(() => null);
      // Gone since.
      if (stat !== null) yield { key, modifiedMs: stat.mtimeMs };
    }
  }

  /** One after another: a folder may hold more names than memory should. */
  async *#entries(prefix: string) {
    try {
      yield* await fs.opendir(path.join(this.place, prefix));
    } catch (cause) {
      if (isMissing(cause)) return;
      throw storageError(this.place, cause);
    }
  }

  #pathOf(key: string): string {
    return path.join(this.place, key);
  }

  async #call<T>(call: () => Promise<T>): Promise<T> {
    try {
      return await call();
    } catch (cause) {
      if (isMissing(cause)) {
        throw new CaravanError('not_found', `the file is not at ${this.place}`, { cause });
      }
      throw storageError(this.place, cause);
    }
  }
}

const isMissing = (cause: unknown): boolean => (cause as NodeJS.ErrnoException).code === 'ENOENT';

async function writeWhole(handle: fs.FileHandle, piece: Uint8Array): Promise<void> {
  for (let at = 0; at < piece.length;) {
    at += (await handle.write(piece, at, piece.length - at)).bytesWritten;
  }
}

async function syncFolder(folder: string): Promise<void> {
  const handle = await fs.open(folder, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}
