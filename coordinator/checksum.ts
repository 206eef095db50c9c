/** What a downloaded file must be, as its source says: the digest of its content. */
import { createHash, type Hash } from 'node:crypto';
import fs from 'node:fs';

export interface Checksum {
  /** `git` is the SHA-1 that git names a file by: of a header with its length, and its content. */
  readonly kind: 'sha256' | 'git' | 'md5';
  readonly hex: string;
}

export const spellChecksum = (checksum: Checksum | null): string | null =>
  checksum === null ? null : `${checksum.kind}:${checksum.hex}`;

function startHash(kind: Checksum['kind'], byteCount: number): Hash {
  if (kind !== 'git') return createHash(kind);
  return createHash('sha1').update(`blob ${byteCount}\0`);
}

/** Reads a file from end to end. @throws what the signal aborts with. */
export async function isFileSound(
  file: string,
  checksum: Checksum,
  signal: AbortSignal,
): Promise<boolean> {
  const { size } = await fs.promises.stat(file);
  const hash = startHash(checksum.kind, size);
  for await (const chunk of fs.createReadStream(file, { highWaterMark: 1 << 20, signal })) {
    hash.update(chunk as Buffer);
  }
  return hash.digest('hex') === checksum.hex;
}
