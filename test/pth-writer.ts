/** .pth files as torch.save writes them: the pickle of a dictionary of tensors, in protocol 2, and their storages. */
import { writeZip, zipBytes, type ZipEntry } from './zip-writer.js';

export interface PthStorage {
  readonly key: string;
  readonly format: 'F32' | 'F16' | 'BF16';
  readonly elementCount: number;
  /** Absent for a hole of the right size. */
  readonly bytes?: Uint8Array;
}

export interface PthTensor {
  readonly name: string;
  readonly storage: PthStorage;
  readonly shape: readonly number[];
  /** Of the first element; 0 if left out. */
  readonly start?: number;
  /** Rows without gaps if left out. */
  readonly strides?: readonly number[];
}

const STORAGE_TYPES = { F32: 'FloatStorage', F16: 'HalfStorage', BF16: 'BFloat16Storage' } as const;

const op = {
  text(value: string): Buffer {
    const bytes = Buffer.from(value);
    const head = Buffer.from('X....', 'latin1');
    head.writeUInt32LE(bytes.length, 1);
    return Buffer.concat([head, bytes]);
  },
  global: (module: string, name: string): Buffer => Buffer.from(`c${module}\n${name}\n`),
  /** BININT1, BININT2, BININT or LONG1, whichever is the least that holds it. */
  integer(value: number): Buffer {
    if (value >= 0 && value < 256) return Buffer.from([0x4b, value]);
    if (value >= 0 && value < 65536) return Buffer.from([0x4d, value & 255, value >> 8]);
    if (Math.abs(value) < 2 ** 31) {
      const bytes = Buffer.from('J....', 'latin1');
      bytes.writeInt32LE(value, 1);
      return bytes;
    }
    const bytes = Buffer.alloc(10);
    bytes.set([0x8a, 8]);
    bytes.writeBigInt64LE(BigInt(value), 2);
    return bytes;
  },
  tuple: (...items: Buffer[]): Buffer =>
    Buffer.concat([Buffer.from('('), ...items, Buffer.from('t')]),
};

/** Opcodes by name, for pickles that torch.save would not write. */
export const pickleOps = op;

function tensorOps({ storage, shape, start = 0, strides }: PthTensor): Buffer {
  const rowMajor = shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1));
  const persistentId = op.tuple(
    op.text('storage'),
    op.global('torch', STORAGE_TYPES[storage.format]),
    op.text(storage.key),
    op.text('cpu'),
    op.integer(storage.elementCount),
  );
  return Buffer.concat([
    op.global('torch._utils', '_rebuild_tensor_v2'),
    op.tuple(
      Buffer.concat([persistentId, Buffer.from('Q')]),
      op.integer(start),
      op.tuple(...shape.map((n) => op.integer(n))),
      op.tuple(...(strides ?? rowMajor).map((n) => op.integer(n))),
      Buffer.from([0x89]),
      Buffer.concat([op.global('collections', 'OrderedDict'), Buffer.from(')R')]),
    ),
    Buffer.from('R'),
  ]);
}

/** With its memo: every name is remembered, as Python's pickler does it. */
export function pickleOf(tensors: readonly PthTensor[]): Buffer {
  const parts: Buffer[] = [Buffer.from([0x80, 2]), Buffer.from('}q\0(')];
  tensors.forEach((tensor, i) => {
    const put = Buffer.from('r....', 'latin1');
    put.writeUInt32LE(i + 1, 1);
    parts.push(op.text(tensor.name), put, tensorOps(tensor));
  });
  return Buffer.concat([...parts, Buffer.from('u.')]);
}

const bytesOf = { F32: 4, F16: 2, BF16: 2 } as const;

function entriesOf(folder: string, pickle: Buffer, storages: Iterable<PthStorage>): ZipEntry[] {
  return [
    { name: `${folder}/data.pkl`, content: pickle },
    ...[...storages].map(({ key, bytes, elementCount, format }) => ({
      name: `${folder}/data/${key}`,
      content: bytes ?? elementCount * bytesOf[format],
    })),
    { name: `${folder}/version`, content: Buffer.from('3\n') },
  ];
}

const storagesOf = (tensors: readonly PthTensor[]): Map<string, PthStorage> =>
  new Map(tensors.map(({ storage }) => [storage.key, storage]));

export function writePth(file: string, tensors: readonly PthTensor[]): void {
  writeZip(file, entriesOf('consolidated', pickleOf(tensors), storagesOf(tensors).values()));
}

/** A small file, of a pickle that may be another than its storages call for. */
export function pthBytes(tensors: readonly PthTensor[], pickle = pickleOf(tensors)): Buffer {
  return zipBytes(entriesOf('archive', pickle, storagesOf(tensors).values()));
}
