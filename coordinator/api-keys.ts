/**
 * Who holds which API key: the file that `--api-keys` names, a key on each line after the name of its tenant.
 *
 *   # of the shop, until it has rotated
 *   shop:sk-shop-5Jt0v2…
 *   shop:sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
 *
 * A key may stand there as it is, or as its SHA-256. The file is read again when it changes; one that is gone, wrong or
 * empty then leaves the keys in force that were.
 */
import { readFileSync, statSync } from 'node:fs';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { KeyRing, keyDigest } from './key-ring.js';
import { tenantName } from './tenant.js';

/** A million bytes are more than ten thousand keys. */
const MAX_BYTES = 1_000_000;
const MIN_KEY_CHARACTERS = 16;
const MAX_KEY_CHARACTERS = 512;
/** How soon a change counts. A Secret of Kubernetes is a link that is swapped: what it leads to is looked at. */
const LOOK_EVERY_MS = 1_000;

export interface ApiKeysLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

export class ApiKeys {
  readonly #path: string;
  #ring: KeyRing<string>;
  /** What the file was when it was read last: a change between that and the first look counts, too. */
  #seen: string;
  #timer: NodeJS.Timeout | undefined;

  private constructor(path: string, ring: KeyRing<string>, seen: string) {
    this.#path = path;
    this.#ring = ring;
    this.#seen = seen;
  }

  /** @throws CaravanError `bad_usage` naming the file, the line and its rule, and never the key. */
  static read(path: string): ApiKeys {
    const seen = stateOf(path);
    return new ApiKeys(path, readRing(path), seen);
  }

  /** How many keys there are. */
  get count(): number {
    return this.#ring.size;
  }

  /** The name of the tenant whose key it is. */
  tenantOf(key: string): string | undefined {
    return this.#ring.ownerOf(key);
  }

  /**
   * Reads the file again whenever it changes, until `close`.
   *
   * @param onRead is told after each reading, whatever came of it.
   */
  watch(log: ApiKeysLog, onRead: () => void = () => undefined, everyMs = LOOK_EVERY_MS): void {
    const look = (): void => {
      const state = stateOf(this.#path);
      if (state === this.#seen) return;
      this.#seen = state;
      try {
        this.#ring = readRing(this.#path);
        log.info({ keys: this.#ring.size }, 'API keys read again');
      } catch (thrown) {
        log.warn({}, `${toCaravanError(thrown).message}; the API keys before stay in force`);
      }
      onRead();
    };
    this.#timer = setInterval(look, everyMs).unref();
  }

  close(): void {
    clearInterval(this.#timer);
  }
}

/** Tells one state of a file, and of what links lead to, from another. */
function stateOf(path: string): string {
  try {
    const { dev, ino, mtimeNs, size } = statSync(path, { bigint: true });
    return `${dev} ${ino} ${mtimeNs} ${size}`;
  } catch {
    // Whoever reads it says why.
    return 'none';
  }
}

function readRing(path: string): KeyRing<string> {
  const refuse = (reason: string, cause?: unknown): never => {
    throw new CaravanError('bad_usage', `--api-keys ${path}: ${reason}`, { cause });
  };
  let text: string;
  try {
    text = readFileSync(path, 'utf8');
  } catch (cause) {
    return refuse('cannot be read', cause);
  }
  if (text.length > MAX_BYTES) return refuse(`is over ${MAX_BYTES} bytes`);
  const ring = new KeyRing<string>();
  text.split('\n').forEach((raw, index) => {
    const line = raw.trim();
    if (line === '' || line.startsWith('#')) return;
    const at = `line ${index + 1}`;
    const split = line.indexOf(':');
    const [name, key] = [line.slice(0, split).trim(), line.slice(split + 1).trim()];
    // What stands there is not repeated: it may be a key.
    if (split === -1) refuse(`${at}: must be TENANT:KEY`);
    if (!tenantName.test(name)) {
      refuse(`${at}: the tenant must be 1 to 64 letters, digits and . _ -`);
    }
    const other = ring.add(digestOf(key, at, refuse), name);
    if (other !== undefined && other !== name) {
      refuse(`${at}: the key of ${name} belongs to ${other}, too`);
    }
  });
  return ring.size === 0 ? refuse('has no keys') : ring;
}

function digestOf(key: string, at: string, refuse: (reason: string) => never): Buffer {
  const hash = /^sha256:(.*)$/i.exec(key)?.[1];
  if (hash !== undefined) {
    if (!/^[0-9a-f]{64}$/i.test(hash)) refuse(`${at}: sha256: must be followed by 64 hex digits`);
    return Buffer.from(hash, 'hex');
  }
  const isFine = /^[\x21-\x7e]+$/.test(key);
  if (!isFine || key.length < MIN_KEY_CHARACTERS || key.length > MAX_KEY_CHARACTERS) {
    refuse(
      `${at}: the key must have ${MIN_KEY_CHARACTERS} to ${MAX_KEY_CHARACTERS} ASCII characters, and no spaces`,
    );
  }
  return keyDigest(key);
}
