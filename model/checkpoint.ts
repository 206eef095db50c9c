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
import { isHubModel, pulledModelPath } from './hub-folder.js';
import { listSlices, type RankSlices, type TensorSlice } from './plan.js';
import { readSafetensorsHeader } from './safetensors.js';
import {
  partBytes,
  partsOf,
  wholeTensor,
  type SlicePart,
  type TensorSource,
} from './stored-tensor.js';
import { TOKENIZER_FILES } from './tokenizer.js';

export interface Checkpoint {
  readonly path: string;
  readonly layout: 'huggingface' | 'meta' | 'gguf';
  readonly config: LlamaConfig;
  /** By the names of Hugging Face's layout (`slicesOf`). */
  readonly tensors: ReadonlyMap<string, TensorSource>;
  /** SHA-256 (hex) of the configuration and the headers: the same on every host. */
  readonly digest: string;
  /** Changes when a file was replaced on this host. */
  readonly localStamp: string;
  /** Bytes of headers and configuration: what opening it reads. */
  readonly headerBytes: number;
  /** Reads what `openTokenizer` takes: contents by name, of the files of TOKENIZER_FILES that are there. */
  readonly readTokenizerFiles: () => Map<string, Uint8Array>;
}

/** The folder of the embedded model, in the source tree and in a build of it. */
export function embeddedModelPath(): string {
  const here = path.dirname(fileURLToPath(import.meta.url));
  const candidates = [path.join(here, 'caravan-tiny'), path.join(here, '../../model/caravan-tiny')];
  return candidates.find((folder) => fs.existsSync(folder)) ?? candidates[0]!;
}

/** What `--model` names: nothing or `caravan-tiny` is the embedded model, `hf:…` one that was pulled, else a path. */
export function resolveModelPath(model: string | undefined): string {
  if (model === undefined || model === 'caravan-tiny') return embeddedModelPath();
  if (isHubModel(model)) return pulledModelPath(model, process.env);
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
  const tensors = new Map<string, TensorSource>();
  let headerBytes = Buffer.byteLength(configText);
  for (const file of safetensorsFiles(folder)) {
    const header = readSafetensorsHeader(file);
    headerBytes += 8 + header.bytes.length;
    hash.update(path.basename(file)).update(header.bytes);
    const stat = fs.statSync(file);
    stamps.push(`${file} ${stat.size} ${stat.mtimeMs}`);
    for (const [name, tensor] of header.tensors) tensors.set(name, wholeTensor(tensor));
  }
  return {
    path: folder,
    layout: 'huggingface',
    config,
    tensors,
    digest: hash.digest('hex'),
    localStamp: stamps.join('\n'),
    headerBytes,
    readTokenizerFiles: () => readFolderTokenizer(folder),
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

/** The tokenizer's files of a folder, by name; those that are there. */
export function readFolderTokenizer(folder: string): Map<string, Uint8Array> {
  const files = new Map<string, Uint8Array>();
  for (const name of TOKENIZER_FILES) {
    const file = path.join(folder, name);
    if (fs.existsSync(file)) files.set(name, fs.readFileSync(file));
  }
  return files;
}

/** Where a slice lies, after checking that the tensor is there and has the shape the model needs. */
export function locateSlice(
  checkpoint: Checkpoint,
  slice: TensorSlice,
): { readonly source: TensorSource; readonly parts: readonly SlicePart[] } {
  const source = checkpoint.tensors.get(slice.tensor);
  if (source === undefined) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${checkpoint.path}: ${slice.tensor}: the tensor is missing`,
    );
  }
  return { source, parts: partsOf(source, slice) };
}

/** Bytes that are read for a slice. */
export const sliceBytes = (checkpoint: Checkpoint, slice: TensorSlice): number =>
  locateSlice(checkpoint, slice).parts.reduce((sum, part) => sum + partBytes(part), 0);

/** Bytes that a rank reads of the checkpoint: headers and slices. Checks every tensor on the way. */
export function rankBytes(checkpoint: Checkpoint, slices: RankSlices): number {
  return listSlices(slices).reduce(
    (sum, slice) => sum + sliceBytes(checkpoint, slice),
    checkpoint.headerBytes,
  );
}
