/**
 * Reader of zip archives whose entries are stored as they are, as torch.save writes them: it finds byte ranges and
 * never unpacks anything. Format: PKWARE's APPNOTE.TXT, with its zip64 extension.
 *
 *   local header 0, name, padding, content 0 │ … │ directory: one record an entry │ zip64 end, its locator │ end
 */
import fs from 'node:fs';
import { CaravanError } from '../proto/errors.js';
import { quoted } from './quoted.js';

const LOCAL_HEADER = 0x04034b50;
const DIRECTORY_RECORD = 0x02014b50;
const END = 0x06054b50;
const ZIP64_LOCATOR = 0x07064b50;
const ZIP64_END = 0x06064b50;
const END_BYTES = 22;
const LOCATOR_BYTES = 20;
const ZIP64_END_BYTES = 56;
const RECORD_BYTES = 46;
const LOCAL_HEADER_BYTES = 30;
const MAX_COMMENT_BYTES = 0xffff;
const MAX_DIRECTORY_BYTES = 32 << 20;
const MAX_ENTRIES = 200_000;
const MAX_NAME_BYTES = 512;

/** An entry's content in the file. */
export interface ZipContent {
  readonly offset: number;
  readonly byteCount: number;
}

interface Entry {
  readonly headerOffset: number;
  readonly byteCount: number;
  /** Where the next entry, or the directory, begins. */
  limit: number;
}

export class ZipArchive {
  readonly fileBytes: number;
  /** The directory as it stands in the file, CRCs of all entries among it: for digests. */
  readonly directory: Buffer;
  readonly #descriptor: number;
  readonly #name: string;
  readonly #entries: ReadonlyMap<string, Entry>;
  /** Bytes read so far. */
  bytesRead = 0;

  /**
   * @param name of the file, for messages.
   * @throws CaravanError `invalid_checkpoint`.
   */
  constructor(descriptor: number, name: string) {
    this.#descriptor = descriptor;
    this.#name = name;
    this.fileBytes = fs.fstatSync(descriptor).size;
    const { offset, byteCount, entryCount } = this.#findDirectory();
    this.directory = this.#read(offset, byteCount, 'the directory');
    this.#entries = this.#readDirectory(offset, entryCount);
  }

  get names(): Iterable<string> {
    return this.#entries.keys();
  }

  /** Where an entry's content lies, or undefined where there is none of this name. */
  locate(name: string): ZipContent | undefined {
    const entry = this.#entries.get(name);
    if (entry === undefined) return undefined;
    const { headerOffset, byteCount, limit } = entry;
    const shown = quoted(name);
    const nameBytes = Buffer.from(name);
    const header = this.#read(headerOffset, LOCAL_HEADER_BYTES + nameBytes.length, shown);
    if (header.readUInt32LE(0) !== LOCAL_HEADER) {
      this.#fail(`${shown}: no entry begins at byte ${headerOffset}`);
    }
    const isNamed =
      header.readUInt16LE(26) === nameBytes.length &&
      header.subarray(LOCAL_HEADER_BYTES).equals(nameBytes);
    if (!isNamed) this.#fail(`${shown}: the entry has another name than in the directory`);
    const offset = headerOffset + header.length + header.readUInt16LE(28);
    if (offset + byteCount > limit) {
      this.#fail(
        `${shown}: ${byteCount} bytes from ${offset} overlap what begins at byte ${limit}`,
      );
    }
    return { offset, byteCount };
  }

  /** An entry's content. @throws CaravanError `invalid_checkpoint` when it is not there or over the limit. */
  read(name: string, mostBytes: number): Buffer {
    const content = this.locate(name);
    const shown = quoted(name);
    if (content === undefined) return this.#fail(`${shown}: the entry is missing`);
    if (content.byteCount > mostBytes) {
      this.#fail(`${shown}: has ${content.byteCount} bytes; at most ${mostBytes} are read`);
    }
    return this.#read(content.offset, content.byteCount, shown);
  }

  #findDirectory(): { offset: number; byteCount: number; entryCount: number } {
    const tail = this.#findEnd();
    const end = tail.offset;
    let entryCount = tail.record.readUInt16LE(10);
    let byteCount = tail.record.readUInt32LE(12);
    let offset = tail.record.readUInt32LE(16);
    let disks = tail.record.readUInt16LE(4);
    let before = end;
    const locator =
      end >= LOCATOR_BYTES ? this.#read(end - LOCATOR_BYTES, LOCATOR_BYTES, 'the end') : null;
    if (locator?.readUInt32LE(0) === ZIP64_LOCATOR) {
      before = this.#number(locator, 8, 'the place of the zip64 end');
      const record = this.#read(before, ZIP64_END_BYTES, 'the zip64 end');
      if (record.readUInt32LE(0) !== ZIP64_END) {
        this.#fail(`no zip64 end stands at byte ${before}: truncated?`);
      }
      disks = record.readUInt32LE(16);
      entryCount = this.#number(record, 32, 'the number of entries');
      byteCount = this.#number(record, 40, 'the size of the directory');
      offset = this.#number(record, 48, 'the place of the directory');
    }
    if (disks !== 0) this.#fail('is one part of several; archives of one file are read');
    if (offset + byteCount > before) {
      this.#fail(
        `the directory of ${byteCount} bytes at ${offset} lies outside the file's first ${before} bytes`,
      );
    }
    if (byteCount > MAX_DIRECTORY_BYTES) {
      this.#fail(`the directory has ${byteCount} bytes; at most ${MAX_DIRECTORY_BYTES} are read`);
    }
    if (entryCount > MAX_ENTRIES || entryCount * RECORD_BYTES > byteCount) {
      this.#fail(
        `${entryCount} entries: more than the ${MAX_ENTRIES} that are read, or than fit into ` +
          `a directory of ${byteCount} bytes`,
      );
    }
    return { offset, byteCount, entryCount };
  }

  /** The end record: the last 22 bytes, unless a comment follows it. */
  #findEnd(): { readonly offset: number; readonly record: Buffer } {
    for (const most of [END_BYTES, END_BYTES + MAX_COMMENT_BYTES]) {
      const byteCount = Math.min(most, this.fileBytes);
      const start = this.fileBytes - byteCount;
      const tail = this.#read(start, byteCount, 'the end');
      for (let at = byteCount - END_BYTES; at >= 0; at -= 1) {
        const isEnd =
          tail.readUInt32LE(at) === END &&
          at + END_BYTES + tail.readUInt16LE(at + 20) === byteCount;
        if (isEnd) return { offset: start + at, record: tail.subarray(at, at + END_BYTES) };
      }
    }
    return this.#fail('has no end of a zip archive: truncated?');
  }

  #readDirectory(directoryOffset: number, entryCount: number): Map<string, Entry> {
    const { directory } = this;
    const entries = new Map<string, Entry>();
    let at = 0;
    for (let index = 0; index < entryCount; index += 1) {
      const left = directory.length - at;
      const isRecord = left >= RECORD_BYTES && directory.readUInt32LE(at) === DIRECTORY_RECORD;
      if (!isRecord) this.#fail(`entry ${index} of ${entryCount}: is not in the directory`);
      const [nameBytes, extraBytes, commentBytes] = [28, 30, 32].map((field) =>
        directory.readUInt16LE(at + field),
      ) as [number, number, number];
      const extraAt = at + RECORD_BYTES + nameBytes;
      const next = extraAt + extraBytes + commentBytes;
      if (next > directory.length) this.#fail(`entry ${index}: ends after the directory`);
      const name = this.#nameOf(directory.subarray(at + RECORD_BYTES, extraAt), index);
      if (entries.has(name)) this.#fail(`${quoted(name)}: stands twice in the directory`);
      const record = directory.subarray(at, at + RECORD_BYTES);
      const extra = directory.subarray(extraAt, extraAt + extraBytes);
      entries.set(name, this.#entryOf(name, record, extra));
      at = next;
    }
    let limit = directoryOffset;
    const sorted = [...entries].sort(([, a], [, b]) => b.headerOffset - a.headerOffset);
    for (const [name, entry] of sorted) {
      if (entry.headerOffset + LOCAL_HEADER_BYTES + entry.byteCount > limit) {
        this.#fail(
          `${quoted(name)}: ${entry.byteCount} bytes after byte ${entry.headerOffset} lie outside ` +
            `the file's entries or overlap what begins at byte ${limit}`,
        );
      }
      entry.limit = limit;
      limit = entry.headerOffset;
    }
    return entries;
  }

  #entryOf(name: string, record: Buffer, extra: Buffer): Entry {
    const shown = quoted(name);
    if ((record.readUInt16LE(8) & 1) !== 0) this.#fail(`${shown}: is encrypted`);
    const method = record.readUInt16LE(10);
    if (method !== 0) {
      this.#fail(
        `${shown}: is compressed (method ${method}); torch.save stores entries as they are`,
      );
    }
    // The fields that do not fit 32 bits follow each other in the zip64 extra field, in this order.
    let wide = this.#zip64Field(extra, shown);
    const [byteCount, storedBytes, headerOffset] = [24, 20, 42].map((field) => {
      const narrow = record.readUInt32LE(field);
      if (narrow !== 0xffffffff) return narrow;
      if (wide.length < 8) return this.#fail(`${shown}: lacks its zip64 sizes`);
      const value = this.#number(wide, 0, shown);
      wide = wide.subarray(8);
      return value;
    }) as [number, number, number];
    if (byteCount !== storedBytes) {
      this.#fail(`${shown}: has ${byteCount} bytes, but ${storedBytes} are stored`);
    }
    return { headerOffset, byteCount, limit: 0 };
  }

  #zip64Field(extra: Buffer, shown: string): Buffer {
    for (let at = 0; at + 4 <= extra.length;) {
      const end = at + 4 + extra.readUInt16LE(at + 2);
      if (end > extra.length) this.#fail(`${shown}: an extra field ends after its entry`);
      if (extra.readUInt16LE(at) === 1) return extra.subarray(at + 4, end);
      at = end;
    }
    return extra.subarray(0, 0);
  }

  #nameOf(bytes: Buffer, index: number): string {
    const name = bytes.toString('utf8');
    const isPlain =
      bytes.length > 0 &&
      bytes.length <= MAX_NAME_BYTES &&
      Buffer.from(name).equals(bytes) &&
      !/[\p{Cc}\\:]/u.test(name) &&
      !name.startsWith('/') &&
      !name.split('/').includes('..');
    if (!isPlain) this.#fail(`entry ${index}: ${quoted(name)} is no name for an entry`);
    return name;
  }

  /** A 64-bit number of bytes or things. */
  #number(from: Buffer, at: number, what: string): number {
    const value = from.readBigUInt64LE(at);
    if (value > BigInt(Number.MAX_SAFE_INTEGER)) this.#fail(`${what}: ${value} is too large`);
    return Number(value);
  }

  #read(offset: number, byteCount: number, what: string): Buffer {
    if (offset + byteCount > this.fileBytes) {
      this.#fail(
        `${what}: ${byteCount} bytes at ${offset} lie outside the file of ${this.fileBytes} bytes`,
      );
    }
    const bytes = Buffer.alloc(byteCount);
    for (let done = 0; done < byteCount;) {
      const n = fs.readSync(this.#descriptor, bytes, done, byteCount - done, offset + done);
      if (n === 0) this.#fail(`${what}: ends at byte ${offset + done}: truncated?`);
      done += n;
    }
    this.bytesRead += byteCount;
    return bytes;
  }

  #fail(message: string): never {
    throw new CaravanError('invalid_checkpoint', `${this.#name}: ${message}`);
  }
}
