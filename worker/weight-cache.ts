/**
 * Weights as a rank holds them, kept for its next start: written once beside a digest of all that they depend on, and
 * mapped from then on, without a look at the checkpoint's tensors.
 *
 * Whatever goes wrong with it costs only the cache. Float32 weights of a float32 checkpoint are not kept: the
 * checkpoint is that cache.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { checkpointName, locateSlice, type Checkpoint } from '../model/checkpoint.js';
import { makeFolder } from '../model/folder.js';
import { planRanks, listSlices, slicesOf, type RankPlan } from '../model/plan.js';
import {
  cacheFileName,
  defaultWeightCacheFolder,
  makeRoom,
  touchCached,
} from '../model/weight-cache-folder.js';
import {
  BLOCK_RULE,
  weightBytes,
  type WeightForm,
  type WeightForms,
  type WeightsMode,
} from '../model/weights.js';
import type { WeightCache as Terms } from '../proto/gen/cluster.js';
import { Embedding } from './embedding.js';
import { emptyLinear, type ArraySource } from './linear.js';
import { canMapFiles } from './mapped-file.js';
import type { Ort } from './ort.js';
import { Quantizer } from './quantizer.js';
import {
  DamagedWeights,
  weightFileBytes,
  WeightFileReader,
  WeightFileWriter,
  type WeightFileOwner,
} from './weight-file.js';

/** Raised when files of before would be misread, or hold what nobody computes any more. */
const FORMAT_VERSION = 3;
/** Of a file system that is nearly full nothing is taken: databases need it more. */
const LEAST_FREE_SHARE = 0.05;

/** No session gets less of a matrix that is cut. */
const SMALLEST_PART_BYTES = 1 << 26;

/** What a rank's weights depend on. */
export interface WeightsOrigin {
  readonly checkpoint: Checkpoint;
  readonly plan: RankPlan;
  readonly mode: WeightsMode;
  readonly forms: WeightForms;
}

export class WeightCache {
  /** Why this start leaves nothing for the next one; null when it does, or need not. */
  fault: string | null = null;
  readonly #folder: string;
  readonly #file: string;
  readonly #owner: WeightFileOwner;
  readonly #maxBytes: number;
  readonly #byteCount: number;

  private constructor(ort: Ort, origin: WeightsOrigin, terms: Terms) {
    const { checkpoint, plan, mode, forms } = origin;
    const { rank, tp } = plan;
    const digest = groupDigest(ort, origin);
    this.#folder = terms.folder === '' ? defaultWeightCacheFolder(process.env) : terms.folder;
    const name = { model: checkpointName(checkpoint.path), mode, rank, tp, digest };
    this.#file = path.join(this.#folder, cacheFileName(name));
    this.#owner = { digest, rank };
    this.#maxBytes = terms.maxBytes;
    const held = weightBytes(checkpoint.config, plan, forms);
    // A layer has two norms, its blocks, and four matrices of at most three arrays each; large ones come in parts.
    const parts = checkpoint.config.layerCount + held / SMALLEST_PART_BYTES;
    this.#byteCount = weightFileBytes(held, forms.variants.length * 15 * Math.ceil(parts));
  }

  /** @returns null where weights are not kept: by the terms, by the system, or because nothing would be gained. */
  static of(ort: Ort, origin: WeightsOrigin, terms: Terms | undefined): WeightCache | null {
    const isUseful = origin.mode !== 'fp32' || !isFloat32(origin);
    return terms !== undefined && canMapFiles() && isUseful
      ? new WeightCache(ort, origin, terms)
      : null;
  }

  /** The weights of an earlier start, or null; a damaged file is removed. */
  open(): WeightFileReader | null {
    try {
      const reader = WeightFileReader.open(this.#file, this.#owner);
      if (reader !== null) touchCached(this.#file);
      return reader;
    } catch (error) {
      if (error instanceof DamagedWeights) this.discard(error);
      else this.fault = `${this.#folder} cannot be read: ${messageOf(error)}`;
      return null;
    }
  }

  /** Removes a file that turned out to be damaged: it will be written anew. */
  discard({ message }: DamagedWeights): void {
    try {
      fs.rmSync(this.#file, { force: true, recursive: true });
    } catch (error) {
      this.fault = `${this.#file} is damaged (${message}) and cannot be removed: ${messageOf(error)}`;
    }
  }

  /** Where this start's weights go, or null where they are not kept, for what `fault` says. */
  async record(): Promise<WeightRecorder | null> {
    if (this.fault !== null) return null;
    const needed = `${gigabytes(this.#byteCount)} of weights`;
    try {
      makeFolder(this.#folder);
      if (!makeRoom(this.#folder, this.#byteCount, this.#maxBytes, this.#owner.digest)) {
        this.#refuseForRoom();
        return null;
      }
      const { bavail, blocks, bsize } = fs.statfsSync(this.#folder);
      if (bavail * bsize - this.#byteCount < LEAST_FREE_SHARE * blocks * bsize) {
        const free = gigabytes(bavail * bsize);
        this.fault = `${needed} would leave too little of the ${free} that are free in ${this.#folder}`;
        return null;
      }
      return new WeightRecorder(await WeightFileWriter.create(this.#file), this.#owner, (error) => {
        this.fault = `${this.#folder} cannot be written: ${messageOf(error)}`;
      });
    } catch (error) {
      this.fault = `${this.#folder} cannot be written: ${messageOf(error)}`;
      return null;
    }
  }

  /** Holds the folder to its size once more, when the file is there: others may have written meanwhile. */
  settle(): void {
    try {
      if (makeRoom(this.#folder, 0, this.#maxBytes, this.#owner.digest)) return;
      fs.rmSync(this.#file, { force: true });
      this.#refuseForRoom();
    } catch (error) {
      this.fault = `${this.#folder} cannot be written: ${messageOf(error)}`;
    }
  }

  #refuseForRoom(): void {
    const [needed, most] = [this.#byteCount, this.#maxBytes].map(gigabytes);
    this.fault = `${needed!} of weights do not fit into the ${most!} of --weight-cache-max`;
  }
}

/** Writes what is loaded; when that fails, the rest is not written, and nothing is left. */
export class WeightRecorder {
  readonly #owner: WeightFileOwner;
  readonly #onFault: (error: unknown) => void;
  #writer: WeightFileWriter | null;
  /** Writes go on while the runtime makes its copy of what is written. */
  #writing: Promise<void> = Promise.resolve();

  constructor(writer: WeightFileWriter, owner: WeightFileOwner, onFault: (error: unknown) => void) {
    this.#writer = writer;
    this.#owner = owner;
    this.#onFault = onFault;
  }

  /** The array must not change before `settled` resolves. */
  append(name: string, array: ArrayBuffer): void {
    this.#then((writer) => writer.append(name, array));
  }

  /** Resolves when no array is needed any more. */
  async settled(): Promise<void> {
    await this.#writing;
  }

  async finish(): Promise<void> {
    this.#then((writer) => writer.finish(this.#owner));
    await this.#writing;
    this.#writer = null;
  }

  /** For a load that failed. */
  async abandon(): Promise<void> {
    await this.#writing;
    await this.#writer?.abandon();
    this.#writer = null;
  }

  #then(write: (writer: WeightFileWriter) => Promise<void>): void {
    this.#writing = this.#writing.then(async () => {
      const writer = this.#writer;
      if (writer === null) return;
      try {
        await write(writer);
      } catch (error) {
        this.#onFault(error);
        this.#writer = null;
        await writer.abandon();
      }
    });
  }
}

/** Of everything that decides what a group's ranks hold, but for a rank's number. */
function groupDigest(ort: Ort, { checkpoint, plan, mode, forms }: WeightsOrigin): string {
  const { digest, localStamp, config } = checkpoint;
  const plans = planRanks(config, plan.tp, forms.ffnGrid);
  const rules = [FORMAT_VERSION, BLOCK_RULE, fingerprint(ort, forms)];
  const parts = [...rules, digest, localStamp, mode, forms, plans];
  return createHash('sha256').update(JSON.stringify(parts)).digest('hex').slice(0, 32);
}

/**
 * What our quantizers make of some numbers: weights that were quantized otherwise, or lie otherwise, are not taken for
 * what this release would make.
 */
function fingerprint(ort: Ort, forms: WeightForms): string {
  const hash = createHash('sha256').update(new Uint8Array(Uint32Array.of(1).buffer));
  const [outputs, inputs] = [5, 256];
  const rows = Float32Array.from({ length: outputs * inputs }, (_, i) => Math.sin(i * i));
  const arrays: ArraySource = { take: (byteCount) => new ArrayBuffer(byteCount) };
  const add = (
    build: (source: ArraySource) => { write: typeof Embedding.prototype.write },
  ): void => {
    const taken: ArrayBuffer[] = [];
    build(recording(arrays, taken)).write(rows, 0, outputs);
    for (const array of taken) hash.update(new Uint8Array(array));
  };
  const quantizer = new Quantizer(ort);
  const used = forms.variants
    .flatMap((v) => [v.qkv, v.o, v.gateUp, v.down])
    .flatMap((form): WeightForm[] => [form, ...coarserForms(form)]);
  for (const form of [...used, forms.head]) {
    add((source) => {
      const matrix = emptyLinear(form, outputs, inputs, source);
      return {
        write: (values, first, count) => {
          quantizer.write(matrix, values, first, count);
        },
      };
    });
  }
  quantizer.release();
  add((source) => new Embedding(forms.embedding, outputs, inputs, source));
  return hash.digest('hex');
}

/** A form in each of the larger blocks that it may come to. */
const coarserForms = (form: WeightForm): WeightForm[] =>
  form.kind === 'int4' ? (form.coarser ?? []).map((block) => ({ kind: 'int4', block })) : [];

/** Notes what is taken, in order. */
export const recording = (arrays: ArraySource, taken: ArrayBuffer[]): ArraySource => ({
  take: (byteCount) => {
    const array = arrays.take(byteCount);
    taken.push(array);
    return array;
  },
});

/** Whether the checkpoint holds all that a rank reads as float32 already. */
const isFloat32 = ({ checkpoint, plan }: WeightsOrigin): boolean =>
  listSlices(slicesOf(checkpoint.config, plan)).every((slice) =>
    locateSlice(checkpoint, slice).parts.every(({ piece }) => piece.format === 'F32'),
  );

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`;

/** Of the file system's errors what happened, not where: ranks have the same reason then. */
const messageOf = (error: unknown): string =>
  (error instanceof Error ? error.message : String(error)).replace(/, \w+( '.*')?$/s, '');
