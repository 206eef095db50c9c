/**
 * The runs of a step on a device, with all of their inputs and outputs in place: made once for a shape of steps, kept as
 * long as such steps come.
 */
import { elementType, elementTypeOf, type ElementType } from './ort.js';
import type { BoundRun, DeviceSession } from './ort-binding.js';
import type { Copy, DeviceTensor, OrtDevice } from './ort-device.js';

type SmallArray = BigInt64Array | Int32Array | Float32Array;

/**
 * An input that changes from step to step. Kernels of devices read lengths and sizes on the host, where nothing is to be
 * copied: attention's total length, Split's sizes, TopK's k.
 */
export interface SmallInput<T extends SmallArray = SmallArray> {
  readonly array: T;
  readonly tensor: { readonly pointer: bigint };
  /** To the device; null where it is read from `array` itself. */
  readonly copy: Copy | null;
}

/**
 * The runs of all steps of one shape. Partials have two buffers on the device: the embedding's and the
 * feed-forward networks' partials lie in the first, attention's in the second.
 */
export interface StepRuns {
  /** Rows of the embedding's table. */
  readonly tokens: SmallInput<BigInt64Array>;
  readonly positions: SmallInput<BigInt64Array>;
  /** By group. */
  readonly lastPositions: readonly SmallInput<Int32Array>[];
  readonly totalLengths: readonly SmallInput<Int32Array>[];
  readonly embed: BoundRun;
  /** By layer. */
  readonly attention: readonly BoundRun[];
  readonly ffn: readonly BoundRun[];
  /** By turn of the exchange, then by buffer: our partial to the host, and those of the peers to the device. */
  readonly partialOut: readonly (readonly Copy[])[];
  readonly partialsIn: readonly (readonly (readonly Copy[])[])[];
  release(): void;
}

/** The head's run for a number of rows, and what it leaves on the host. */
export interface HeadRuns {
  readonly sampledRows: SmallInput<BigInt64Array>;
  readonly inverseTemperatures: SmallInput<Float32Array>;
  readonly run: BoundRun;
  readonly topLogits: Float32Array; // (sampled, k)
  readonly topPlaces: BigInt64Array; // (sampled, k)
  readonly sums: Float32Array; // (sampled)
  readonly temperedSums: Float32Array; // (sampled)
  readonly results: readonly Copy[];
  /** One row of the logits: which, its run, and where it comes to. */
  readonly rowIndex: SmallInput<BigInt64Array>;
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

export interface Bound {
  readonly pointer: bigint;
}

/** What was made for one shape, to be released with it. */
export class Made {
  readonly #device: OrtDevice;
  readonly #releases: (() => void)[] = [];

  constructor(device: OrtDevice) {
    this.#device = device;
  }

  view(whole: DeviceTensor, shape: readonly number[]): DeviceTensor {
    return this.#tensor(this.#device.view(whole, shape));
  }

  /** A tensor's memory from its beginning, as numbers of 32 bits. */
  words(whole: DeviceTensor, count: number): DeviceTensor {
    return this.#tensor(this.#device.view(whole, [count], elementType.int32));
  }

  allocate(type: ElementType, shape: readonly number[]): DeviceTensor {
    return this.#tensor(this.#device.allocate(type, shape));
  }

  bind(session: DeviceSession, values: ReadonlyMap<string, Bound>): BoundRun {
    const run = session.bind(values);
    this.#releases.push(() => {
      run.release();
    });
    return run;
  }

  copy(copy: Copy): Copy {
    this.#releases.push(() => {
      copy.release();
    });
    return copy;
  }

  input<T extends SmallArray>(
    array: T,
    shape: readonly number[],
    place: 'host' | 'device',
  ): SmallInput<T> {
    if (place === 'host') {
      const tensor = this.#device.host(array, shape);
      this.#releases.push(() => {
        tensor.release();
      });
      return { array, tensor, copy: null };
    }
    const tensor = this.allocate(elementTypeOf(array), shape);
    return { array, tensor, copy: this.copy(this.#device.copyIn(array, tensor)) };
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
