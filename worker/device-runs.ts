/**
 * The runs of a step on a device, with all of their inputs and outputs in place: made once for a shape of steps, kept as
 * long as such steps come.
 */
import { Launch } from './device-launch.js';
import type { BoundPartials } from './device-partials.js';
import type { PartialBuffer } from './direct-memory.js';
import type { Graph } from './graph-builder.js';
import type { ElementType, TensorArray } from './ort.js';
import type { BoundRun, DeviceSession } from './ort-binding.js';
import type { Copy, DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';

/**
 * An input that changes from step to step and is read on the host, where kernels of devices want lengths and sizes:
 * attention's total length, Split's sizes, TopK's k.
 */
export interface HostInput<T extends TensorArray = TensorArray> {
  readonly array: T;
  readonly tensor: { readonly pointer: bigint };
}

/** What a rank computes between two exchanges, and where it leaves its partial. */
export interface Segment {
  readonly launch: Launch;
  readonly buffer: PartialBuffer;
}

/** The runs of all steps of one shape. */
export interface StepRuns {
  /** (rows) rows of the embedding's table. */
  readonly tokens: BigInt64Array;
  /** (rows) */
  readonly positions: BigInt64Array;
  /** By group, (batch). */
  readonly lastPositions: readonly Int32Array[];
  /** Brings these to the device. */
  readonly inputs: readonly Copy[];
  /** By group, (1): read on the host. */
  readonly totalLengths: readonly Int32Array[];
  readonly partials: BoundPartials;
  /** The embedding, and attention and feed-forward network of each layer. */
  readonly segments: readonly Segment[];
  /** Whether all of it is launched without anything to be made first, for this total length. */
  isCaptured(total: number): boolean;
  /** The embedding and the first layer. */
  readonly first: readonly BoundRun[];
  release(): void;
}

/** The head's run for a number of rows, and what it leaves on the host. */
export interface HeadRuns {
  readonly sampledRows: BigInt64Array; // (sampled)
  readonly inverseTemperatures: Float32Array; // (sampled)
  /** Brings these to the device. */
  readonly inputs: readonly Copy[];
  readonly run: BoundRun;
  readonly launch: Launch;
  readonly topLogits: Float32Array; // (sampled, k)
  readonly topPlaces: BigInt64Array; // (sampled, k)
  readonly sums: Float32Array; // (sampled)
  readonly temperedSums: Float32Array; // (sampled)
  readonly results: readonly Copy[];
  /** One row of the logits: which, its run, and where it comes to. */
  readonly rowIndex: BigInt64Array; // (1)
  readonly rowIn: readonly Copy[];
  readonly row: BoundRun;
  readonly rowLogits: Float32Array<ArrayBuffer>; // (vocab)
  readonly rowOut: Copy;
  release(): void;
}

/** Shapes whose runs are kept; the least recently used goes first. */
const KEPT_SHAPES = 24;

export class Kept<T extends { release(): void }> {
  readonly #kept = new Map<string, T>();

  get(key: string, make: () => T): T {
    const known = this.#kept.get(key);
    this.#kept.delete(key);
    if (known === undefined && this.#kept.size >= KEPT_SHAPES) {
      const [oldestKey, oldest] = this.#kept.entries().next().value!;
      this.#kept.delete(oldestKey);
      oldest.release();
    }
    const runs = known ?? make();
    this.#kept.set(key, runs);
    return runs;
  }

  release(): void {
    for (const runs of this.#kept.values()) runs.release();
    this.#kept.clear();
  }
}

/** Makes copies one after the other. */
export function runAll(copies: readonly Copy[]): void {
  for (const copy of copies) copy.run();
}

export interface Bound {
  readonly pointer: bigint;
}

/** What was made for one shape, or for a whole group, to be released with it. */
export class Made {
  readonly #device: OrtDevice;
  readonly #releases: (() => void)[] = [];

  constructor(device: OrtDevice) {
    this.#device = device;
  }

  view(
    whole: DeviceTensor,
    shape: readonly number[],
    type = whole.type,
    byteOffset = 0,
  ): DeviceTensor {
    return this.#tensor(this.#device.view(whole, shape, type, byteOffset));
  }

  allocate(type: ElementType, shape: readonly number[]): DeviceTensor {
    return this.#tensor(this.#device.allocate(type, shape));
  }

  allocateZeros(type: ElementType, shape: readonly number[]): DeviceTensor {
    return this.#tensor(this.#device.allocateZeros(type, shape));
  }

  over(address: bigint, type: ElementType, shape: readonly number[]): DeviceTensor {
    return this.#tensor(this.#device.over(address, type, shape));
  }

  session(graph: Graph): DeviceSession {
    const session = this.#device.session(graph);
    this.#releases.push(() => {
      session.release();
    });
    return session;
  }

  bind(session: DeviceSession, values: ReadonlyMap<string, Bound>): BoundRun {
    const run = session.bind(values);
    this.#releases.push(() => {
      run.release();
    });
    return run;
  }

  /** A tensor with these contents. */
  upload(array: TensorArray, shape: readonly number[], type?: ElementType): DeviceTensor {
    return this.#tensor(this.#device.upload(array, shape, type));
  }

  /** @param isRepeated whether such runs come again and again. */
  launch(runs: readonly BoundRun[], isRepeated: boolean): Launch {
    const launch = new Launch(runs, isRepeated ? this.#device.capturing : null);
    this.#releases.push(() => {
      launch.release();
    });
    return launch;
  }

  copy(copy: Copy): Copy {
    this.#releases.push(() => {
      copy.release();
    });
    return copy;
  }

  hostInput<T extends TensorArray>(array: T, shape: readonly number[]): HostInput<T> {
    const tensor = this.#device.host(array, shape);
    this.#releases.push(() => {
      tensor.release();
    });
    return { array, tensor };
  }

  release(): void {
    // Bindings before what they bind.
    for (const release of this.#releases.reverse()) release();
    this.#releases.length = 0;
  }

  #tensor(tensor: DeviceTensor): DeviceTensor {
    this.#releases.push(() => {
      this.#device.release(tensor);
    });
    return tensor;
  }
}
