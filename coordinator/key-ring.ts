/** API keys, held as digests: what is in memory, or in a core dump, cannot be shown to a gateway. */
import { createHash, createHmac, randomBytes } from 'node:crypto';

/** SHA-256 of a key. Keys are long and random, so that nothing slower is needed. */
export const keyDigest = (key: string): Buffer => createHash('sha256').update(key).digest();

export class KeyRing<T> {
  /** Keys are looked up under a secret of this process: how long that takes says nothing of the keys that there are. */
  readonly #secret = randomBytes(32);
  readonly #owners = new Map<string, T>();

  get size(): number {
    return this.#owners.size;
  }

  /** @returns the owner that the key had before, if it had one; then nothing changes. */
  add(digest: Buffer, owner: T): T | undefined {
    const name = this.#nameOf(digest);
    const other = this.#owners.get(name);
    if (other === undefined) this.#owners.set(name, owner);
    return other;
  }

  ownerOf(key: string): T | undefined {
    return this.#owners.get(this.#nameOf(keyDigest(key)));
  }

  #nameOf(digest: Buffer): string {
    return createHmac('sha256', this.#secret).update(digest).digest('base64');
  }
}

/** The key of `Authorization: Bearer KEY`, if there is one. */
export const bearerKey = (authorization: string | undefined): string | undefined =>
  /^Bearer +(\S+) *$/i.exec(authorization ?? '')?.[1];

/** The same header with the password of `Authorization: Basic …` for the key: browsers ask people for that. */
export function basicAsBearer(authorization: string | undefined): string | undefined {
  const encoded = /^Basic +(\S+) *$/i.exec(authorization ?? '')?.[1];
  if (encoded === undefined) return authorization;
  const pair = Buffer.from(encoded, 'base64').toString();
  return `Bearer ${pair.slice(pair.indexOf(':') + 1)}`;
}
