/** Files: bytes in a storage and records in Redis, written and removed together. */
import { CaravanError } from '../proto/errors.js';
import type { FileStorage } from './file-storage.js';
import {
  fileKey,
  newFileId,
  type FilePurpose,
  type FileRecord,
  type FileRecords,
} from './store-files.js';

/** How long files are kept unless their owner says otherwise, as OpenAI keeps those of batches. */
export const DEFAULT_KEPT_S = 30 * 24 * 3600;
/** Bytes without a record are those of an upload that goes on, or of one whose gateway died. */
const ORPHAN_AFTER_MS = 24 * 3600 * 1000;
const SWEEP_STEP = 200;

export interface FileLimits {
  /** Most bytes of one uploaded file. */
  readonly fileBytes: number;
  /** Most bytes of all files together. */
  readonly storedBytes: number;
}

export class Files {
  readonly storage: FileStorage;
  readonly records: FileRecords;
  readonly #limits: FileLimits;

  constructor(storage: FileStorage, records: FileRecords, limits: FileLimits) {
    this.storage = storage;
    this.records = records;
    this.#limits = limits;
  }

  /**
   * Stores the bytes of an upload under a new id; nobody knows of it until `add`.
   *
   * @throws CaravanError `payload_too_large`, `disk_full`, `storage_unavailable`, or what the source throws.
   */
  async receive(
    source: AsyncIterable<Uint8Array>,
  ): Promise<{ readonly id: string; readonly bytes: number }> {
    const id = newFileId();
    const most = this.#limits.fileBytes;
    const bytes = await this.storage.write(fileKey(id), atMost(source, most));
    return { id, bytes };
  }

  /** Makes a stored upload known. @throws CaravanError `quota_exceeded`: the bytes are gone then. */
  async add(record: FileRecord): Promise<void> {
    try {
      await this.records.add(record, this.#limits.storedBytes);
    } catch (error) {
      await this.discard(record.id);
      throw error;
    }
  }

  /** Drops the bytes of an upload that came to nothing. */
  async discard(id: string): Promise<void> {
    await this.storage.remove(fileKey(id)).catch(() => undefined);
  }

  /**
   * Stores a file under an id of the caller's, for the same bytes each time: it can be repeated. Results are
   * not refused for a quota.
   */
  async put(
    id: string,
    source: AsyncIterable<Uint8Array>,
    { keptS, ...about }: { filename: string; purpose: FilePurpose; keptS: number; tenant?: string },
    signal: AbortSignal,
  ): Promise<void> {
    const bytes = await this.storage.write(fileKey(id), source, signal);
    const createdMs = Date.now();
    const expiresS = Math.floor(createdMs / 1000) + keptS;
    await this.records.add({ id, bytes, createdMs, expiresS, ...about });
  }

  /** @throws CaravanError `not_found`. */
  async remove(id: string): Promise<void> {
    if (!(await this.records.remove(id))) {
      throw new CaravanError('not_found', `file ${id} does not exist`);
    }
    await this.storage.remove(fileKey(id));
  }

  /** Removes what has expired. @param isUsed files that stay for now. */
  async removeExpired(isUsed: (id: string) => Promise<boolean>): Promise<void> {
    for (const id of await this.records.expired(Math.floor(Date.now() / 1000))) {
      if (await isUsed(id)) continue;
      await this.records.remove(id);
      await this.storage.remove(fileKey(id));
    }
  }

  /** Removes bytes that no record names, when they are old enough to belong to nobody. */
  async removeOrphans(): Promise<void> {
    let old: string[] = [];
    const removeUnknown = async (): Promise<void> => {
      const ids = old.map((key) => key.slice(fileKey('').length));
      const known = await this.records.known(ids);
      for (const id of ids) if (!known.has(id)) await this.storage.remove(fileKey(id));
      old = [];
    };
    for await (const { key, modifiedMs } of this.storage.list(fileKey(''))) {
      if (Date.now() - modifiedMs < ORPHAN_AFTER_MS) continue;
      old.push(key);
      if (old.length === SWEEP_STEP) await removeUnknown();
    }
    await removeUnknown();
  }
}

async function* atMost(
  source: AsyncIterable<Uint8Array>,
  mostBytes: number,
): AsyncGenerator<Uint8Array> {
  let bytes = 0;
  for await (const piece of source) {
    bytes += piece.length;
    if (bytes > mostBytes) {
      throw new CaravanError('payload_too_large', `file: is over ${mostBytes} bytes`, {
        param: 'file',
      });
    }
    yield piece;
  }
}
