/**
 * ONNX Runtime through its C API: the only door to it.
 *
 * The npm package's own `session.run` copies every output, which a KV cache of gigabytes cannot afford.
 * The library inside the package exports the C API; koffi calls it. `OrtGetApiBase()->GetApi(24)` returns a
 * table of function pointers in the order of `struct OrtApi` in onnxruntime_c_api.h, which only grows, so
 * an index never changes its meaning.
 */
import fs from 'node:fs';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import koffi from 'koffi';
import { CaravanError } from '../proto/errors.js';
import type { Graph } from './graph-builder.js';

const ORT_VERSION = '1.30.0';
const API_VERSION = 24;

/** Index into `struct OrtApi`, and the C type. Every function returns OrtStatus* unless it is void. */
const functions = {
  CreateStatus: [0, 'void* F(int code, str message)'],
  GetErrorMessage: [2, 'str F(void* status)'],
  DisableTelemetryEvents: [6, 'void* F(void* env)'],
  CreateSessionFromArray: [
    8,
    'void* F(void* env, void* model, size_t bytes, void* options, _Out_ void** out)',
  ],
  Run: [
    9,
    'void* F(void* session, void* runOptions, void* inputNames, void* inputs, size_t inputCount, void* outputNames, size_t outputCount, void* outputs)',
  ],
  CreateSessionOptions: [10, 'void* F(_Out_ void** out)'],
  CloneSessionOptions: [12, 'void* F(void* options, _Out_ void** out)'],
  DisableCpuMemArena: [19, 'void* F(void* options)'],
  SetSessionGraphOptimizationLevel: [23, 'void* F(void* options, int level)'],
  CreateTensorWithDataAsOrtValue: [
    49,
    'void* F(void* memory, void* bytes, size_t byteCount, int64_t* shape, size_t rank, int type, _Out_ void** out)',
  ],
  CreateCpuMemoryInfo: [69, 'void* F(int allocator, int type, _Out_ void** out)'],
  ReleaseEnv: [92, 'void F(void* env)'],
  ReleaseStatus: [93, 'void F(void* status)'],
  ReleaseSession: [95, 'void F(void* session)'],
  ReleaseValue: [96, 'void F(void* value)'],
  CreateEnvWithGlobalThreadPools: [
    119,
    'void* F(int level, str id, void* threading, _Out_ void** out)',
  ],
  DisablePerSessionThreads: [120, 'void* F(void* options)'],
  ReleaseSessionOptions: [100, 'void F(void* options)'],
  AddExternalInitializers: [210, 'void* F(void* options, void* names, void* values, size_t count)'],
  CreateThreadingOptions: [121, 'void* F(_Out_ void** out)'],
  SetGlobalIntraOpNumThreads: [147, 'void* F(void* threading, int count)'],
  SetGlobalInterOpNumThreads: [148, 'void* F(void* threading, int count)'],
  AddSessionConfigEntry: [130, 'void* F(void* options, str key, str value)'],
} as const;

type FunctionName = keyof typeof functions;
type Native = (...args: unknown[]) => unknown;

/** ONNX's numbers for element types. */
export const elementType = { float32: 1, uint8: 2, int8: 3, int32: 6, int64: 7 } as const;
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

/** Where the shared library of the npm package lies on this platform. */
export function libraryPath(): string {
  const root = path.dirname(
    createRequire(import.meta.url).resolve('onnxruntime-node/package.json'),
  );
  const file = process.platform === 'darwin' ? 'libonnxruntime.1.dylib' : 'libonnxruntime.so.1';
  return path.join(root, 'bin', 'napi-v6', process.platform, process.arch, file);
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
  readonly #kept: unknown[] = [];

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
  }

  /** Keeps what the runtime reads where it is, as long as the session lives. */
  keep(memory: unknown): void {
    this.#kept.push(memory);
  }

  release(): void {
    this.#ort.releaseSession(this.#pointer);
    this.#kept.length = 0;
  }
}

/** An array of C strings that stays where it is. */
class NamePointers {
  readonly pointers: BigUint64Array;
  // The pointers point into these.
  readonly #strings: Buffer[];

  constructor(names: readonly string[]) {
    this.#strings = names.map((name) => Buffer.from(`${name}\0`));
    this.pointers = BigUint64Array.from(this.#strings, (string) => koffi.address(string));
  }
}

/** The loaded library with one environment and the options of every session. */
export class Ort {
  readonly version: string;
  // koffi unloads a library that nothing refers to.
  readonly library: ReturnType<typeof koffi.load>;
  readonly #native: Record<FunctionName, Native>;
  readonly #env: bigint;
  readonly #options: bigint;
  readonly #memory: bigint;

  /**
   * @throws CaravanError `unsupported_model`… when the library cannot be loaded or is another version.
   */
  constructor(threadCount: number) {
    const file = libraryPath();
    try {
      this.library = koffi.load(file);
    } catch (cause) {
      throw new CaravanError('internal', `${file}: cannot be loaded: ${String(cause)}`, { cause });
    }
    const Base = koffi.struct({ GetApi: 'void*', GetVersionString: 'void*' });
    const base = koffi.decode(this.library.func('void* OrtGetApiBase()')(), Base) as {
      GetApi: bigint;
      GetVersionString: bigint;
    };
    this.version = (
      koffi.decode(base.GetVersionString, koffi.proto('str OrtGetVersionString()')) as () => string
    )();
    if (this.version !== ORT_VERSION) {
      throw new CaravanError('internal', `${file}: is version ${this.version}, not ${ORT_VERSION}`);
    }
    const getApi = koffi.decode(
      base.GetApi,
      koffi.proto('void* OrtGetApi(uint32_t version)'),
    ) as Native;
    const table = koffi.decode(getApi(API_VERSION), koffi.array('void*', 211)) as bigint[];
    this.#native = Object.fromEntries(
      Object.entries(functions).map(([name, [index, signature]]) => [
        name,
        koffi.decode(table[index]!, koffi.proto(signature.replace('F(', `Ort${name}(`))) as Native,
      ]),
    ) as Record<FunctionName, Native>;

    const warningsOnly = 3;
    // One pool of threads for all sessions: a rank has hundreds.
    const threading = this.#create('CreateThreadingOptions');
    this.#check(this.#native.SetGlobalIntraOpNumThreads(threading, threadCount));
    this.#check(this.#native.SetGlobalInterOpNumThreads(threading, 1));
    const args = [warningsOnly, 'caravan', threading];
    this.#env = this.#create('CreateEnvWithGlobalThreadPools', ...args);
    this.#check(this.#native.DisableTelemetryEvents(this.#env));
    removeTelemetryLog();
    this.#options = this.#create('CreateSessionOptions');
    this.#check(this.#native.DisablePerSessionThreads(this.#options));
    const allOptimizations = 99;
    this.#check(this.#native.SetSessionGraphOptimizationLevel(this.#options, allOptimizations));
    this.#check(
      this.#native.AddSessionConfigEntry(this.#options, 'session.set_denormal_as_zero', '1'),
    );
    this.#memory = this.#create('CreateCpuMemoryInfo', 1, 0);
  }

  /**
   * Loads a graph. Its weights' arrays may be used again after the call only if the runtime has made copies of its
   * own (`packsItself`); the session keeps them until then.
   */
  createSession({ model, inputs, outputs, weights }: Graph): Session {
    const options = this.#create('CloneSessionOptions', this.#options);
    const tensors = weights.map(({ array, shape }) => this.tensor(array, shape));
    try {
      if (weights.length > 0) {
        const names = new NamePointers(weights.map(({ name }) => name));
        const values = BigUint64Array.from(tensors, ({ pointer }) => pointer);
        this.#check(
          this.#native.AddExternalInitializers(options, names.pointers, values, weights.length),
        );
      }
      const args = [this.#env, model, model.byteLength, options];
      return new Session(this, this.#create('CreateSessionFromArray', ...args), inputs, outputs);
    } finally {
      for (const tensor of tensors) tensor.release();
      this.#native.ReleaseSessionOptions(options);
    }
  }

  /** A tensor whose memory is `array`, which must be backed by an ArrayBuffer of its own. */
  tensor(array: TensorArray, shape: readonly number[]): Tensor {
    const pointer = this.#create(
      'CreateTensorWithDataAsOrtValue',
      this.#memory,
      array,
      array.byteLength,
      BigInt64Array.from(shape, BigInt),
      shape.length,
      elementTypeOf(array),
    );
    return new Tensor(pointer, array, shape, this.#native.ReleaseValue);
  }

  run(
    session: bigint,
    inputNames: NamePointers,
    inputs: BigUint64Array,
    outputNames: NamePointers,
    outputs: BigUint64Array,
  ): void {
    this.#check(
      this.#native.Run(
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
    this.#native.ReleaseSession(session);
  }

  #create(name: FunctionName, ...args: unknown[]): bigint {
    const out: unknown[] = [null];
    this.#check(this.#native[name](...args, out));
    return out[0] as bigint;
  }

  #check(status: unknown): void {
    if (status === null || status === 0n) return;
    const message = this.#native.GetErrorMessage(status) as string;
    this.#native.ReleaseStatus(status);
    throw new CaravanError('internal', `ONNX Runtime: ${message.split('\n')[0] ?? ''}`);
  }
}
