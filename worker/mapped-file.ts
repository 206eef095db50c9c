/** A file seen as memory: its pages are read when they are looked at, and shared by all processes that map it. */
import koffi from 'koffi';
import { CaravanError } from '../proto/errors.js';
import { allocateBytes } from './memory.js';

const PROT_READ = 1;
const PROT_READ_WRITE = 3;
const MAP_PRIVATE = 2;
const MAP_ANONYMOUS = 0x20;
const MADV_WILLNEED = 3;
const MADV_DONTNEED = 4;
const PAGE_BYTES = 4096;

interface LibC {
  readonly mmap: (...args: unknown[]) => bigint;
  readonly munmap: (address: bigint, byteCount: number) => number;
  readonly madvise: (address: bigint, byteCount: number, advice: number) => number;
  readonly mincore: (address: bigint, byteCount: number, pages: Uint8Array) => number;
}

let loaded: LibC | null = null;

/** The functions are looked up once a process: a library handle is no state. */
function libC(): LibC {
  if (loaded !== null) return loaded;
  const library = koffi.load('libc.so.6');
  loaded = {
    mmap: library.func('void* mmap(void*, size_t, int, int, int, long)') as LibC['mmap'],
    munmap: library.func('int munmap(void*, size_t)') as LibC['munmap'],
    madvise: library.func('int madvise(void*, size_t, int)') as LibC['madvise'],
    mincore: library.func('int mincore(void*, size_t, void*)') as LibC['mincore'],
  };
  return loaded;
}

/** madvise(2). @returns whether the system took it. */
export const advise = (address: bigint, byteCount: number, advice: number): boolean =>
  libC().madvise(address, byteCount, advice) === 0;

/** By page whether it is in memory, in the lowest bit: mincore(2). All zeros when the memory is gone meanwhile. */
export function residentPages(address: bigint, byteCount: number): Uint8Array {
  const pages = new Uint8Array(Math.ceil(byteCount / PAGE_BYTES));
  if (libC().mincore(address, byteCount, pages) !== 0) pages.fill(0);
  return pages;
}

/** Whether files can be mapped here: the C library and its numbers are those of Linux with glibc. */
export const canMapFiles = (): boolean =>
  process.platform === 'linux' && ['x64', 'arm64'].includes(process.arch);

export class MappedFile {
  readonly byteCount: number;
  readonly #address: bigint;

  /**
   * Maps a whole file, for reading only; the descriptor may be closed after it. Writing to a view ends the process.
   *
   * @throws CaravanError `out_of_memory` when the address space has no room.
   */
  constructor(descriptor: number, byteCount: number) {
    this.byteCount = byteCount;
    this.#address = libC().mmap(null, byteCount, PROT_READ, MAP_PRIVATE, descriptor, 0);
    if (this.#address === BigInt.asUintN(64, -1n)) {
      throw new CaravanError('out_of_memory', `a file of ${byteCount} bytes cannot be mapped`);
    }
  }

  /** The bytes from `offset`, a multiple of 4096, asked of the disk at once. */
  view(offset: number, byteCount: number): ArrayBuffer {
    const address = this.#address + BigInt(offset);
    if (byteCount === 0) return new ArrayBuffer(0);
    libC().madvise(address, byteCount, MADV_WILLNEED);
    return koffi.view(address, byteCount);
  }

  /** Takes the pages of a view out of memory; they are read again if they are looked at again. */
  forget(offset: number, byteCount: number): void {
    const whole = Math.ceil(byteCount / PAGE_BYTES) * PAGE_BYTES;
    if (byteCount > 0) libC().madvise(this.#address + BigInt(offset), whole, MADV_DONTNEED);
  }

  /** Nothing may look at a view any more. */
  close(): void {
    libC().munmap(this.#address, this.byteCount);
  }
}

/** Zeroed memory that is given back by hand, where the system lets us map it; else it is the garbage collector's. */
export class ScratchMemory {
  readonly bytes: ArrayBuffer;
  readonly #address: bigint | null;

  /** @throws CaravanError `out_of_memory`. */
  constructor(byteCount: number) {
    if (!canMapFiles() || byteCount === 0) {
      this.bytes = allocateBytes(byteCount);
      this.#address = null;
      return;
    }
    const flags = MAP_PRIVATE | MAP_ANONYMOUS;
    const address = libC().mmap(null, byteCount, PROT_READ_WRITE, flags, -1, 0);
    if (address === BigInt.asUintN(64, -1n)) {
      throw new CaravanError('out_of_memory', `cannot reserve ${byteCount} bytes`);
    }
    this.#address = address;
    this.bytes = koffi.view(address, byteCount);
  }

  /** Nothing may look at `bytes` any more. */
  release(): void {
    if (this.#address !== null) libC().munmap(this.#address, this.bytes.byteLength);
  }
}
