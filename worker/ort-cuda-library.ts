/** CUDA's own library as a table of functions, called through koffi. */
import koffi from 'koffi';

/** Newest first: the provider library says which one it needs, the others do for copies. */
const LIBRARIES = ['libcudart.so.13', 'libcudart.so.12', 'libcudart.so'] as const;

export const IPC_HANDLE_BYTES = 64;
// Handed over by value.
koffi.struct('cudaIpcMemHandle_t', { reserved: koffi.array('uint8_t', IPC_HANDLE_BYTES) });

/** All but the last answer cudaError_t. */
const signatures = {
  setDevice: 'int cudaSetDevice(int device)',
  getDeviceCount: 'int cudaGetDeviceCount(_Out_ int* count)',
  deviceCanAccessPeer: 'int cudaDeviceCanAccessPeer(_Out_ int* can, int device, int peer)',
  memGetInfo: 'int cudaMemGetInfo(_Out_ size_t* free, _Out_ size_t* total)',
  malloc: 'int cudaMalloc(_Out_ void** memory, size_t bytes)',
  free: 'int cudaFree(void* memory)',
  memcpyAsync:
    'int cudaMemcpyAsync(void* target, void* source, size_t bytes, int kind, void* stream)',
  memsetAsync: 'int cudaMemsetAsync(void* memory, int value, size_t bytes, void* stream)',
  hostRegister: 'int cudaHostRegister(void* memory, size_t bytes, unsigned int flags)',
  hostGetDevicePointer:
    'int cudaHostGetDevicePointer(_Out_ void** target, void* memory, unsigned int flags)',
  hostUnregister: 'int cudaHostUnregister(void* memory)',
  ipcGetMemHandle: 'int cudaIpcGetMemHandle(void* handle, void* memory)',
  ipcOpenMemHandle:
    'int cudaIpcOpenMemHandle(_Out_ void** memory, cudaIpcMemHandle_t handle, unsigned int flags)',
  ipcCloseMemHandle: 'int cudaIpcCloseMemHandle(void* memory)',
  streamCreate: 'int cudaStreamCreateWithFlags(_Out_ void** stream, unsigned int flags)',
  streamQuery: 'int cudaStreamQuery(void* stream)',
  streamSynchronize: 'int cudaStreamSynchronize(void* stream)',
  streamBeginCapture: 'int cudaStreamBeginCapture(void* stream, int mode)',
  streamEndCapture: 'int cudaStreamEndCapture(void* stream, _Out_ void** graph)',
  graphInstantiate:
    'int cudaGraphInstantiateWithFlags(_Out_ void** executable, void* graph, unsigned long long flags)',
  graphLaunch: 'int cudaGraphLaunch(void* executable, void* stream)',
  graphDestroy: 'int cudaGraphDestroy(void* graph)',
  graphExecDestroy: 'int cudaGraphExecDestroy(void* executable)',
  getLastError: 'int cudaGetLastError()',
  getErrorString: 'str cudaGetErrorString(int code)',
} as const;

/** Answers an error's number, 0 for none. */
export type CudaFunction = (...args: unknown[]) => number;

export type CudaLibrary = Readonly<
  Record<Exclude<keyof typeof signatures, 'getErrorString'>, CudaFunction>
> & { readonly getErrorString: (code: number) => string };

/** Of the driver: numbers in memory that a stream writes, and waits for. Answer CUresult, 0 for none. */
const driverSignatures = {
  streamWriteValue:
    'int cuStreamWriteValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned int flags)',
  streamWaitValue:
    'int cuStreamWaitValue32_v2(void* stream, uint64_t address, uint32_t value, unsigned int flags)',
} as const;

export type CudaDriver = Readonly<Record<keyof typeof driverSignatures, CudaFunction>>;

/** @returns null where there is no driver, or an older one without these. */
export function loadCudaDriver(): CudaDriver | null {
  try {
    const library = koffi.load('libcuda.so.1');
    return Object.fromEntries(
      Object.entries(driverSignatures).map(([key, signature]) => [key, library.func(signature)]),
    ) as unknown as CudaDriver;
  } catch {
    return null;
  }
}

/** @returns null where CUDA's library is not found. */
export function loadCudaLibrary(): CudaLibrary | null {
  for (const name of LIBRARIES) {
    let library: ReturnType<typeof koffi.load>;
    try {
      library = koffi.load(name);
    } catch {
      continue;
    }
    return Object.fromEntries(
      Object.entries(signatures).map(([key, signature]) => [key, library.func(signature)]),
    ) as unknown as CudaLibrary;
  }
  return null;
}
