/**
 * Little-endian numbers and texts from the start of a file, read as they are needed; whatever lies past the file's end,
 * or past a limit, is refused before memory is taken for it.
 */
import fs from 'node:fs';
import { CaravanError } from '../proto/errors.js';

const FIRST_READ_BYTES = 1 << 16;

export class HeaderReader {
  readonly fileBytes: number;
  readonly #descriptor: number;
  readonly #name: string;
  #buffer = Buffer.alloc(0);
  /** Bytes of the buffer that hold the file's. */
  #filled = 0;
  #position = 0;
  #limit = Infinity;
  #part = 'the header';

  /** @param name of the file, for messages. */
  constructor(descriptor: number, name: string, fileBytes: number) {
    this.#descriptor = descriptor;
    this.#name = name;
    this.fileBytes = fileBytes;
  }

  /** Byte that is read next. */
  get position(): number {
    return this.#position;
  }

  /** Refuses headers of more bytes. */
  limit(byteCount: number): void {
    this.#limit = byteCount;
  }

  /** Names what is being read, for messages. */
  within(part: string): void {
    this.#part = part;
  }

  /** @throws CaravanError `invalid_checkpoint`, always. */
  fail(message: string): never {
    throw new CaravanError('invalid_checkpoint', `${this.#name}: ${message}`);
  }

  /** The bytes read so far: a copy. */
  taken(): Buffer {
    return Buffer.from(this.#buffer.subarray(0, this.#position));
  }

  /** A view that later reads may leave behind. */
  bytes(byteCount: number): Buffer {
    const end = this.#position + byteCount;
    if (end > this.fileBytes) {
      this.fail(
        `${this.#part}: needs ${byteCount} bytes at ${this.#position}, ` +
          `after the file's end at ${this.fileBytes}: truncated?`,
      );
    }
    if (end > this.#limit) {
      this.fail(`${this.#part}: the header goes on after ${this.#limit} bytes, the limit`);
    }
    if (end > this.#filled) this.#fill(end);
    const bytes = this.#buffer.subarray(this.#position, end);
    this.#position = end;
    return bytes;
  }

  uint32(): number {
    return this.bytes(4).readUInt32LE();
  }

  uint64(): bigint {
    return this.bytes(8).readBigUInt64LE();
  }

  /** A number of things, each of at least `leastBytes`, that the rest of the file can hold. */
  count(leastBytes: number, things: string): number {
    const count = this.uint64();
    const left = Math.min(this.fileBytes, this.#limit) - this.#position;
    if (count * BigInt(leastBytes) > BigInt(left)) {
      this.fail(`${things}: ${count} do not fit into the ${left} bytes that are left: truncated?`);
    }
    return Number(count);
  }

  /** A length and UTF-8. */
  text(mostBytes: number): string {
    const byteCount = this.count(1, `${this.#part}: bytes of a text`);
    if (byteCount > mostBytes) {
      this.fail(`${this.#part}: a text of ${byteCount} bytes; at most ${mostBytes} are read`);
    }
    return this.bytes(byteCount).toString('utf8');
  }

  #fill(end: number): void {
    const wanted = Math.max(end, 2 * this.#buffer.length, FIRST_READ_BYTES);
    const buffer = Buffer.alloc(Math.min(wanted, this.fileBytes));
    this.#buffer.copy(buffer, 0, 0, this.#filled);
    this.#buffer = buffer;
    while (this.#filled < buffer.length) {
      const room = buffer.length - this.#filled;
      const n = fs.readSync(this.#descriptor, buffer, this.#filled, room, this.#filled);
      if (n === 0) this.fail(`${this.#part}: ends at byte ${this.#filled}: truncated?`);
      this.#filled += n;
    }
  }
}
