/**
 * The C API of ONNX Runtime as a table of functions, called through koffi.
 *
 * `OrtGetApiBase()->GetApi(24)` returns a table of function pointers in the order of `struct OrtApi` in
 * onnxruntime_c_api.h, which only grows, so an index never changes its meaning.
 */
import path from 'node:path';
import { createRequire } from 'node:module';
import koffi from 'koffi';
import { CaravanError } from '../proto/errors.js';

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
  CreateAndRegisterAllocator: [144, 'void* F(void* env, void* memory, void* arena)'],
  CreateArenaCfg: [
    156,
    'void* F(size_t most, int strategy, int firstBytes, int deadBytes, _Out_ void** out)',
  ],
  ReleaseArenaCfg: [157, 'void F(void* arena)'],
  AddExternalInitializers: [210, 'void* F(void* options, void* names, void* values, size_t count)'],
  CreateThreadingOptions: [121, 'void* F(_Out_ void** out)'],
  SetGlobalIntraOpNumThreads: [147, 'void* F(void* threading, int count)'],
  SetGlobalInterOpNumThreads: [148, 'void* F(void* threading, int count)'],
  AddSessionConfigEntry: [130, 'void* F(void* options, str key, str value)'],
  CreateRunOptions: [39, 'void* F(_Out_ void** out)'],
  CreateTensorAsOrtValue: [
    48,
    'void* F(void* allocator, int64_t* shape, size_t rank, int type, _Out_ void** out)',
  ],
  GetTensorMutableData: [51, 'void* F(void* value, _Out_ void** out)'],
  CreateMemoryInfo: [68, 'void* F(str name, int allocator, int id, int type, _Out_ void** out)'],
  ReleaseMemoryInfo: [94, 'void F(void* memory)'],
  ReleaseRunOptions: [97, 'void F(void* options)'],
  CreateAllocator: [131, 'void* F(void* session, void* memory, _Out_ void** out)'],
  RunWithBinding: [133, 'void* F(void* session, void* runOptions, void* binding)'],
  CreateIoBinding: [134, 'void* F(void* session, _Out_ void** out)'],
  ReleaseIoBinding: [135, 'void F(void* binding)'],
  BindInput: [136, 'void* F(void* binding, str name, void* value)'],
  BindOutput: [137, 'void* F(void* binding, str name, void* value)'],
  AddRunConfigEntry: [165, 'void* F(void* options, str key, str value)'],
  SynchronizeBoundOutputs: [203, 'void* F(void* binding)'],
  AppendCudaProvider: [204, 'void* F(void* options, void* provider)'],
  CreateCUDAProviderOptions: [205, 'void* F(_Out_ void** out)'],
  UpdateCUDAProviderOptions: [
    206,
    'void* F(void* provider, void* keys, void* values, size_t count)',
  ],
  ReleaseCUDAProviderOptions: [208, 'void F(void* provider)'],
  AppendProvider: [216, 'void* F(void* options, str name, void* keys, void* values, size_t count)'],
} as const;

type FunctionName = keyof typeof functions;
export type Native = (...args: unknown[]) => unknown;

/** Where the shared library of the npm package lies on this platform. */
export function libraryPath(): string {
  const root = path.dirname(
    createRequire(import.meta.url).resolve('onnxruntime-node/package.json'),
  );
  const file = process.platform === 'darwin' ? 'libonnxruntime.1.dylib' : 'libonnxruntime.so.1';
  return path.join(root, 'bin', 'napi-v6', process.platform, process.arch, file);
}

/** The functions of one loaded library. */
export class OrtApi {
  readonly version: string;
  readonly native: Readonly<Record<FunctionName, Native>>;
  // koffi unloads a library that nothing refers to.
  readonly #library: ReturnType<typeof koffi.load>;

  /** @throws CaravanError `internal` when the library cannot be loaded or is another version. */
  constructor(file: string) {
    try {
      this.#library = koffi.load(file);
    } catch (cause) {
      throw new CaravanError('internal', `${file}: cannot be loaded: ${String(cause)}`, { cause });
    }
    const Base = koffi.struct({ GetApi: 'void*', GetVersionString: 'void*' });
    const base = koffi.decode(this.#library.func('void* OrtGetApiBase()')(), Base) as {
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
    const last = Math.max(...Object.values(functions).map(([index]) => index));
    const table = koffi.decode(getApi(API_VERSION), koffi.array('void*', last + 1)) as bigint[];
    this.native = Object.fromEntries(
      Object.entries(functions).map(([name, [index, signature]]) => [
        name,
        koffi.decode(table[index]!, koffi.proto(signature.replace('F(', `Ort${name}(`))) as Native,
      ]),
    ) as Record<FunctionName, Native>;
  }

  /** Calls a function whose last argument receives what it makes. */
  create(name: FunctionName, ...args: unknown[]): bigint {
    const out: unknown[] = [null];
    this.check(this.native[name](...args, out));
    return out[0] as bigint;
  }

  /** @throws CaravanError `internal` with the runtime's own words, if it has any. */
  check(status: unknown): void {
    if (status === null || status === 0n) return;
    const message = this.native.GetErrorMessage(status) as string;
    this.native.ReleaseStatus(status);
    throw new CaravanError('internal', `ONNX Runtime: ${message.split('\n')[0] ?? ''}`);
  }
}

/** An array of C strings that stays where it is. */
export class NamePointers {
  readonly pointers: BigUint64Array;
  // The pointers point into these.
  readonly #strings: Buffer[];

  constructor(names: readonly string[]) {
    this.#strings = names.map((name) => Buffer.from(`${name}\0`));
    this.pointers = BigUint64Array.from(this.#strings, (string) => koffi.address(string));
  }
}
