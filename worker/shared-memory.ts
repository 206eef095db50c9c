/**
 * Memory that the ranks of one host share: a file in /dev/shm, mapped by its owner and by every peer.
 *
 *   header (4096 bytes)   int32 [0] partials written so far; [1], [2] elements of the last, by turn;
 *                         [3] 1 + bytes of what the owner has declared, [4]… its text
 *   turn 0                float32 (capacity), from byte 4096
 *   turn 1                float32 (capacity), from the next multiple of 4096
 *
 * The owner writes a turn's elements and count, then the number of partials; peers wait for that number, by
 * futex(2) when it takes long. The owner holds a lock (flock) on the file as long as its name exists: a file
 * without one belonged to a process that was killed, and is removed by whoever comes next.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import koffi from 'koffi';
import { CaravanError } from '../proto/errors.js';

const FOLDER = '/dev/shm';
const NAME = /^caravan-[0-9a-f-]{1,64}-\d{1,4}$/;
const HEADER_BYTES = 4096;
const PAGE_BYTES = 4096;
const DECLARED_AT = 16;
const MOST_DECLARED_BYTES = 1024;

const PROT_READ_WRITE = 3;
const MAP_SHARED = 1;
const LOCK_EXCLUSIVE_AT_ONCE = 6;
/** Looks at a peer's sequence number between two looks at the clock. */
const LOOKS = 2048;
const FUTEX_WAIT = 0;
const FUTEX_WAKE = 1;
const EVERYBODY = 0x7fffffff;

type Native = (...args: unknown[]) => number;

interface LibC {
  readonly mmap: (...args: unknown[]) => bigint;
  readonly munmap: Native;
  readonly flock: Native;
  readonly fallocate: Native;
  readonly futex: Native;
  readonly futexNumber: number;
}

let loaded: LibC | null = null;

/** The functions are looked up once a process: a library handle is no state. */
function libC(): LibC {
  if (loaded !== null) return loaded;
  const library = koffi.load('libc.so.6');
  loaded = {
    mmap: library.func('void* mmap(void*, size_t, int, int, int, long)') as LibC['mmap'],
    munmap: library.func('int munmap(void*, size_t)') as Native,
    flock: library.func('int flock(int, int)') as Native,
    fallocate: library.func('int posix_fallocate(int, long, long)') as Native,
    futex: library.func('long syscall(long, void*, int, int, void*, void*, int)') as Native,
    futexNumber: process.arch === 'arm64' ? 98 : 202,
  };
  return loaded;
}

/**
 * Names what must be equal for two processes to share memory: the running kernel, the mount of /dev/shm, the
 * user. Null where memory cannot be shared.
 */
export function sharedMemoryHost(): string | null {
  if (process.platform !== 'linux' || !['x64', 'arm64'].includes(process.arch)) return null;
  try {
    const bootId = fs.readFileSync('/proc/sys/kernel/random/boot_id', 'utf8').trim();
    fs.accessSync(FOLDER, fs.constants.W_OK);
    return `${bootId}:${fs.statSync(FOLDER).dev}:${process.getuid?.() ?? 0}`;
  } catch {
    return null;
  }
}

/** Bytes of a segment whose turns have this many elements. */
function segmentBytes(capacity: number): number {
  return HEADER_BYTES + 2 * turnBytes(capacity);
}

const turnBytes = (capacity: number): number => Math.ceil((4 * capacity) / PAGE_BYTES) * PAGE_BYTES;

/** One rank's partials, as its owner or a peer sees them. */
export class SharedSegment {
  readonly name: string;
  /** By turn, (capacity). */
  readonly turns: readonly [Float32Array, Float32Array];
  readonly #header: Int32Array;
  readonly #address: bigint;
  readonly #byteCount: number;
  /** Of the owner, while the name exists. */
  #descriptor: number | null;
  // futex(2)'s timeout: seconds, nanoseconds.
  readonly #timeout = new BigInt64Array(2);

  private constructor(name: string, capacity: number, descriptor: number, isOwner: boolean) {
    this.name = name;
    this.#byteCount = segmentBytes(capacity);
    const address = libC().mmap(null, this.#byteCount, PROT_READ_WRITE, MAP_SHARED, descriptor, 0);
    if (address === BigInt.asUintN(64, -1n)) {
      throw new CaravanError('out_of_memory', `${FOLDER}/${name}: cannot be mapped`);
    }
    this.#address = address;
    this.#descriptor = isOwner ? descriptor : null;
    const memory = koffi.view(address, this.#byteCount);
    this.#header = new Int32Array(memory, 0, HEADER_BYTES / 4);
    this.turns = [
      new Float32Array(memory, HEADER_BYTES, capacity),
      new Float32Array(memory, HEADER_BYTES + turnBytes(capacity), capacity),
    ];
  }

  /**
   * Makes a segment, with all of its memory.
   *
   * @param group a name of hexadecimal digits and dashes.
   * @throws CaravanError `out_of_memory` when /dev/shm is too small, which is 64 MB in many containers.
   */
  static create(group: string, rank: number, capacity: number): SharedSegment {
    const name = `caravan-${group}-${rank}`;
    if (!NAME.test(name)) throw new CaravanError('internal', `${name} cannot name shared memory`);
    const file = path.join(FOLDER, name);
    const descriptor = fs.openSync(file, 'wx+', 0o600);
    try {
      libC().flock(descriptor, LOCK_EXCLUSIVE_AT_ONCE);
      const byteCount = segmentBytes(capacity);
      if (libC().fallocate(descriptor, 0, byteCount) !== 0) {
        throw new CaravanError(
          'out_of_memory',
          `${FOLDER} has no room for ${byteCount} bytes: make it larger, or use --transport grpc`,
        );
      }
      return new SharedSegment(name, capacity, descriptor, true);
    } catch (error) {
      fs.rmSync(file, { force: true });
      fs.closeSync(descriptor);
      throw error;
    }
  }

  /** Maps a peer's segment. @throws CaravanError `rank_failed` when it is not there, or of another size. */
  static open(name: string, capacity: number): SharedSegment {
    const refuse = (reason: string, cause?: unknown): never => {
      throw new CaravanError('rank_failed', `shared memory ${name}: ${reason}`, { cause });
    };
    if (!NAME.test(name)) return refuse('is no name of a segment');
    let descriptor: number;
    try {
      descriptor = fs.openSync(path.join(FOLDER, name), 'r+');
    } catch (cause) {
      return refuse('cannot be opened', cause);
    }
    try {
      const { size } = fs.fstatSync(descriptor);
      if (size !== segmentBytes(capacity)) return refuse(`has ${size} bytes`);
      return new SharedSegment(name, capacity, descriptor, false);
    } finally {
      fs.closeSync(descriptor);
    }
  }

  /** Removes the files of owners that were killed. */
  static removeOrphans(): void {
    if (sharedMemoryHost() === null) return;
    for (const name of fs.readdirSync(FOLDER)) {
      if (!NAME.test(name)) continue;
      const file = path.join(FOLDER, name);
      try {
        const descriptor = fs.openSync(file, 'r+');
        // Whoever is just making it has not locked it yet: such a file is still empty.
        const isWhole = fs.fstatSync(descriptor).size > 0;
        if (isWhole && libC().flock(descriptor, LOCK_EXCLUSIVE_AT_ONCE) === 0) {
          fs.rmSync(file, { force: true });
        }
        fs.closeSync(descriptor);
      } catch {
        // Somebody else's, or gone meanwhile.
      }
    }
  }

  /** Elements of the last partial of a turn. */
  count(turn: 0 | 1): number {
    return this.#header[1 + turn]!;
  }

  /** Where the number of partials lies, on a page of its own: for devices that write it or wait for it. */
  get numberPage(): { readonly address: bigint; readonly byteCount: number } {
    return { address: this.#address, byteCount: HEADER_BYTES };
  }

  /** Says beforehand how many elements a partial has that the owner's device will show. */
  announce(turn: 0 | 1, count: number): void {
    this.#header[1 + turn] = count;
  }

  /** Lets whoever waits for that many partials go on, though they never came: the group ends. */
  giveUp(sequence: number): void {
    Atomics.store(this.#header, 0, sequence | 0);
  }

  /** Shows the `sequence`-th partial (from 1, wrapping at 2^31), which the owner has written. */
  publish(sequence: number, turn: 0 | 1, count: number): void {
    this.announce(turn, count);
    Atomics.store(this.#header, 0, sequence | 0);
    libC().futex(libC().futexNumber, this.#address, FUTEX_WAKE, EVERYBODY, null, null, 0);
  }

  /** Tells the others one line, once: how it is with us before the first partial. */
  declare(text: string): void {
    const bytes = new TextEncoder().encode(text).subarray(0, MOST_DECLARED_BYTES);
    const { buffer, byteOffset } = this.#header;
    new Uint8Array(buffer, byteOffset + DECLARED_AT, bytes.length).set(bytes);
    Atomics.store(this.#header, 3, 1 + bytes.length);
  }

  /** What the owner has declared; null before. */
  declared(): string | null {
    const length = Atomics.load(this.#header, 3) - 1;
    if (length < 0) return null;
    const { buffer, byteOffset } = this.#header;
    const most = Math.min(length, MOST_DECLARED_BYTES);
    return new TextDecoder().decode(new Uint8Array(buffer, byteOffset + DECLARED_AT, most));
  }

  /** Whether that many partials have been shown. */
  has(sequence: number): boolean {
    return ((Atomics.load(this.#header, 0) - sequence) | 0) >= 0;
  }

  /**
   * Looks again and again, without sleeping, for at most about `spinUs`. The clock is asked seldom: each answer is a
   * number on the heap, and a wait of a millisecond would leave a hundred KB of them.
   */
  spin(sequence: number, spinUs: number): boolean {
    if (this.#isShownSoon(sequence)) return true;
    if (spinUs === 0) return false;
    const endMs = performance.now() + spinUs / 1000;
    do {
      if (this.#isShownSoon(sequence)) return true;
    } while (performance.now() < endMs);
    return false;
  }

  /** A few microseconds of looking. */
  #isShownSoon(sequence: number): boolean {
    for (let i = 0; i < LOOKS; i += 1) if (this.has(sequence)) return true;
    return false;
  }

  /** Sleeps until something is shown, or `timeoutMs` have passed. */
  sleep(sequence: number, timeoutMs: number): void {
    const seen = Atomics.load(this.#header, 0);
    if (((seen - sequence) | 0) >= 0) return;
    this.#timeout[1] = BigInt(Math.round(timeoutMs * 1e6));
    const { futex, futexNumber } = libC();
    futex(futexNumber, this.#address, FUTEX_WAIT, seen, this.#timeout, null, 0);
  }

  /** Takes the name away; the memory stays for those that have mapped it. */
  unlink(): void {
    if (this.#descriptor === null) return;
    fs.rmSync(path.join(FOLDER, this.name), { force: true });
    fs.closeSync(this.#descriptor);
    this.#descriptor = null;
  }

  /** Nothing may look at `turns` any more. */
  close(): void {
    this.unlink();
    libC().munmap(this.#address, this.#byteCount);
  }
}

/** Spinning only pays when every rank of the host has a core of its own. */
export const mayRanksSpin = (ranksOnHost: number): boolean =>
  ranksOnHost <= os.availableParallelism();
