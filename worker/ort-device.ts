/**
 * Sessions, tensors and copies on a device, through ONNX Runtime's IoBinding. What a tensor is made of never leaves the
 * device but by `copyIn` and `copyOut`, which count.
 *
 * The same code runs on host memory under another name, which is how it is tested where there is no GPU.
 */
import type { Graph } from './graph-builder.js';
import { GraphBuilder, int } from './graph-builder.js';
import { tensorBytes, type Copy, type DeviceTensor, type Traffic } from './device-tensor.js';
import {
  elementType,
  elementTypeOf,
  OUTSIDE_ARENA,
  Tensor,
  type ElementType,
  type Ort,
} from './ort.js';
import type { OrtApi } from './ort-api.js';
import type { TensorArray } from './ort.js';
import { DeviceSession, type BoundRun } from './ort-binding.js';
import { appendProvider, explain, type Provider } from './ort-provider.js';
import { quickProducts } from './quick-products.js';
import { Capturing } from './device-launch.js';
import type { CudaRuntime } from './ort-cuda.js';

export class OrtDevice {
  readonly provider: Provider;
  readonly traffic: Traffic = { toDevice: 0, toHost: 0, ms: 0 };
  readonly runOptions: bigint;
  /** Whether runs that come again are given to the device as one. */
  readonly capturing: Capturing;
  readonly #ort: Ort;
  readonly #memory: bigint;
  readonly #allocator: bigint;
  readonly #cuda: CudaRuntime | null;
  /** The memory of tensors that are no views. */
  readonly #owners = new WeakMap<DeviceTensor, bigint>();
  /** By source and target type: copies of any length, and conversions. */
  readonly #copiers = new Map<string, DeviceSession>();
  readonly #converters = new Map<string, DeviceSession>();

  /**
   * @param capturing not at all if it is left out.
   * @throws CaravanError `bad_usage` when the device is not there, saying how to mend it.
   */
  constructor(
    ort: Ort,
    provider: Provider,
    cuda: CudaRuntime | null = null,
    capturing = new Capturing(null, 'this device has no graphs'),
  ) {
    const { api } = ort;
    this.#ort = ort;
    this.provider = provider;
    this.#cuda = cuda;
    this.capturing = capturing;
    this.runOptions = api.create('CreateRunOptions');
    if (cuda !== null) {
      // All sessions share our stream: what is needed on the host is waited for there.
      const key = 'disable_synchronize_execution_providers';
      api.check(api.native.AddRunConfigEntry(this.runOptions, key, '1'));
    }
    try {
      const { name, id } = provider.memory;
      const isHost = provider.device.kind === 'cpu';
      this.#memory = isHost ? ort.hostMemory : api.create('CreateMemoryInfo', name, 0, id, 0);
      const { float32 } = elementType;
      const copier = this.#copier(float32, float32);
      this.#allocator = api.create('CreateAllocator', copier.pointer, this.#memory);
    } catch (cause) {
      throw explain(provider.device, cause);
    }
  }

  get api(): OrtApi {
    return this.#ort.api;
  }

  /** The arrays of weights that are in the graph may be written again after the call. */
  session(asked: Graph): DeviceSession {
    const { api } = this;
    const isHost = this.provider.device.kind === 'cpu';
    // In host memory the runtime may go on reading weights where they are.
    const graph = isHost ? withOwnWeights(asked) : asked;
    const own = graph.weights.length === 0 ? {} : { ...quickProducts, [OUTSIDE_ARENA]: '1' };
    const options = api.create('CloneSessionOptions', this.#ort.options);
    try {
      // For each session anew: WebGPU counts its users by it, and ends with the first session otherwise.
      appendProvider(api, options, this.provider);
      for (const [key, value] of Object.entries(own)) {
        api.check(api.native.AddSessionConfigEntry(options, key, value));
      }
      const kept = isHost ? graph.weights : [];
      return new DeviceSession(this, this.#ort.load(graph, options), graph, kept);
    } finally {
      api.native.ReleaseSessionOptions(options);
    }
  }

  /** Memory on the device. @throws CaravanError `internal` in the runtime's words when there is none. */
  allocate(type: ElementType, shape: readonly number[]): DeviceTensor {
    // Copies go by words of 4 bytes.
    const words = Math.max(1, Math.ceil(tensorBytes(type, shape) / 4));
    const whole = this.api.create(
      'CreateTensorAsOrtValue',
      this.#allocator,
      BigInt64Array.of(BigInt(words)),
      1,
      elementType.int32,
    );
    const address = this.api.create('GetTensorMutableData', whole);
    const view = this.#tensorAt(address, type, shape);
    this.#owners.set(view, whole);
    return view;
  }

  /** As `allocate`; where memory is not cleared by the device itself, it is here: no kernel may meet NaNs in it. */
  allocateZeros(type: ElementType, shape: readonly number[]): DeviceTensor {
    const tensor = this.allocate(type, shape);
    this.#cuda?.clear(tensor.address, tensorBytes(type, shape));
    return tensor;
  }

  /** Another shape or type over a tensor's memory, from a byte on. */
  view(
    base: DeviceTensor,
    shape: readonly number[],
    type = base.type,
    byteOffset = 0,
  ): DeviceTensor {
    if (byteOffset > 0 && !this.provider.hasOffsets) throw new Error('handles have no offsets');
    return this.#tensorAt(base.address + BigInt(byteOffset), type, shape);
  }

  /** A tensor over memory of the device that is not ours to free. */
  over(address: bigint, type: ElementType, shape: readonly number[]): DeviceTensor {
    return this.#tensorAt(address, type, shape);
  }

  /** A tensor over our own array. */
  host(array: TensorArray, shape: readonly number[]): Tensor {
    return this.#ort.tensor(array, shape);
  }

  release(...tensors: readonly DeviceTensor[]): void {
    for (const tensor of tensors) {
      this.api.native.ReleaseValue(tensor.pointer);
      const owner = this.#owners.get(tensor);
      if (owner !== undefined) this.api.native.ReleaseValue(owner);
      this.#owners.delete(tensor);
    }
  }

  /** A new tensor with these contents, as `type`: float32 becomes float16 on the device. */
  upload(array: TensorArray, shape: readonly number[], type = elementTypeOf(array)): DeviceTensor {
    const target = this.allocate(type, shape);
    const copy = this.copyIn(padded(array), target);
    try {
      copy.run();
      this.synchronize();
    } finally {
      copy.release();
    }
    return target;
  }

  /** As `upload`, of a matrix (rows, columns): the tensor is (columns, rows). */
  uploadTransposed(
    array: Float32Array,
    [rows, columns]: readonly [rows: number, columns: number],
    type: ElementType,
  ): DeviceTensor {
    const { float32 } = elementType;
    const key = `${float32} ${type} transposed`;
    let session = this.#converters.get(key);
    if (session === undefined) {
      const graph = new GraphBuilder();
      graph.input('source', float32, ['rows', 'columns']);
      let last = 'source';
      if (type !== float32) {
        graph.node('Cast', ['source'], ['cast'], [int('to', type)]);
        last = 'cast';
      }
      graph.node('Transpose', [last], ['target']);
      graph.output('target', type, ['columns', 'rows']);
      session = this.session(graph.finish());
      this.#converters.set(key, session);
    }
    return this.#uploadThrough(session, array, [rows, columns], type, [columns, rows]);
  }

  /** As `upload`, of a matrix that lacks its last row: the tensor has zeros there. */
  uploadPadded(
    array: Float32Array,
    [rows, columns]: readonly [rows: number, columns: number],
    type: ElementType,
  ): DeviceTensor {
    const { float32 } = elementType;
    const graph = new GraphBuilder();
    graph.input('source', float32, [rows - 1, columns]);
    let last = 'source';
    if (type !== float32) {
      graph.node('Cast', ['source'], ['cast'], [int('to', type)]);
      last = 'cast';
    }
    graph.node('Pad', [last, graph.integers('pads', [0, 0, 1, 0])], ['target']);
    graph.output('target', type, [rows, columns]);
    // Once a shard: its memory is not to stay.
    const session = this.session(graph.finish());
    try {
      return this.#uploadThrough(session, array, [rows - 1, columns], type, [rows, columns]);
    } finally {
      session.release();
    }
  }

  /** Frees what conversions on the way to the device have taken of its memory: as much as the largest matrix, twice. */
  endUploads(): void {
    for (const [key, session] of this.#converters) {
      session.release();
      this.#converters.delete(key);
    }
  }

  #uploadThrough(
    session: DeviceSession,
    array: Float32Array,
    from: readonly number[],
    type: ElementType,
    to: readonly number[],
  ): DeviceTensor {
    const target = this.allocate(type, to);
    const source = this.host(array, from);
    const bound = session.bind(
      new Map<string, { readonly pointer: bigint }>([
        ['source', source],
        ['target', target],
      ]),
    );
    bound.run();
    bound.synchronize();
    this.synchronize();
    bound.release();
    source.release();
    this.traffic.toDevice += array.byteLength;
    return target;
  }

  /** Copies an array to a tensor, as often as it is run. The array must stay as it is until the device has it. */
  copyIn(array: TensorArray, target: DeviceTensor): Copy {
    const isConverted = elementTypeOf(array) !== target.type;
    const byteCount = array.byteLength;
    if (this.#cuda !== null && !isConverted) {
      return this.#timed(this.#cuda.copyIn(array, target.address), 'toDevice', byteCount);
    }
    const { session, host, device } = this.#ends(array, target, isConverted ? target.type : null);
    const values = new Map<string, { readonly pointer: bigint }>([
      ['source', host],
      ['target', device],
    ]);
    const bound = session.bind(values);
    const run = (): void => {
      bound.rebind('source', host);
      bound.run();
    };
    return this.#timed(
      { run, release: releaseAll(this, bound, host, device) },
      'toDevice',
      byteCount,
    );
  }

  /** Copies a tensor to an array, which is whole when `run` returns. */
  copyOut(source: DeviceTensor, array: TensorArray): Copy {
    const byteCount = array.byteLength;
    if (this.#cuda !== null) {
      return this.#timed(this.#cuda.copyOut(source.address, array), 'toHost', byteCount);
    }
    const { session, host, device } = this.#ends(array, source, null);
    const bound = session.bind(
      new Map<string, { readonly pointer: bigint }>([
        ['source', device],
        ['target', host],
      ]),
    );
    const run = (): void => {
      bound.run();
      bound.synchronize();
    };
    return this.#timed(
      { run, release: releaseAll(this, bound, host, device) },
      'toHost',
      byteCount,
    );
  }

  /** Copies a tensor's memory to one that is as large, once. */
  copyWithin(source: DeviceTensor, target: DeviceTensor): void {
    const { int32 } = elementType;
    const words = [tensorBytes(source.type, source.shape) / 4];
    const [from, to] = [this.view(source, words, int32), this.view(target, words, int32)];
    const bound = this.#copier(int32, int32).bind(
      new Map([
        ['source', from],
        ['target', to],
      ]),
    );
    try {
      bound.run();
    } finally {
      bound.release();
      this.release(from, to);
    }
  }

  /** Waits until the device has done everything. */
  synchronize(): void {
    this.#cuda?.synchronize();
  }

  #tensorAt(address: bigint, type: ElementType, shape: readonly number[]): DeviceTensor {
    const pointer = this.api.create(
      'CreateTensorWithDataAsOrtValue',
      this.#memory,
      address,
      tensorBytes(type, shape),
      BigInt64Array.from(shape, BigInt),
      shape.length,
      type,
    );
    return { pointer, address, type, shape };
  }

  /** Both ends of a copy as flat tensors: of 4-byte words, or of the array's own type when it is converted. */
  #ends(array: TensorArray, tensor: DeviceTensor, converted: ElementType | null) {
    const { int32 } = elementType;
    const words = new Int32Array(array.buffer, array.byteOffset, array.byteLength / 4);
    const host =
      converted === null ? this.host(words, [words.length]) : this.host(array, [array.length]);
    const shape = [converted === null ? words.length : array.length];
    const device = this.view(tensor, shape, converted ?? int32);
    const session = this.#copier(
      converted === null ? int32 : elementTypeOf(array),
      converted ?? int32,
    );
    return { session, host, device };
  }

  #copier(from: ElementType, to: ElementType): DeviceSession {
    const key = `${from} ${to}`;
    const known = from === to ? this.#copiers : this.#converters;
    let session = known.get(key);
    if (session === undefined) {
      const graph = new GraphBuilder();
      graph.input('source', from, ['count']);
      if (from === to) graph.node('Identity', ['source'], ['target']);
      else graph.node('Cast', ['source'], ['target'], [int('to', to)]);
      graph.output('target', to, ['count']);
      session = this.session(graph.finish());
      known.set(key, session);
    }
    return session;
  }

  #timed(copy: Copy, direction: 'toDevice' | 'toHost', byteCount: number): Copy {
    const { traffic } = this;
    return {
      run: () => {
        const startMs = performance.now();
        copy.run();
        traffic.ms += performance.now() - startMs;
        traffic[direction] += byteCount;
      },
      release: copy.release.bind(copy),
    };
  }
}

const withOwnWeights = (graph: Graph): Graph => ({
  ...graph,
  weights: graph.weights.map((weight) => ({ ...weight, array: weight.array.slice() })),
});

const releaseAll =
  (device: OrtDevice, bound: BoundRun, host: Tensor, tensor: DeviceTensor) => (): void => {
    bound.release();
    host.release();
    device.release(tensor);
  };

/** The array, or a copy that ends at a whole word. */
function padded(array: TensorArray): TensorArray {
  if (array.byteLength % 4 === 0 && array.byteOffset % 4 === 0) return array;
  const bytes = new Uint8Array(4 * Math.ceil(array.byteLength / 4));
  bytes.set(new Uint8Array(array.buffer, array.byteOffset, array.byteLength));
  return bytes;
}
