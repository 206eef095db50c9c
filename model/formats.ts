/**
 * Every format in which a checkpoint may store numbers. A format stores a row as blocks of neighbouring
 * elements; a plain element is a block of one.
 */
import { elementFormats } from './elements.js';
import { blockFormats } from './gguf-blocks.js';

export interface StorageFormat {
  /** Neighbours in a row that are stored together. */
  readonly blockElements: number;
  readonly blockBytes: number;
  /**
   * Turns `blockCount` whole blocks into float32.
   *
   * @param source bytes; `byteOffset` is that of the first block, a multiple of 4 for plain elements.
   * @param target takes blockCount × blockElements numbers from index `index`.
   */
  widen(
    source: Buffer,
    byteOffset: number,
    blockCount: number,
    target: Float32Array,
    index: number,
  ): void;
}

const formats: ReadonlyMap<string, StorageFormat> = new Map(
  Object.entries<StorageFormat>({ ...elementFormats, ...blockFormats }),
);

/** The format of this name, or undefined when Caravan cannot read it. */
export const formatOf = (name: string): StorageFormat | undefined => formats.get(name);

export const formatNames = (): string[] => [...formats.keys()];
