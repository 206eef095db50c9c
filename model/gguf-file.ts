/**
 * Reader of one GGUF file's header, versions 2 and 3, little-endian (github.com/ggml-org/ggml/blob/master/docs/gguf.md):
 *
 *     "GGUF"  version  tensorCount  entryCount  │ entries: key, type, value │ tensors: name, sizes, type, offset │ data
 *
 * Whatever it counts is held against the bytes that are left before anything is made of it.
 */
import fs from 'node:fs';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { formatNames, formatOf } from './formats.js';
import { GgufMetadata, type GgufValue } from './gguf-metadata.js';
import { HeaderReader } from './header-reader.js';
import { openForReading } from './safetensors.js';
import type { StoredTensor } from './stored-tensor.js';

export interface GgufFile {
  readonly file: string;
  readonly metadata: GgufMetadata;
  /** By the file's own names; [rows, columns], as everywhere in Caravan. */
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  /** Everything before the data, for digests. */
  readonly headerBytes: Buffer;
}

/** Real ones have 20 MB at most: they hold the vocabulary. */
const MAX_HEADER_BYTES = 128 << 20;
/** Texts, lists and entries of one file. The largest vocabularies and their merges have under a million. */
const MAX_VALUES = 1 << 20;
const MAX_KEY_BYTES = 65535;
const MAX_DIMENSIONS = 4;
const MAX_LIST_DEPTH = 4;
const MAX_ALIGNMENT = 1 << 20;
const DEFAULT_ALIGNMENT = 32;
/** The least that an entry, a tensor and a value in a list can take. */
const ENTRY_BYTES = 8 + 4 + 1;
const TENSOR_BYTES = 8 + 4 + 8 + 4 + 8;

/** ggml's numbers of formats, those that Caravan reads and those that it can only name. */
const formatNumbers: ReadonlyMap<number, string> = new Map(
  Object.entries({
    ...{ 0: 'F32', 1: 'F16', 2: 'Q4_0', 3: 'Q4_1', 6: 'Q5_0', 7: 'Q5_1', 8: 'Q8_0', 9: 'Q8_1' },
    ...{ 10: 'Q2_K', 11: 'Q3_K', 12: 'Q4_K', 13: 'Q5_K', 14: 'Q6_K', 15: 'Q8_K', 16: 'IQ2_XXS' },
    ...{ 17: 'IQ2_XS', 18: 'IQ3_XXS', 19: 'IQ1_S', 20: 'IQ4_NL', 21: 'IQ3_S', 22: 'IQ2_S' },
    ...{ 23: 'IQ4_XS', 24: 'I8', 25: 'I16', 26: 'I32', 27: 'I64', 28: 'F64', 29: 'IQ1_M' },
    ...{ 30: 'BF16', 34: 'TQ1_0', 35: 'TQ2_0', 39: 'MXFP4' },
  }).map(([number, name]) => [Number(number), name]),
);

/**
 * Reads and checks the header of one file.
 *
 * @throws CaravanError `invalid_checkpoint` naming the file, the entry or tensor, the rule and the value;
 *   `unsupported_model` for versions and formats that Caravan does not read.
 */
export function readGgufFile(file: string): GgufFile {
  const descriptor = openForReading(file);
  try {
    const name = path.basename(file);
    const fileBytes = fs.fstatSync(descriptor).size;
    return new HeaderParser(file, new HeaderReader(descriptor, name, fileBytes)).parse();
  } finally {
    fs.closeSync(descriptor);
  }
}

interface TensorEntry {
  readonly name: string;
  readonly format: string;
  readonly shape: readonly number[];
  /** From the start of the data. */
  readonly offset: number;
  readonly byteCount: number;
}

class HeaderParser {
  readonly #file: string;
  readonly #reader: HeaderReader;
  #valueCount = 0;

  constructor(file: string, reader: HeaderReader) {
    this.#file = file;
    this.#reader = reader;
    reader.limit(MAX_HEADER_BYTES);
  }

  parse(): GgufFile {
    const reader = this.#reader;
    reader.within('the first 24 bytes');
    if (reader.bytes(4).toString('latin1') !== 'GGUF')
      reader.fail('does not begin with "GGUF": models are folders, and files of this format');
    this.#checkVersion(reader.uint32());
    const tensorCount = reader.count(TENSOR_BYTES, 'tensors');
    const entryCount = reader.count(ENTRY_BYTES, 'entries of metadata');
    const metadata = new GgufMetadata(path.basename(this.#file), this.#entries(entryCount));
    const entries = this.#tensorEntries(tensorCount);
    const dataStart = this.#dataStart(metadata, entries.length > 0);
    const tensors = new Map<string, StoredTensor>();
    for (const { name, format, shape, offset, byteCount } of entries) {
      if (offset % this.#alignment(metadata) !== 0) {
        reader.fail(
          `${name}: offset ${offset} is not a multiple of the alignment ${this.#alignment(metadata)}`,
        );
      }
      const dataBytes = reader.fileBytes - dataStart;
      if (offset + byteCount > dataBytes) {
        reader.fail(
          `${name}: its ${byteCount} bytes from ${offset} lie outside the file's ${dataBytes} bytes of data: truncated?`,
        );
      }
      tensors.set(name, { file: this.#file, format, shape, offset: dataStart + offset, byteCount });
    }
    this.#refuseOverlaps(entries);
    return { file: this.#file, metadata, tensors, headerBytes: reader.taken() };
  }

  #checkVersion(version: number): void {
    if (version === 2 || version === 3) return;
    const swapped = [0x02000000, 0x03000000].includes(version);
    const what = swapped ? 'a big-endian file' : `version ${version}`;
    throw new CaravanError(
      'unsupported_model',
      `${path.basename(this.#file)}: is ${what}; Caravan reads GGUF 2 and 3, little-endian`,
    );
  }

  #entries(entryCount: number): Map<string, GgufValue> {
    const reader = this.#reader;
    const entries = new Map<string, GgufValue>();
    for (let i = 0; i < entryCount; i += 1) {
      reader.within(`entry ${i} of the metadata`);
      const key = reader.text(MAX_KEY_BYTES);
      reader.within(printable(key));
      if (key === '') reader.fail(`entry ${i} of the metadata has no key`);
      if (entries.has(key)) reader.fail(`${printable(key)}: is there twice`);
      entries.set(key, this.#value(printable(key), reader.uint32(), 0));
    }
    return entries;
  }

  #value(key: string, type: number, depth: number): GgufValue {
    const reader = this.#reader;
    if ((this.#valueCount += 1) > MAX_VALUES) reader.fail(`${key}: over ${MAX_VALUES} values`);
    switch (type) {
      case valueType.text:
        return reader.text(MAX_HEADER_BYTES);
      case valueType.flag: {
        const byte = reader.bytes(1)[0]!;
        if (byte > 1) reader.fail(`${key}: the truth value is ${byte}`);
        return byte === 1;
      }
      case valueType.list:
        return this.#list(key, depth + 1);
      default: {
        const numbers = this.#numbers(type, 1);
        if (numbers === undefined) return reader.fail(`${key}: has the unknown type ${type}`);
        return Number(numbers[0]);
      }
    }
  }

  #list(key: string, depth: number): GgufValue {
    const reader = this.#reader;
    if (depth > MAX_LIST_DEPTH) reader.fail(`${key}: lists within ${MAX_LIST_DEPTH} lists`);
    const type = reader.uint32();
    if (type === valueType.text || type === valueType.list) {
      const count = reader.count(type === valueType.text ? 8 : 12, `${key}: values`);
      if (this.#valueCount + count > MAX_VALUES) {
        reader.fail(`${key}: ${count} values; at most ${MAX_VALUES} in a file are read`);
      }
      const values: GgufValue[] = [];
      for (let i = 0; i < count; i += 1) values.push(this.#value(key, type, depth));
      return values;
    }
    const width = numberWidths.get(type);
    if (width === undefined) return reader.fail(`${key}: has values of the unknown type ${type}`);
    return this.#numbers(type, reader.count(width, `${key}: values`))!;
  }

  /** Undefined for types that are no numbers. */
  #numbers(type: number, count: number) {
    const width = numberWidths.get(type);
    if (width === undefined) return undefined;
    // A copy, so that it is aligned.
    const { buffer } = Uint8Array.from(this.#reader.bytes(width * count));
    switch (type) {
      case 1:
        return new Int8Array(buffer);
      case 2:
        return new Uint16Array(buffer);
      case 3:
        return new Int16Array(buffer);
      case 4:
        return new Uint32Array(buffer);
      case 5:
        return new Int32Array(buffer);
      case 6:
        return new Float32Array(buffer);
      case 10:
        return new BigUint64Array(buffer);
      case 11:
        return new BigInt64Array(buffer);
      case 12:
        return new Float64Array(buffer);
      default:
        return new Uint8Array(buffer);
    }
  }

  #tensorEntries(tensorCount: number): TensorEntry[] {
    const reader = this.#reader;
    const entries: TensorEntry[] = [];
    const names = new Set<string>();
    for (let i = 0; i < tensorCount; i += 1) {
      reader.within(`tensor ${i}`);
      const name = printable(reader.text(MAX_KEY_BYTES));
      reader.within(name);
      if (name === '') reader.fail(`tensor ${i} has no name`);
      if (names.has(name)) reader.fail(`${name}: is there twice`);
      names.add(name);
      const dimensions = reader.uint32();
      if (dimensions < 1 || dimensions > MAX_DIMENSIONS) {
        reader.fail(`${name}: has ${dimensions} dimensions; 1 to ${MAX_DIMENSIONS} are read`);
      }
      // The file names the neighbours' axis first; trailing axes of one are no axes.
      const sizes = Array.from({ length: dimensions }, () => reader.uint64());
      while (sizes.length > 1 && sizes.at(-1) === 1n) sizes.pop();
      const elements = sizes.reduce((product, size) => product * size, 1n);
      const shape = `[${[...sizes].reverse().join(', ')}]`;
      if (elements === 0n || elements > BigInt(Number.MAX_SAFE_INTEGER)) {
        reader.fail(`${name}: the shape ${shape} has ${elements} elements`);
      }
      const { format, byteCount } = this.#format(name, reader.uint32(), Number(sizes[0]), elements);
      const offset = Number(reader.uint64());
      entries.push({ name, format, shape: sizes.map(Number).reverse(), offset, byteCount });
    }
    return entries;
  }

  #format(name: string, number: number, columns: number, elements: bigint) {
    const format = formatNumbers.get(number);
    if (format === undefined) return this.#reader.fail(`${name}: has the unknown format ${number}`);
    const known = formatOf(format);
    if (known === undefined) {
      const read = formatNames().join(', ');
      throw new CaravanError(
        'unsupported_model',
        `${path.basename(this.#file)}: ${name}: is ${format}; Caravan reads ${read}`,
      );
    }
    const { blockElements, blockBytes } = known;
    if (columns % blockElements !== 0) {
      this.#reader.fail(
        `${name}: rows of ${columns} are not whole ${format} blocks of ${blockElements}`,
      );
    }
    const byteCount = Number((elements / BigInt(blockElements)) * BigInt(blockBytes));
    return { format, byteCount };
  }

  #alignment(metadata: GgufMetadata): number {
    return metadata.natural('general.alignment') ?? DEFAULT_ALIGNMENT;
  }

  #dataStart(metadata: GgufMetadata, hasTensors: boolean): number {
    const alignment = this.#alignment(metadata);
    if (alignment < 1 || alignment > MAX_ALIGNMENT || (alignment & (alignment - 1)) !== 0) {
      this.#reader.fail(`general.alignment: ${alignment} is not a power of two up to 2^20`);
    }
    const { position, fileBytes } = this.#reader;
    const start = Math.ceil(position / alignment) * alignment;
    if (hasTensors && start > fileBytes) this.#reader.fail('ends before its data: truncated?');
    return start;
  }

  #refuseOverlaps(entries: readonly TensorEntry[]): void {
    const sorted = [...entries].sort((a, b) => a.offset - b.offset);
    for (let i = 1; i < sorted.length; i += 1) {
      const before = sorted[i - 1]!;
      if (sorted[i]!.offset < before.offset + before.byteCount) {
        this.#reader.fail(`${sorted[i]!.name}: overlaps ${before.name}`);
      }
    }
  }
}

const valueType = { flag: 7, text: 8, list: 9 } as const;

/** Bytes of a number, by the number of its type; a list's truth values are bytes too. */
const numberWidths: ReadonlyMap<number, number> = new Map(
  [1, 1, 2, 2, 4, 4, 4, 1, null, null, 8, 8, 8].flatMap((width, type) =>
    width === null ? [] : [[type, width] as const],
  ),
);

/** A name of the file as a message may show it: one line, of bounded length. */
const printable = (name: string): string =>
  name.length > 100 || /[\p{Cc}\p{Zl}\p{Zp}]/u.test(name)
    ? JSON.stringify(name.slice(0, 100)).replace(/[\p{Cc}\p{Zl}\p{Zp}]/gu, '?')
    : name;
