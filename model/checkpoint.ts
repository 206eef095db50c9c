/**
 * A checkpoint on disk: its configuration, where its tensors lie, and how slices of them are read.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { parseHuggingFaceConfig, type LlamaConfig } from './config.js';
import { elementBytes, isElementFormat, widen, type ElementFormat } from './elements.js';
import { listSlices, type RankSlices, type TensorSlice } from './plan.js';
import { openForReading, readSafetensorsHeader } from './safetensors.js';

/** One tensor as it lies in a file, row by row. */
export interface StoredTensor {
  readonly file: string;
  readonly format: string;
  readonly shape: readonly number[];
  /** First byte in the file. */
  readonly offset: number;
  readonly byteCount: number;
}

export interface Checkpoint {
  readonly path: string;
  readonly layout: 'huggingface';
  readonly config: LlamaConfig;
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  /** SHA-256 (hex) of the configuration and the headers: the same on every host. */
  readonly digest: string;
  /** Changes when a file was replaced on this host. */
  readonly localStamp: string;
  /** Bytes of headers and configuration: what opening it reads. */
  readonly headerBytes: number;
}

/** The folder of the embedded model, in the source tree and in a build of it. */
export function embeddedModelPath(): string {
  const here = path.dirname(fileURLToPath(import.meta.url));
  const candidates = [path.join(here, 'caravan-tiny'), path.join(here, '../../model/caravan-tiny')];
  return candidates.find((folder) => fs.existsSync(folder)) ?? candidates[0]!;
}

/** What `--model` names: nothing or `caravan-tiny` is the embedded model, else a path. */
export function resolveModelPath(model: string | undefined): string {
  if (model === undefined || model === 'caravan-tiny') return embeddedModelPath();
  if (!fs.existsSync(model)) {
    throw new CaravanError('invalid_checkpoint', `--model ${model}: no such file or folder`);
  }
  return path.resolve(model);
}

const indexFile = z.object({ weight_map: z.record(z.string(), z.string()) });

/**
 * Opens a folder in Hugging Face layout: config.json beside model.safetensors, or beside
 * model.safetensors.index.json and the files that it names. Reads headers only.
 *
 * @throws CaravanError `invalid_checkpoint` or `unsupported_model`, naming file, field and rule.
 */
export function openCheckpoint(folder: string): Checkpoint {
  const configPath = path.join(folder, 'config.json');
  if (!fs.existsSync(configPath)) {
    throw new CaravanError(
      'unsupported_model',
      `${folder}: has no config.json; Caravan opens folders in Hugging Face layout`,
    );
  }
  const configText = fs.readFileSync(configPath, 'utf8');
  const config = parseHuggingFaceConfig(configText, 'config.json');
  const hash = createHash('sha256').update(configText);
  const stamps: string[] = [];
  const tensors = new Map<string, StoredTensor>();
  let headerBytes = Buffer.byteLength(configText);
  for (const file of safetensorsFiles(folder)) {
    const header = readSafetensorsHeader(file);
    headerBytes += 8 + header.bytes.length;
    hash.update(path.basename(file)).update(header.bytes);
    const stat = fs.statSync(file);
    stamps.push(`${file} ${stat.size} ${stat.mtimeMs}`);
    for (const [name, tensor] of header.tensors) tensors.set(name, tensor);
  }
  return {
    path: folder,
    layout: 'huggingface',
    config,
    tensors,
    digest: hash.digest('hex'),
    localStamp: stamps.join('\n'),
    headerBytes,
  };
}

function safetensorsFiles(folder: string): string[] {
  const single = path.join(folder, 'model.safetensors');
  const index = path.join(folder, 'model.safetensors.index.json');
  if (!fs.existsSync(index)) {
    if (fs.existsSync(single)) return [single];
    throw new CaravanError(
      'invalid_checkpoint',
      `${folder}: has neither model.safetensors nor model.safetensors.index.json`,
    );
  }
  let parsed;
  try {
    parsed = indexFile.parse(JSON.parse(fs.readFileSync(index, 'utf8')));
  } catch (cause) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${path.basename(index)}: weight_map is not a map of tensor to file`,
      { cause },
    );
  }
  const names = [...new Set(Object.values(parsed.weight_map))].sort();
  for (const name of names) {
    if (path.basename(name) !== name) {
      throw new CaravanError(
        'invalid_checkpoint',
        `${path.basename(index)}: ${name} lies outside the folder`,
      );
    }
  }
  return names.map((name) => path.join(folder, name));
}

/** Where a slice lies, after checking that the tensor is there and has the shape the model needs. */
export function locateSlice(
  checkpoint: Checkpoint,
  slice: TensorSlice,
): StoredTensor & { readonly format: ElementFormat } {
  const tensor = checkpoint.tensors.get(slice.tensor);
  const fail = (message: string): never => {
    const file = tensor === undefined ? checkpoint.path : path.basename(tensor.file);
    throw new CaravanError('invalid_checkpoint', `${file}: ${slice.tensor}: ${message}`);
  };
  if (tensor === undefined) return fail('the tensor is missing');
  const { format } = tensor;
  if (!isElementFormat(format)) {
    return fail(`dtype is ${format}; supported are ${Object.keys(elementBytes).join(', ')}`);
  }
  if (tensor.shape.join() !== slice.shape.join()) {
    fail(
      `shape is [${tensor.shape.join(', ')}]; the configuration needs [${slice.shape.join(', ')}]`,
    );
  }
  return { ...tensor, format };
}

/** Bytes that a slice takes in its file. */
export const sliceBytes = (checkpoint: Checkpoint, slice: TensorSlice): number =>
  slice.rows.count * slice.columns.count * elementBytes[locateSlice(checkpoint, slice).format];

/** Bytes that a rank reads of the checkpoint: headers and slices. Checks every tensor on the way. */
export function rankBytes(checkpoint: Checkpoint, slices: RankSlices): number {
  return listSlices(slices).reduce(
    (sum, slice) => sum + sliceBytes(checkpoint, slice),
    checkpoint.headerBytes,
  );
}

const SCRATCH_BYTES = 1 << 20;
const YIELD_AFTER_MS = 20;

/** Reads slices by byte range, and nothing else. Close it after use. */
export class SliceReader {
  readonly #checkpoint: Checkpoint;
  readonly #descriptors = new Map<string, number>();
  readonly #scratch = Buffer.from(new ArrayBuffer(SCRATCH_BYTES));
  #lastYieldMs = performance.now();
  /** Bytes of slices read so far. */
  bytesRead = 0;

  constructor(checkpoint: Checkpoint) {
    this.#checkpoint = checkpoint;
  }

  /**
   * Reads a slice as float32 into `target` from index `index`, row by row; yields to the event loop
   * every 20 ms.
   *
   * @throws CaravanError `invalid_checkpoint` when the file ends early.
   */
  async read(slice: TensorSlice, target: Float32Array, index: number): Promise<void> {
    const tensor = locateSlice(this.#checkpoint, slice);
    const width = elementBytes[tensor.format];
    const wholeColumns = slice.shape.at(-1)!;
    // Whole rows are neighbours in the file: one long run instead of one a row.
    const isWhole = slice.columns.count === wholeColumns;
    const runs = isWhole ? 1 : slice.rows.count;
    const runElements = isWhole ? slice.rows.count * wholeColumns : slice.columns.count;
    const perRead = Math.floor(SCRATCH_BYTES / width);
    // Rows of a column slice are collected in the scratch and widened together.
    let pending = 0;
    let written = index;
    const flush = (): void => {
      widen(tensor.format, this.#scratch, 0, pending, target, written);
      written += pending;
      pending = 0;
    };
    for (let run = 0; run < runs; run += 1) {
      const first = (slice.rows.start + run) * wholeColumns + slice.columns.start;
      for (let done = 0; done < runElements;) {
        if (pending === perRead) flush();
        const count = Math.min(runElements - done, perRead - pending);
        const offset = tensor.offset + (first + done) * width;
        this.#readExactly(tensor.file, pending * width, count * width, offset);
        pending += count;
        done += count;
        if (performance.now() - this.#lastYieldMs > YIELD_AFTER_MS) await this.#yield();
      }
    }
    flush();
  }

  close(): void {
    for (const descriptor of this.#descriptors.values()) fs.closeSync(descriptor);
    this.#descriptors.clear();
  }

  #readExactly(file: string, at: number, byteCount: number, offset: number): void {
    let descriptor = this.#descriptors.get(file);
    if (descriptor === undefined) {
      descriptor = openForReading(file);
      this.#descriptors.set(file, descriptor);
    }
    for (let done = 0; done < byteCount;) {
      const n = fs.readSync(descriptor, this.#scratch, at + done, byteCount - done, offset + done);
      if (n === 0) {
        throw new CaravanError(
          'invalid_checkpoint',
          `${path.basename(file)}: ends at byte ${offset + done}: truncated?`,
        );
      }
      done += n;
    }
    this.bytesRead += byteCount;
  }

  #yield(): Promise<void> {
    return new Promise((resolve) =>
      setImmediate(() => {
        this.#lastYieldMs = performance.now();
        resolve();
      }),
    );
  }
}
