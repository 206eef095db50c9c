/**
 * Memory of devices that the ranks of one host read in each other's: a rank's partials lie in a block of its own, which
 * every peer has opened, and the next segment's graph reads all of them where they are.
 *
 *   block   embedding's partial | attention's | feed-forward's     each (capacity) numbers of up to 32 bits, from a multiple of 256 bytes
 *
 * No two partials that follow each other lie in one buffer: a peer that has shown its next partial has read this one, not
 * the next, so what is overwritten is two partials old. The feed-forward network's last one is followed by the next step's
 * embedding, which therefore has a buffer of its own.
 */
import { CaravanError, toCaravanError } from '../proto/errors.js';

/** One block, ours or a peer's. */
export interface DirectBlock {
  /** The device's. */
  readonly address: bigint;
  /** How other processes open it. */
  readonly handle: string;
  /** Nothing may read it any more. */
  close(): void;
}

export interface DirectMemory {
  /** A block of ours, of zeros. One at a time: it may be the last one again. */
  share(byteCount: number): DirectBlock;
  /** A peer's. @throws CaravanError in the device's words when it cannot be read. */
  open(handle: string, byteCount: number): DirectBlock;
  write(address: bigint, bytes: Uint8Array): void;
  read(address: bigint, byteCount: number): Uint8Array;
}

/**
 * A device's stream that shows numbers to others, and waits for theirs, in memory of the host but without the host: it is
 * given a whole step at once.
 */
export interface StreamSignals {
  /** Lets the device reach host memory. @throws CaravanError in the device's words. */
  map(address: bigint, byteCount: number): MappedMemory;
  /** Once all that the stream was given before is done. */
  show(address: bigint, value: number): void;
  /** What comes after it waits until the number is at least that, as they wrap at 2^32. */
  await(address: bigint, value: number): void;
  /** Whether all that the stream was given is done. */
  isIdle(): boolean;
}

export interface MappedMemory {
  /** The device's. */
  readonly address: bigint;
  release(): void;
}

/** Whose partial it is: also the place of its buffer in a block. */
export const partialBuffer = { embedding: 0, attention: 1, ffn: 2 } as const;
export type PartialBuffer = (typeof partialBuffer)[keyof typeof partialBuffer];
export const PARTIAL_BUFFERS = 3;

const bufferBytes = (capacity: number): number => 256 * Math.ceil((4 * capacity) / 256);

/** What others are to find at a block's beginning: where memory can be opened it is not always read right. */
const markOf = (group: string, rank: number): Uint8Array =>
  new Uint8Array(Buffer.from(`${group}/${rank}`));

/** Our block, with its mark, until it is known whether all can read all. */
export class DirectOffer {
  readonly handle: string;
  readonly #memory: DirectMemory;
  readonly #group: string;
  readonly #rank: number;
  readonly #capacity: number;
  readonly #own: DirectBlock;
  readonly #opened = new Map<number, DirectBlock>();

  /** @throws CaravanError when the device has no such memory. */
  constructor(memory: DirectMemory, group: string, rank: number, capacity: number) {
    this.#memory = memory;
    this.#group = group;
    this.#rank = rank;
    this.#capacity = capacity;
    this.#own = memory.share(this.#byteCount);
    this.handle = this.#own.handle;
    memory.write(this.#own.address, markOf(group, rank));
  }

  get #byteCount(): number {
    return PARTIAL_BUFFERS * bufferBytes(this.#capacity);
  }

  /** Opens a peer's block and looks whether its mark is there. @returns what is wrong, or null. */
  open(peer: number, handle: string): string | null {
    const rank = this.#rank;
    try {
      const block = this.#memory.open(handle, this.#byteCount);
      this.#opened.set(peer, block);
      const mark = markOf(this.#group, peer);
      const found = this.#memory.read(block.address, mark.length);
      if (Buffer.compare(found, mark) === 0) return null;
      return `rank ${rank} reads something else than rank ${peer} has written`;
    } catch (error) {
      const { message } = toCaravanError(error);
      return `rank ${rank} cannot read rank ${peer}'s memory: ${message}`;
    }
  }

  /** All have opened all: (3 buffers, tp) addresses. */
  accept(): DirectPartials {
    // Our mark has been read by all.
    this.#memory.write(this.#own.address, new Uint8Array(markOf(this.#group, this.#rank).length));
    const blocks = new Map([...this.#opened, [this.#rank, this.#own] as const]);
    const addresses = Array.from({ length: PARTIAL_BUFFERS }, (_, buffer) =>
      Array.from({ length: blocks.size }, (_, rank) => {
        const block = blocks.get(rank);
        if (block === undefined) throw new CaravanError('internal', `rank ${rank} is not open`);
        return block.address + BigInt(buffer * bufferBytes(this.#capacity));
      }),
    );
    return {
      addresses,
      close: () => {
        this.close();
      },
    };
  }

  close(): void {
    for (const block of this.#opened.values()) block.close();
    this.#opened.clear();
    this.#own.close();
  }
}

/** Where the partials of all ranks lie on the device. */
export interface DirectPartials {
  /** (3 buffers, tp) the device's addresses. */
  readonly addresses: readonly (readonly bigint[])[];
  /** Nothing may read them any more. */
  close(): void;
}
