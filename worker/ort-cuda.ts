/**
 * The little of CUDA's own library that ONNX Runtime's C API lacks: a stream that all sessions share, copies on it, pinned
 * host memory, memory that other processes can open, what a stream was given as one launch, and how much memory a GPU has.
 * It is loaded if it is there; without it copies go through sessions.
 */
import { CaravanError } from '../proto/errors.js';
import type { Captured } from './device-launch.js';
import type { DirectBlock, DirectMemory, MappedMemory, StreamSignals } from './direct-memory.js';
import type { TensorArray } from './ort.js';
import {
  IPC_HANDLE_BYTES,
  loadCudaDriver,
  loadCudaLibrary,
  type CudaDriver,
  type CudaLibrary,
} from './ort-cuda-library.js';

const TO_DEVICE = 1;
const TO_HOST = 2;
const NON_BLOCKING = 1;
const PEER_ACCESS_AT_NEED = 1;
/** Captures whatever comes, memory that kernels ask for meanwhile among it. */
const RELAXED = 2;

const MAPPED = 2;
/** cudaErrorNotReady */
const NOT_READY = 600;

export class CudaRuntime implements DirectMemory {
  readonly stream: bigint;
  readonly index: number;
  readonly #library: CudaLibrary;
  /** Null where the driver's streams cannot wait for numbers. */
  readonly signals: StreamSignals | null;
  /** What peers may read: it stays when a group ends, since they may be later to notice. */
  #shared: {
    readonly address: bigint;
    readonly byteCount: number;
    readonly handle: string;
  } | null = null;

  /** @throws CaravanError `bad_usage` when there is no such GPU. */
  constructor(library: CudaLibrary, index: number, driver: CudaDriver | null = null) {
    this.#library = library;
    this.index = index;
    this.#check(library.setDevice(index), `GPU ${index}`);
    const out: unknown[] = [null];
    this.#check(library.streamCreate(out, NON_BLOCKING), 'a stream');
    this.stream = out[0] as bigint;
    this.signals = driver === null ? null : this.#signalsBy(driver);
  }

  /** @returns null where CUDA's library is not found. @throws CaravanError `bad_usage` when it has no such GPU. */
  static open(index: number): CudaRuntime | null {
    const library = loadCudaLibrary();
    return library === null ? null : new CudaRuntime(library, index, loadCudaDriver());
  }

  /** Bytes of the device's memory. */
  memory(): { readonly freeBytes: number; readonly totalBytes: number } {
    const free: unknown[] = [0];
    const total: unknown[] = [0];
    this.#check(this.#library.memGetInfo(free, total), 'its memory');
    return { freeBytes: Number(free[0]), totalBytes: Number(total[0]) };
  }

  /** Numbers of the GPUs whose memory this one can read, its own among them. */
  readablePeers(): number[] {
    const count: unknown[] = [0];
    this.#check(this.#library.getDeviceCount(count), 'the number of GPUs');
    return Array.from({ length: Number(count[0]) }, (_, peer) => peer).filter((peer) => {
      if (peer === this.index) return true;
      const can: unknown[] = [0];
      return this.#library.deviceCanAccessPeer(can, this.index, peer) === 0 && can[0] === 1;
    });
  }

  clear(address: bigint, byteCount: number): void {
    const { memsetAsync } = this.#library;
    this.#check(memsetAsync(address, 0, byteCount, this.stream), 'clearing memory');
  }

  copyIn(array: TensorArray, target: bigint) {
    const { memcpyAsync } = this.#library;
    const { byteLength } = array;
    return {
      run: (): void => {
        this.#check(memcpyAsync(target, array, byteLength, TO_DEVICE, this.stream), 'copy');
      },
      release: (): void => undefined,
    };
  }

  /** The array is whole when `run` returns. */
  copyOut(source: bigint, array: TensorArray) {
    const { memcpyAsync } = this.#library;
    const { byteLength } = array;
    return {
      run: (): void => {
        this.#check(memcpyAsync(array, source, byteLength, TO_HOST, this.stream), 'copy');
        this.synchronize();
      },
      release: (): void => undefined,
    };
  }

  synchronize(): void {
    this.#check(this.#library.streamSynchronize(this.stream), 'the stream');
  }

  /** Lets copies from and to this array go without another one between. @returns undoes it. */
  pin(array: TensorArray): () => void {
    if (this.#library.hostRegister(array, array.byteLength, 0) !== 0) {
      this.#library.getLastError();
      return () => undefined;
    }
    return () => {
      this.#library.hostUnregister(array);
    };
  }

  share(byteCount: number): DirectBlock {
    if (this.#shared === null || this.#shared.byteCount < byteCount) {
      if (this.#shared !== null) this.#library.free(this.#shared.address);
      this.#shared = null;
      const out: unknown[] = [null];
      this.#check(this.#library.malloc(out, byteCount), `${byteCount} bytes that peers can read`);
      const address = out[0] as bigint;
      const handle = Buffer.alloc(IPC_HANDLE_BYTES);
      const code = this.#library.ipcGetMemHandle(handle, address);
      if (code !== 0) this.#library.free(address);
      this.#check(code, 'a handle for other processes');
      this.#shared = { address, byteCount, handle: handle.toString('base64') };
    }
    const { address, handle } = this.#shared;
    this.clear(address, byteCount);
    this.synchronize();
    return { address, handle, close: () => undefined };
  }

  open(handle: string): DirectBlock {
    const reserved = new Uint8Array(Buffer.from(handle, 'base64'));
    const out: unknown[] = [null];
    if (reserved.length !== IPC_HANDLE_BYTES) {
      throw new CaravanError('invalid_request', `a handle has ${reserved.length} bytes`);
    }
    const open = this.#library.ipcOpenMemHandle;
    this.#check(open(out, { reserved }, PEER_ACCESS_AT_NEED), "a peer's memory");
    const address = out[0] as bigint;
    const close = (): void => {
      this.#library.ipcCloseMemHandle(address);
    };
    return { address, handle, close };
  }

  write(address: bigint, bytes: Uint8Array): void {
    const { memcpyAsync } = this.#library;
    this.#check(memcpyAsync(address, bytes, bytes.length, TO_DEVICE, this.stream), 'copy');
    this.synchronize();
  }

  read(address: bigint, byteCount: number): Uint8Array {
    const bytes = new Uint8Array(byteCount);
    const { memcpyAsync } = this.#library;
    this.#check(memcpyAsync(bytes, address, byteCount, TO_HOST, this.stream), 'copy');
    this.synchronize();
    return bytes;
  }

  /** What the stream is given meanwhile, which is not done then, as one launch (CUDA's graphs). */
  capture(issue: () => void): Captured {
    const library = this.#library;
    this.#check(library.streamBeginCapture(this.stream, RELAXED), 'begin of capture');
    const out: unknown[] = [null];
    let code: number;
    try {
      issue();
    } finally {
      code = library.streamEndCapture(this.stream, out);
      // The runtime asks for the last error after its own calls: this one is ours.
      if (code !== 0) library.getLastError();
    }
    this.#check(code, 'capture');
    const graph = out[0] as bigint;
    const made: unknown[] = [null];
    code = library.graphInstantiate(made, graph, 0);
    library.graphDestroy(graph);
    this.#check(code, 'a captured graph');
    const executable = made[0] as bigint;
    return {
      launch: () => {
        this.#check(library.graphLaunch(executable, this.stream), 'a captured graph');
      },
      release: () => {
        library.graphExecDestroy(executable);
      },
    };
  }

  #signalsBy({ streamWriteValue, streamWaitValue }: CudaDriver): StreamSignals {
    const library = this.#library;
    const checkDriver = (code: number, what: string): void => {
      if (code === 0) return;
      throw new CaravanError('bad_usage', `--device cuda:${this.index}: ${what}: CUresult ${code}`);
    };
    return {
      map: (address, byteCount): MappedMemory => {
        this.#check(library.hostRegister(address, byteCount, MAPPED), 'shared memory');
        const out: unknown[] = [null];
        this.#check(library.hostGetDevicePointer(out, address, 0), 'shared memory');
        const release = (): void => {
          library.hostUnregister(address);
        };
        return { address: out[0] as bigint, release };
      },
      show: (address, value) => {
        checkDriver(
          streamWriteValue(this.stream, address, value >>> 0, 0),
          'a number of the stream',
        );
      },
      await: (address, value) => {
        checkDriver(
          streamWaitValue(this.stream, address, value >>> 0, 0),
          'a number of the stream',
        );
      },
      isIdle: () => {
        const code = library.streamQuery(this.stream);
        if (code === NOT_READY) return false;
        this.#check(code, 'the stream');
        return true;
      },
    };
  }

  #check(code: number, what: string): void {
    if (code === 0) return;
    // Else whoever asks next for the last error gets this one.
    this.#library.getLastError();
    const said = this.#library.getErrorString(code);
    throw new CaravanError('bad_usage', `--device cuda:${this.index}: ${what}: ${said}`);
  }
}
