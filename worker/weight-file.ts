/**
 * A file of one rank's weights as its sessions take them, in the order in which they are loaded:
 *
 *   array 0      from byte 0
 *   array 1      from the next multiple of 4096
 *   …
 *   table        JSON, from the next multiple of 4096: what the file is of, and of every array name, bytes and SHA-256
 *   trailer      48 bytes: the magic, the table's bytes (uint64), the table's SHA-256
 *
 * It gets its name only when it is whole, so that whoever opens it finds all of it or nothing. Every array is checked
 * when it is taken. Damage is no error of the world: the checkpoint is read instead, and the file written anew.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';
import { z } from 'zod';
import { makeFolder } from '../model/folder.js';
import { unfinishedName } from '../model/weight-cache-folder.js';
import { CaravanError } from '../proto/errors.js';
import { MappedFile } from './mapped-file.js';

const MAGIC = 'CRVNWGT1';
const TRAILER_BYTES = 48;
const ALIGNMENT = 4096;
const MAX_TABLE_BYTES = 1 << 26;
/** Bytes that are checked or written before others have their turn. */
const STRETCH_BYTES = 1 << 24;

const table = z.object({
  /** Of checkpoint, plan, weights mode and format: see `WeightCache`. */
  digest: z.string(),
  rank: z.number(),
  arrays: z.array(z.tuple([z.string(), z.number().int().nonnegative(), z.string()])),
});
type Table = z.infer<typeof table>;

/** What a file must be of. */
export type WeightFileOwner = Pick<Table, 'digest' | 'rank'>;

/** The file is not what it should be; the message says what is wrong. */
export class DamagedWeights extends Error {}

const aligned = (offset: number): number => Math.ceil(offset / ALIGNMENT) * ALIGNMENT;

async function digestOf(bytes: Uint8Array): Promise<string> {
  const hash = createHash('sha256');
  for (let at = 0; at < bytes.length; at += STRETCH_BYTES) {
    hash.update(bytes.subarray(at, at + STRETCH_BYTES));
    await turn();
  }
  return hash.digest('hex');
}

/** Bytes of a file of arrays with these sizes, at most. */
export const weightFileBytes = (weightBytes: number, arrayCount: number): number =>
  weightBytes + arrayCount * (ALIGNMENT + 256) + TRAILER_BYTES;

export class WeightFileReader {
  readonly #mapped: MappedFile;
  readonly #arrays = new Map<string, { offset: number; byteCount: number; digest: string }>();
  /** Of views that were given out. */
  readonly #offsets = new Map<ArrayBuffer, number>();

  private constructor(mapped: MappedFile, arrays: Table['arrays']) {
    this.#mapped = mapped;
    let offset = 0;
    for (const [name, byteCount, digest] of arrays) {
      this.#arrays.set(name, { offset, byteCount, digest });
      offset = aligned(offset + byteCount);
    }
  }

  /**
   * @returns null where there is no such file.
   * @throws DamagedWeights, or the error of the file system.
   */
  static open(file: string, owner: WeightFileOwner): WeightFileReader | null {
    let descriptor: number;
    try {
      descriptor = fs.openSync(file, 'r');
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return null;
      throw error;
    }
    try {
      const stat = fs.fstatSync(descriptor);
      if (!stat.isFile()) throw new DamagedWeights('it is no file');
      const { arrays } = readTable(descriptor, stat.size, owner);
      return new WeightFileReader(new MappedFile(descriptor, stat.size), arrays);
    } finally {
      fs.closeSync(descriptor);
    }
  }

  get byteCount(): number {
    return this.#mapped.byteCount;
  }

  /**
   * An array, in the file's own memory. It must not be written to.
   *
   * @throws DamagedWeights when it is not there, has another size, or was changed.
   */
  take(name: string, byteCount: number): ArrayBuffer {
    const array = this.#arrays.get(name);
    if (array?.byteCount !== byteCount) {
      throw new DamagedWeights(`${name} has ${array?.byteCount ?? 'no'} bytes, not ${byteCount}`);
    }
    const view = this.#mapped.view(array.offset, byteCount);
    this.#offsets.set(view, array.offset);
    return view;
  }

  /** @throws DamagedWeights when a taken array was changed. */
  async check(name: string, view: ArrayBuffer): Promise<void> {
    if ((await digestOf(new Uint8Array(view))) !== this.#arrays.get(name)?.digest) {
      throw new DamagedWeights(`the checksum of ${name} is wrong`);
    }
  }

  /** Takes an array's pages out of memory, when the runtime has made a copy of its own. */
  forget(view: ArrayBuffer): void {
    const offset = this.#offsets.get(view);
    if (offset !== undefined) this.#mapped.forget(offset, view.byteLength);
  }

  /** No taken array may be looked at any more. */
  close(): void {
    this.#mapped.close();
  }
}

function readTable(descriptor: number, size: number, owner: WeightFileOwner): Table {
  if (size < TRAILER_BYTES) throw new DamagedWeights(`it has only ${size} bytes`);
  const trailer = readAt(descriptor, size - TRAILER_BYTES, TRAILER_BYTES);
  if (trailer.toString('latin1', 0, MAGIC.length) !== MAGIC) {
    throw new DamagedWeights('its last bytes are not those of such a file');
  }
  const tableBytes = Number(trailer.readBigUInt64LE(8));
  const tableStart = size - TRAILER_BYTES - tableBytes;
  if (tableBytes > MAX_TABLE_BYTES || tableStart < 0) {
    throw new DamagedWeights(`its table has ${tableBytes} bytes`);
  }
  const text = readAt(descriptor, tableStart, tableBytes);
  if (createHash('sha256').update(text).digest().compare(trailer, 16, 48) !== 0) {
    throw new DamagedWeights('the checksum of its table is wrong');
  }
  const parsed = table.safeParse(parseJson(text));
  if (!parsed.success) throw new DamagedWeights('its table is not as it should be');
  const { arrays, digest, rank } = parsed.data;
  if (digest !== owner.digest || rank !== owner.rank) {
    throw new DamagedWeights('it is of another checkpoint, or another rank');
  }
  let end = 0;
  for (const [name, byteCount] of arrays) {
    end = aligned(end + byteCount);
    if (!(end <= tableStart)) throw new DamagedWeights(`${name} ends behind the arrays`);
  }
  if (end !== tableStart) throw new DamagedWeights('there are bytes between arrays and table');
  return parsed.data;
}

function parseJson(text: Buffer): unknown {
  try {
    return JSON.parse(text.toString());
  } catch {
    return null;
  }
}

function readAt(descriptor: number, offset: number, byteCount: number): Buffer {
  const bytes = Buffer.alloc(byteCount);
  for (let done = 0; done < byteCount;) {
    const n = fs.readSync(descriptor, bytes, done, byteCount - done, offset + done);
    if (n === 0) throw new DamagedWeights('it ends too early');
    done += n;
  }
  return bytes;
}

/** Writes a file that nobody sees before it is whole. */
export class WeightFileWriter {
  readonly #file: string;
  readonly #unfinished: string;
  readonly #handle: fs.promises.FileHandle;
  readonly #arrays: Table['arrays'] = [];
  #end = 0;

  private constructor(file: string, unfinished: string, handle: fs.promises.FileHandle) {
    this.#file = file;
    this.#unfinished = unfinished;
    this.#handle = handle;
  }

  /** Makes the folder where it is missing. @throws the error of the file system. */
  static async create(file: string): Promise<WeightFileWriter> {
    makeFolder(path.dirname(file));
    const unfinished = unfinishedName(file);
    const handle = await fs.promises.open(unfinished, 'wx', 0o600);
    return new WeightFileWriter(file, unfinished, handle);
  }

  /** The array must not change before the promise resolves. @throws the error of the file system. */
  async append(name: string, array: ArrayBuffer): Promise<void> {
    const bytes = new Uint8Array(array);
    const start = this.#end;
    const hash = createHash('sha256');
    for (let at = 0; at < bytes.length; at += STRETCH_BYTES) {
      const stretch = bytes.subarray(at, at + STRETCH_BYTES);
      const written = this.#write(stretch, start + at);
      // Beside the write, which another thread does.
      hash.update(stretch);
      await written;
    }
    this.#arrays.push([name, bytes.length, hash.digest('hex')]);
    this.#end = aligned(start + bytes.length);
  }

  /** Writes the table and gives the file its name. @throws the error of the file system. */
  async finish(owner: WeightFileOwner): Promise<void> {
    const text = Buffer.from(JSON.stringify({ ...owner, arrays: this.#arrays } satisfies Table));
    const trailer = Buffer.alloc(TRAILER_BYTES);
    trailer.write(MAGIC, 'latin1');
    trailer.writeBigUInt64LE(BigInt(text.length), 8);
    createHash('sha256').update(text).digest().copy(trailer, 16);
    await this.#write(Buffer.concat([text, trailer]), this.#end);
    await this.#handle.close();
    await fs.promises.rename(this.#unfinished, this.#file);
  }

  /** Leaves nothing behind. */
  async abandon(): Promise<void> {
    await this.#handle.close().catch(() => undefined);
    await fs.promises.rm(this.#unfinished, { force: true }).catch(() => undefined);
  }

  async #write(bytes: Uint8Array, position: number): Promise<void> {
    for (let done = 0; done < bytes.length;) {
      const { bytesWritten } = await this.#handle.write(
        bytes,
        done,
        bytes.length - done,
        position + done,
      );
      if (bytesWritten === 0) throw new CaravanError('internal', 'a write wrote nothing');
      done += bytesWritten;
    }
  }
}
