/**
 * Where the bytes of uploaded files and of batch results lie: a folder, or a bucket of S3-compatible storage.
 * What is known of them beside their bytes is in Redis (store-files). Objects are written whole or not at all,
 * and never changed.
 */
import { CaravanError } from '../proto/errors.js';

/** Keys are ours: `files/ID` and `batches/ID/PART`, of letters, digits and . _ - */
export interface StoredObject {
  readonly key: string;
  /** Unix time in milliseconds of its last change. */
  readonly modifiedMs: number;
}

export interface FileStorage {
  /** Where it is, for messages; without credentials. */
  readonly place: string;
  /**
   * Writes an object from its pieces. One of this key that is there already is replaced at the end.
   *
   * @returns its bytes.
   * @throws CaravanError `disk_full`, `storage_unavailable`, or whatever the source or the signal throws:
   *   then nothing of it is kept.
   */
  write(key: string, source: AsyncIterable<Uint8Array>, signal?: AbortSignal): Promise<number>;
  /**
   * Bytes `start` to `end`, without `end`; fewer where the object ends.
   *
   * @throws CaravanError `not_found`, `storage_unavailable`.
   */
  read(key: string, start: number, end: number): Promise<Buffer>;
  /** Bytes of an object, or null where there is none. @throws CaravanError `storage_unavailable`. */
  size(key: string): Promise<number | null>;
  /** Removes an object; one that is not there is no error. @throws CaravanError `storage_unavailable`. */
  remove(key: string): Promise<void>;
  /** Objects below a prefix that ends in a slash, those that a dead process left half-written too. */
  list(prefix: string): AsyncIterable<StoredObject>;
}

/** Pieces in which objects are read, in bytes. */
const PIECE_BYTES = 1024 * 1024;

/** An object from its first byte to its last, one piece at a time. @throws as `read` does. */
export async function* pieces(storage: FileStorage, key: string): AsyncGenerator<Buffer> {
  for (let at = 0; ;) {
    const piece = await storage.read(key, at, at + PIECE_BYTES);
    if (piece.length > 0) yield piece;
    if (piece.length < PIECE_BYTES) return;
    at += piece.length;
  }
}

/** Removes everything below a prefix that ends in a slash. */
export async function removeBelow(storage: FileStorage, prefix: string): Promise<void> {
  for await (const { key } of storage.list(prefix)) await storage.remove(key);
}

/** What a call of the world came to, as one of our codes. */
export function storageError(place: string, cause: unknown): CaravanError {
  if (cause instanceof CaravanError) return cause;
  const { code, message } = cause as NodeJS.ErrnoException;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    return new CaravanError('disk_full', `the files at ${place} have no room left`, { cause });
  }
  const reason = cause instanceof Error ? message.split('\n')[0]! : String(cause);
  return new CaravanError('storage_unavailable', `the files at ${place}: ${reason}`, { cause });
}
