/**
 * GGUF files as other programs write them (github.com/ggml-org/ggml/blob/master/docs/gguf.md), and as none should: each
 * number of the header can be overruled.
 */

/** ggml's numbers of formats. */
const FORMATS = { F32: 0, F16: 1, Q4_0: 2, Q8_0: 8, BF16: 30 } as const;

/** GGUF's numbers of the types of values. */
export const valueTypes = {
  ...{ uint8: 0, int8: 1, uint16: 2, int16: 3, uint32: 4, int32: 5, float32: 6, flag: 7 },
  ...{ text: 8, list: 9, uint64: 10, int64: 11, float64: 12 },
} as const;

/** A value as it stands in the file, behind the number of its type. */
export interface GgufValue {
  readonly type: number;
  readonly bytes: Uint8Array;
}

export interface GgufTensor {
  readonly name: string;
  /** [rows, columns], or [columns]; the file has them the other way around. */
  readonly shape: readonly (number | bigint)[];
  readonly format: keyof typeof FORMATS | number;
  readonly bytes: Uint8Array;
  /** From the start of the data; behind the tensor before, if left out. */
  readonly offset?: number | bigint;
}

export interface GgufContents {
  readonly version?: number;
  readonly metadata: readonly (readonly [key: string, value: GgufValue])[];
  readonly tensors: readonly GgufTensor[];
  /** Of the data, in bytes: 32 if left out. The metadata says so itself. */
  readonly alignment?: number;
  /** What the header says, where it is not the truth. */
  readonly tensorCount?: bigint;
  readonly entryCount?: bigint;
}

export function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

export function uint64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytes;
}

function float32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeFloatLE(value);
  return bytes;
}

/** A length and UTF-8. */
export const textBytes = (text: string | Uint8Array): Buffer => {
  const bytes = Buffer.from(text);
  return Buffer.concat([uint64(bytes.length), bytes]);
};

/** Values of the metadata. */
export const value = {
  uint32: (number: number): GgufValue => ({ type: valueTypes.uint32, bytes: uint32(number) }),
  uint64: (number: number | bigint): GgufValue => ({
    type: valueTypes.uint64,
    bytes: uint64(number),
  }),
  uint16: (number: number): GgufValue => ({
    type: valueTypes.uint16,
    bytes: uint32(number).subarray(0, 2),
  }),
  int32: (number: number): GgufValue => ({ type: valueTypes.int32, bytes: uint32(number >>> 0) }),
  float32: (number: number): GgufValue => ({ type: valueTypes.float32, bytes: float32(number) }),
  flag: (is: boolean): GgufValue => ({ type: valueTypes.flag, bytes: Uint8Array.of(is ? 1 : 0) }),
  text: (text: string): GgufValue => ({ type: valueTypes.text, bytes: textBytes(text) }),
  /** Values of one type. */
  list: (type: number, values: readonly GgufValue[]): GgufValue => ({
    type: valueTypes.list,
    bytes: Buffer.concat([
      uint32(type),
      uint64(values.length),
      ...values.map(({ bytes }) => bytes),
    ]),
  }),
};

const padding = (byteCount: number, alignment: number): Buffer =>
  Buffer.alloc(Math.ceil(byteCount / alignment) * alignment - byteCount);

export const ggufBytes = (contents: GgufContents): Buffer => Buffer.concat(ggufPieces(contents));

/** The file, piece by piece: header, then each tensor's bytes as they were given, and what aligns the next. */
export function ggufPieces(contents: GgufContents): Uint8Array[] {
  const { version = 3, metadata, tensors, alignment = 32 } = contents;
  const infos: Buffer[] = [];
  const data: Uint8Array[] = [];
  let end = 0;
  for (const { name, shape, format, bytes, offset } of tensors) {
    infos.push(
      textBytes(name),
      uint32(shape.length),
      ...[...shape].reverse().map(uint64),
      uint32(typeof format === 'number' ? format : FORMATS[format]),
      uint64(offset ?? end),
    );
    const gap = padding(bytes.length, alignment);
    data.push(bytes, gap);
    end += bytes.length + gap.length;
  }
  const header = Buffer.concat([
    Buffer.from('GGUF'),
    uint32(version),
    uint64(contents.tensorCount ?? tensors.length),
    uint64(contents.entryCount ?? metadata.length),
    ...metadata.flatMap(([key, { type, bytes }]) => [textBytes(key), uint32(type), bytes]),
    ...infos,
  ]);
  return [header, padding(header.length, alignment), ...data];
}
