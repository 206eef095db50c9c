/**
 * ONNX Runtime in host memory: the only door to it, together with `ort-api` below and `ort-device` for devices.
 *
 * The npm package's own `session.run` copies every output, which a KV cache of gigabytes cannot afford.
 * The library inside the package exports the C API.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import type { Graph } from './graph-builder.js';
import { libraryPath, NamePointers, OrtApi, type Native } from './ort-api.js';

/** ONNX's numbers for element types. */
export const elementType = {
  float32: 1,
  uint8: 2,
  int8: 3,
  int32: 6,
  int64: 7,
  float16: 10,
  bfloat16: 16,
  uint4: 21,
} as const;
export type ElementType = (typeof elementType)[keyof typeof elementType];

export type TensorArray = Float32Array | Int32Array | BigInt64Array | Uint8Array | Int8Array;

export const elementTypeOf = (array: TensorArray): ElementType => {
  if (array instanceof Float32Array) return elementType.float32;
  if (array instanceof Int32Array) return elementType.int32;
  if (array instanceof BigInt64Array) return elementType.int64;
  if (array instanceof Int8Array) return elementType.int8;
  return elementType.uint8;
};

/** The library's telemetry part leaves an empty file a process behind, telemetry off or not. */
function removeTelemetryLog(): void {
  fs.rmSync(path.join(os.tmpdir(), `mat-debug-${process.pid}.log`), { force: true });
}

/** A tensor over a typed array of ours: no copy. Keep it referenced as long as a run may use it. */
export class Tensor {
  readonly pointer: bigint;
  readonly array: TensorArray;
  readonly shape: readonly number[];
  readonly #release: Native;

  constructor(pointer: bigint, array: TensorArray, shape: readonly number[], release: Native) {
    this.pointer = pointer;
    this.array = array;
    this.shape = shape;
    this.#release = release;
  }

  release(): void {
    this.#release(this.pointer);
  }
}

/** One loaded graph. Inputs and outputs are bound by position, in the order given at creation. */
export class Session {
  readonly #ort: Ort;
  readonly #pointer: bigint;
  readonly #inputNames: NamePointers;
  readonly #outputNames: NamePointers;
  readonly #inputs: BigUint64Array;
  readonly #outputs: BigUint64Array;
  readonly #kept: (() => void)[] = [];
  #followers: readonly Session[] = [];
  #isReleased = false;

  constructor(
    ort: Ort,
    pointer: bigint,
    inputNames: readonly string[],
    outputNames: readonly string[],
  ) {
    this.#ort = ort;
    this.#pointer = pointer;
    this.#inputNames = new NamePointers(inputNames);
    this.#outputNames = new NamePointers(outputNames);
    this.#inputs = new BigUint64Array(inputNames.length);
    this.#outputs = new BigUint64Array(outputNames.length);
  }

  /** Computes, synchronously, into the outputs' own arrays. */
  run(inputs: readonly Tensor[], outputs: readonly Tensor[]): void {
    for (let i = 0; i < this.#inputs.length; i += 1) this.#inputs[i] = inputs[i]!.pointer;
    for (let i = 0; i < this.#outputs.length; i += 1) this.#outputs[i] = outputs[i]!.pointer;
    this.#ort.run(this.#pointer, this.#inputNames, this.#inputs, this.#outputNames, this.#outputs);
    if (this.#followers.length === 0) return;
    const last = outputs.at(-1)!;
    for (const follower of this.#followers) follower.run([...inputs, last], [last]);
  }

  /**
   * Has others run after each run: they get the same inputs and our last output, which they write anew. What is too
   * large for one session is computed so, part by part. They are released with this one.
   */
  followedBy(followers: readonly Session[]): this {
    this.#followers = followers;
    return this;
  }

  /** Keeps what the runtime reads where it is, as long as the session lives; then it is let go. */
  keep(release: () => void): void {
    this.#kept.push(release);
  }

  /** Once is enough: who releases all sessions of a failed load meets followers twice. */
  release(): void {
    if (this.#isReleased) return;
    this.#isReleased = true;
    for (const follower of this.#followers) follower.release();
    this.#ort.releaseSession(this.#pointer);
    for (const letGo of this.#kept.splice(0)) letGo();
  }
}

/** Option of sessions: what is read once, while they are made, is not to stay in an arena. */
export const OUTSIDE_ARENA = 'session.use_device_allocator_for_initializers';

/** The loaded library with one environment and the options of every session. */
export class Ort {
  readonly api: OrtApi;
  readonly env: bigint;
  /** What every session begins with. */
  readonly options: bigint;
  /** Where the tensors of `tensor` lie. */
  readonly hostMemory: bigint;

  /**
   * @param file the library; that of the npm package if left out.
   * @throws CaravanError `internal` when the library cannot be loaded or is another version.
   */
  constructor(threadCount: number, file = libraryPath()) {
    const api = new OrtApi(file);
    this.api = api;
    const warningsOnly = 3;
    // One pool of threads for all sessions: a rank has hundreds.
    const threading = api.create('CreateThreadingOptions');
    api.check(api.native.SetGlobalIntraOpNumThreads(threading, threadCount));
    api.check(api.native.SetGlobalInterOpNumThreads(threading, 1));
    const args = [warningsOnly, 'caravan', threading];
    this.env = api.create('CreateEnvWithGlobalThreadPools', ...args);
    api.check(api.native.DisableTelemetryEvents(this.env));
    removeTelemetryLog();
    this.options = api.create('CreateSessionOptions');
    api.check(api.native.DisablePerSessionThreads(this.options));
    const allOptimizations = 99;
    api.check(api.native.SetSessionGraphOptimizationLevel(this.options, allOptimizations));
    api.check(api.native.AddSessionConfigEntry(this.options, 'session.set_denormal_as_zero', '1'));
    this.hostMemory = api.create('CreateCpuMemoryInfo', 1, 0);
    this.#shareActivations();
  }

  /**
   * One arena for what all sessions in host memory compute between their inputs and outputs: they run one after the
   * other, and with arenas of their own a rank would hold the activations of its largest step once for every session.
   * Weights, which the runtime packs while sessions are made, stay outside of it.
   */
  #shareActivations(): void {
    const { native } = this.api;
    const [noLimit, asRequested, standard] = [0, 1, -1];
    const arena = this.api.create('CreateArenaCfg', noLimit, asRequested, standard, standard);
    try {
      this.api.check(native.CreateAndRegisterAllocator(this.env, this.hostMemory, arena));
    } finally {
      native.ReleaseArenaCfg(arena);
    }
  }

  /**
   * Loads a graph. Its weights' arrays may be used again after the call only if the runtime has made copies of its
   * own (`KernelProbe.packs`); the session keeps them until then.
   */
  createSession(graph: Graph): Session {
    const { inputs, outputs } = graph;
    const options = this.api.create('CloneSessionOptions', this.options);
    try {
      for (const key of ['session.use_env_allocators', OUTSIDE_ARENA]) {
        this.api.check(this.api.native.AddSessionConfigEntry(options, key, '1'));
      }
      return new Session(this, this.load(graph, options), inputs, outputs);
    } finally {
      this.api.native.ReleaseSessionOptions(options);
    }
  }

  /** A session with these options, to be released by its pointer. Its weights are taken as `createSession` does. */
  load({ model, weights }: Graph, options: bigint): bigint {
    const tensors = weights.map(({ array, shape, type }) => this.tensor(array, shape, type));
    try {
      if (weights.length > 0) {
        const names = new NamePointers(weights.map(({ name }) => name));
        const values = BigUint64Array.from(tensors, ({ pointer }) => pointer);
        this.api.check(
          this.api.native.AddExternalInitializers(options, names.pointers, values, weights.length),
        );
      }
      const args = [this.env, model, model.byteLength, options];
      return this.api.create('CreateSessionFromArray', ...args);
    } finally {
      for (const tensor of tensors) tensor.release();
    }
  }

  /**
   * A tensor whose memory is `array`, which must be backed by an ArrayBuffer of its own.
   *
   * @param type of elements that JavaScript has no arrays of; then `array` holds their bytes.
   */
  tensor(
    array: TensorArray,
    shape: readonly number[],
    type: ElementType = elementTypeOf(array),
  ): Tensor {
    const pointer = this.api.create(
      'CreateTensorWithDataAsOrtValue',
      this.hostMemory,
      array,
      array.byteLength,
      BigInt64Array.from(shape, BigInt),
      shape.length,
      type,
    );
    return new Tensor(pointer, array, shape, this.api.native.ReleaseValue);
  }

  run(
    session: bigint,
    inputNames: NamePointers,
    inputs: BigUint64Array,
    outputNames: NamePointers,
    outputs: BigUint64Array,
  ): void {
    this.api.check(
      this.api.native.Run(
        session,
        null,
        inputNames.pointers,
        inputs,
        inputs.length,
        outputNames.pointers,
        outputs.length,
        outputs,
      ),
    );
  }

  releaseSession(session: bigint): void {
    this.api.native.ReleaseSession(session);
  }
}
