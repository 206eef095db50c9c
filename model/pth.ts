/**
 * Reader of the .pth files that torch.save writes: a zip archive of a pickle, ARCHIVE/data.pkl, and of one entry a
 * storage, ARCHIVE/data/KEY. Tensors are views of storages: several may share one. Only the directory and the pickle
 * are read here. Source of the format: torch/serialization.py and torch/_utils.py.
 */
import fs from 'node:fs';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { isKind, readPickle, type PickleRules, type PickleValue } from './pickle.js';
import { quoted } from './quoted.js';
import { openForReading } from './safetensors.js';
import type { StoredTensor } from './stored-tensor.js';
import { ZipArchive } from './zip.js';

const MAX_PICKLE_BYTES = 16 << 20;
const MAX_DIMENSIONS = 8;
const MAX_NAME_LENGTH = 200;

/** Types of storages by the class that a pickle names; formats beside F32, F16 and BF16 are named, not read. */
const storageTypes: ReadonlyMap<string, { readonly format: string; readonly bytes: number }> =
  new Map([
    ['torch.BFloat16Storage', { format: 'BF16', bytes: 2 }],
    ['torch.HalfStorage', { format: 'F16', bytes: 2 }],
    ['torch.FloatStorage', { format: 'F32', bytes: 4 }],
    ['torch.DoubleStorage', { format: 'F64', bytes: 8 }],
    ['torch.LongStorage', { format: 'I64', bytes: 8 }],
    ['torch.IntStorage', { format: 'I32', bytes: 4 }],
    ['torch.ShortStorage', { format: 'I16', bytes: 2 }],
    ['torch.CharStorage', { format: 'I8', bytes: 1 }],
    ['torch.ByteStorage', { format: 'U8', bytes: 1 }],
    ['torch.BoolStorage', { format: 'BOOL', bytes: 1 }],
    ['torch.ComplexFloatStorage', { format: 'C64', bytes: 8 }],
    ['torch.storage._UntypedStorage', { format: 'U8', bytes: 1 }],
    ['torch.storage.UntypedStorage', { format: 'U8', bytes: 1 }],
  ]);

interface Storage {
  readonly kind: 'storage';
  readonly key: string;
  readonly format: string;
  readonly elementBytes: number;
  /** Elements that the pickle says it has; its entry has at least as many bytes. */
  readonly elementCount: number;
  readonly offset: number;
}

interface View {
  readonly kind: 'view';
  readonly storage: Storage;
  /** Of the first element. */
  readonly start: number;
  readonly shape: readonly number[];
  /** (dimensions) */
  readonly strides: readonly number[];
}

type Made = Storage | View;

export interface PthFile {
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  /** Directory and pickle as they stand in the file, for digests. */
  readonly header: readonly Buffer[];
  /** What reading it took. */
  readonly headerBytes: number;
}

/** @throws CaravanError `invalid_checkpoint` in one line, naming file, tensor, rule and value. */
export function readPthFile(file: string): PthFile {
  const descriptor = openForReading(file);
  try {
    return readPth(descriptor, file);
  } finally {
    fs.closeSync(descriptor);
  }
}

function readPth(descriptor: number, file: string): PthFile {
  const name = path.basename(file);
  refuseOldFormat(descriptor, name);
  const archive = new ZipArchive(descriptor, name);
  const pickles = [...archive.names].filter((entry) => /^[^/]+\/data\.pkl$/.test(entry));
  const pickleName = pickles[0];
  if (pickleName === undefined || pickles.length > 1) {
    throw damaged(name, `has ${pickles.length} entries NAME/data.pkl, and must have one`);
  }
  const folder = pickleName.slice(0, pickleName.indexOf('/'));
  const order = `${folder}/byteorder`;
  if (archive.locate(order) !== undefined && archive.read(order, 16).toString() !== 'little') {
    throw damaged(name, `${quoted(order)}: little-endian files are read`);
  }
  const pickle = archive.read(pickleName, MAX_PICKLE_BYTES);
  const root = readPickle(pickle, rulesOf(`${name}: data.pkl`, archive, folder));
  if (!isKind(root, 'dictionary')) {
    throw damaged(name, 'data.pkl: the pickle holds no dictionary of tensors');
  }
  const tensors = new Map<string, StoredTensor>();
  for (const [key, value] of root.entries) {
    if (typeof key !== 'string' || key.length > MAX_NAME_LENGTH || !/^[\w.-]+$/.test(key)) {
      throw damaged(name, `data.pkl: ${quoted(String(key))} is no name of a tensor`);
    }
    if (!isKind(value, 'made') || value.made.kind !== 'view') {
      throw damaged(name, `${key}: is no tensor`);
    }
    tensors.set(key, storedTensor(file, key, value.made));
  }
  return { tensors, header: [archive.directory, pickle], headerBytes: archive.bytesRead };
}

function refuseOldFormat(descriptor: number, name: string): void {
  const start = Buffer.alloc(2);
  fs.readSync(descriptor, start, 0, 2, 0);
  // PROTO 2: a bare pickle, as torch.save wrote them up to version 1.5.
  if (start[0] === 0x80 && start[1]! <= 5) {
    throw damaged(
      name,
      'is in the format that torch.save had before PyTorch 1.6; save it again with a newer one',
    );
  }
}

function rulesOf(name: string, archive: ZipArchive, folder: string): PickleRules<Made> {
  const storages = new Map<string, Storage>();
  const globals: PickleRules<Made>['globals'] = new Map([
    ...[...storageTypes.keys()].map((type) => [type, null] as const),
    ['collections.OrderedDict', (args) => emptyDictionary(name, args)],
    ['torch._utils._rebuild_tensor_v2', (args) => ({ kind: 'made', made: viewOf(name, args) })],
    ['torch._utils._rebuild_parameter', (args) => parameterOf(name, args)],
  ] as [string, ((args: readonly PickleValue<Made>[]) => PickleValue<Made>) | null][]);
  const resolve = (id: PickleValue<Made>): PickleValue<Made> => ({
    kind: 'made',
    made: storageOf(name, id, archive, folder, storages),
  });
  return { name, globals, resolve };
}

function emptyDictionary(name: string, args: readonly PickleValue<Made>[]): PickleValue<Made> {
  if (args.length > 0) throw damaged(name, 'collections.OrderedDict is called with arguments');
  return { kind: 'dictionary', entries: new Map() };
}

/** A parameter (tensor, requires_grad, hooks) is its tensor. */
function parameterOf(name: string, args: readonly PickleValue<Made>[]): PickleValue<Made> {
  const [tensor] = args;
  if (isKind(tensor, 'made') && tensor.made.kind === 'view') return tensor;
  throw damaged(name, '_rebuild_parameter is called without a tensor');
}

/** A persistent id: ('storage', type, key, device, elements). */
function storageOf(
  name: string,
  id: PickleValue<Made>,
  archive: ZipArchive,
  folder: string,
  storages: Map<string, Storage>,
): Storage {
  const [tag, type, key, , count] = isKind(id, 'tuple') ? id.items : [];
  const known = isKind(type, 'global') ? storageTypes.get(type.name) : undefined;
  if (tag !== 'storage' || known === undefined || typeof key !== 'string') {
    throw damaged(name, 'a persistent id is not (storage, type, key, device, elements)');
  }
  const elementCount = natural(count);
  const shown = quoted(key);
  if (elementCount === null) throw damaged(name, `storage ${shown}: has no number of elements`);
  const same = storages.get(key);
  if (same !== undefined) {
    if (same.format === known.format && same.elementCount === elementCount) return same;
    throw damaged(name, `storage ${shown}: is described in two ways`);
  }
  const content = archive.locate(`${folder}/data/${key}`);
  if (content === undefined) throw damaged(name, `storage ${shown}: its entry is missing`);
  const needed = BigInt(elementCount) * BigInt(known.bytes);
  if (needed > BigInt(content.byteCount)) {
    throw damaged(
      name,
      `storage ${shown}: ${elementCount} elements of ${known.format} need ${needed} bytes, ` +
        `has ${content.byteCount}`,
    );
  }
  const storage: Storage = {
    kind: 'storage',
    key,
    format: known.format,
    elementBytes: known.bytes,
    elementCount,
    offset: content.offset,
  };
  storages.set(key, storage);
  return storage;
}

/** _rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks, metadata). */
function viewOf(name: string, args: readonly PickleValue<Made>[]): View {
  const [storage, offset, size, stride] = args;
  if (!isKind(storage, 'made') || storage.made.kind !== 'storage') {
    throw damaged(name, '_rebuild_tensor_v2 is called without a storage');
  }
  const shown = `a tensor of storage ${quoted(storage.made.key)}`;
  const start = natural(offset);
  const shape = naturals(size);
  const strides = naturals(stride);
  if (start === null || shape === null || strides === null) {
    throw damaged(name, `${shown}: offset, sizes and strides must be whole numbers from 0`);
  }
  if (shape.length > MAX_DIMENSIONS || shape.length !== strides.length) {
    throw damaged(
      name,
      `${shown}: has ${shape.length} sizes and ${strides.length} strides; at most ${MAX_DIMENSIONS} of each are read`,
    );
  }
  const isEmpty = shape.includes(0);
  const reach = shape.reduce((sum, n, i) => sum + BigInt(n - 1) * BigInt(strides[i]!), 0n);
  const end = isEmpty ? BigInt(start) : BigInt(start) + reach + 1n;
  if (end > BigInt(storage.made.elementCount)) {
    throw damaged(
      name,
      `${shown}: sizes [${shape.join(', ')}] with strides [${strides.join(', ')}] from ${start} ` +
        `end at element ${end}, after the storage's ${storage.made.elementCount}`,
    );
  }
  return { kind: 'view', storage: storage.made, start, shape, strides };
}

function storedTensor(file: string, key: string, view: View): StoredTensor {
  const { storage, start, shape } = view;
  const elements = shape.reduce((product, n) => product * n, 1);
  const plain = {
    file,
    format: storage.format,
    shape,
    offset: storage.offset + start * storage.elementBytes,
    byteCount: elements * storage.elementBytes,
  };
  const rowMajor = shape.map((_, i) => shape.slice(i + 1).reduce((a, b) => a * b, 1));
  // The stride of a dimension of one element leads nowhere.
  const strides = view.strides.map((stride, i) => (shape[i]! <= 1 ? rowMajor[i]! : stride));
  if (elements === 0 || strides.join() === rowMajor.join()) return plain;
  const [rowStride, columnStride] = strides;
  const isReadable = shape.length === 2 && (rowStride === 1 || columnStride === 1);
  if (!isReadable) {
    throw damaged(
      path.basename(file),
      `${key}: strides are [${strides.join(', ')}]; the elements of rows or of columns must be neighbours`,
    );
  }
  return { ...plain, strides: [rowStride!, columnStride!] };
}

function natural(value: PickleValue<Made> | undefined): number | null {
  return typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 ? value : null;
}

function naturals(value: PickleValue<Made> | undefined): number[] | null {
  if (!isKind(value, 'tuple')) return null;
  const numbers = value.items.map(natural);
  return numbers.includes(null) ? null : (numbers as number[]);
}

const damaged = (name: string, message: string): CaravanError =>
  new CaravanError('invalid_checkpoint', `${name}: ${message}`);
