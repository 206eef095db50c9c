/**
 * A checkpoint on disk: its configuration, where its tensors lie, and how slices of them are read.
 */
import fs from 'node:fs';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { CaravanError } from '../proto/errors.js';
import type { LlamaConfig } from './config.js';
import { isGguf, openGguf } from './gguf.js';
import { openHuggingFace } from './huggingface.js';
import { isHubModel, pulledModelPath } from './hub-folder.js';
import { isMeta, openMeta } from './meta.js';
import { listSlices, type RankSlices, type TensorSlice } from './plan.js';
import { partBytes, partsOf, type SlicePart, type TensorSource } from './stored-tensor.js';

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

/** The folder's name, or a GGUF file's without its ending and, of a split one, without the number of the part. */
export const checkpointName = (model: string): string =>
  path.basename(model).replace(/(?<=.)(-\d{5}-of-\d{5})?\.gguf$/i, '');

/**
 * Opens what `resolveModelPath` gave, by its layout. Reads headers only.
 *
 * @throws CaravanError `invalid_checkpoint` or `unsupported_model`, naming file, field and rule.
 */
export function openCheckpoint(model: string): Checkpoint {
  if (isGguf(model)) return openGguf(model);
  if (isMeta(model)) return openMeta(model);
  return openHuggingFace(model);
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
