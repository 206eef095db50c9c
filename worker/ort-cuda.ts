/**
 * The little of CUDA's own library that ONNX Runtime's C API lacks: a stream that all sessions share, copies on it, pinned
 * host memory, and how much memory a GPU has. It is loaded if it is there; without it copies go through sessions.
 */
import koffi from 'koffi';
import { CaravanError } from '../proto/errors.js';
import type { TensorArray } from './ort.js';

type Native = (...args: unknown[]) => number;

/** Newest first: the provider library says which one it needs, the others do for copies. */
const LIBRARIES = ['libcudart.so.13', 'libcudart.so.12', 'libcudart.so'] as const;

const TO_DEVICE = 1;
const TO_HOST = 2;
const NON_BLOCKING = 1;

const signatures = {
  setDevice: 'int cudaSetDevice(int device)',
  streamCreate: 'int cudaStreamCreateWithFlags(_Out_ void** stream, unsigned int flags)',
  streamSynchronize: 'int cudaStreamSynchronize(void* stream)',
  copyIn: 'int cudaMemcpyAsync(void* target, void* source, size_t bytes, int kind, void* stream)',
  memset: 'int cudaMemsetAsync(void* memory, int value, size_t bytes, void* stream)',
  memGetInfo: 'int cudaMemGetInfo(_Out_ size_t* free, _Out_ size_t* total)',
  hostRegister: 'int cudaHostRegister(void* memory, size_t bytes, unsigned int flags)',
  hostUnregister: 'int cudaHostUnregister(void* memory)',
  getDeviceCount: 'int cudaGetDeviceCount(_Out_ int* count)',
  errorString: 'str cudaGetErrorString(int code)',
} as const;

export class CudaRuntime {
  readonly stream: bigint;
  readonly index: number;
  readonly #native: Readonly<Record<keyof typeof signatures, Native>>;

  private constructor(native: CudaRuntime['_native'], index: number) {
    this.#native = native;
    this.index = index;
    this.#check(native.setDevice(index), `GPU ${index}`);
    const out: unknown[] = [null];
    this.#check(native.streamCreate(out, NON_BLOCKING), 'a stream');
    this.stream = out[0] as bigint;
  }
  declare private readonly _native: Readonly<Record<keyof typeof signatures, Native>>;

  /** @returns null where CUDA's library is not found. @throws CaravanError `bad_usage` when it has no such GPU. */
  static open(index: number): CudaRuntime | null {
    for (const name of LIBRARIES) {
      let library: ReturnType<typeof koffi.load>;
      try {
        library = koffi.load(name);
      } catch {
        continue;
      }
      const entries = Object.entries(signatures).map(([key, signature]) => [
        key,
        library.func(signature) as Native,
      ]);
      return new CudaRuntime(
        Object.fromEntries(entries) as Record<keyof typeof signatures, Native>,
        index,
      );
    }
    return null;
  }

  /** Bytes of the device's memory. */
  memory(): { readonly freeBytes: number; readonly totalBytes: number } {
    const free: unknown[] = [0];
    const total: unknown[] = [0];
    this.#check(this.#native.memGetInfo(free, total), 'its memory');
    return { freeBytes: Number(free[0]), totalBytes: Number(total[0]) };
  }

  clear(address: bigint, byteCount: number): void {
    this.#check(this.#native.memset(address, 0, byteCount, this.stream), 'clearing memory');
  }

  copyIn(array: TensorArray, target: bigint) {
    return {
      run: (): void => {
        const { byteLength } = array;
        this.#check(this.#native.copyIn(target, array, byteLength, TO_DEVICE, this.stream), 'copy');
      },
      release: (): void => undefined,
    };
  }

  /** The array is whole when `run` returns. */
  copyOut(source: bigint, array: TensorArray) {
    return {
      run: (): void => {
        const { byteLength } = array;
        this.#check(this.#native.copyIn(array, source, byteLength, TO_HOST, this.stream), 'copy');
        this.synchronize();
      },
      release: (): void => undefined,
    };
  }

  synchronize(): void {
    this.#check(this.#native.streamSynchronize(this.stream), 'the stream');
  }

  /** Lets copies from and to this array go without another one between. @returns undoes it. */
  pin(array: TensorArray): () => void {
    if (this.#native.hostRegister(array, array.byteLength, 0) !== 0) return () => undefined;
    return () => {
      this.#native.hostUnregister(array);
    };
  }

  #check(code: number, what: string): void {
    if (code === 0) return;
    const said = (this.#native.errorString as unknown as (code: number) => string)(code);
    throw new CaravanError('bad_usage', `--device cuda:${this.index}: ${what}: ${said}`);
  }
}
