/**
 * Execution providers: what of ONNX Runtime computes on which device, with which options, and what its memory is called.
 */
import { nameOfDevice, type DeviceName } from '../model/device-name.js';
import { CaravanError } from '../proto/errors.js';
import { NamePointers, type OrtApi } from './ort-api.js';

export interface Provider {
  readonly device: DeviceName;
  /** As the runtime names its memory, and the number of the device in it. */
  readonly memory: { readonly name: string; readonly id: number };
  /** Whether a tensor may begin anywhere in another one's memory: handles of WebGPU cannot be added to. */
  readonly hasOffsets: boolean;
  /** Whether the device has products with transposed weights, and 16-bit floats. */
  readonly hasFusedProducts: boolean;
  /** Options by name, as the provider takes them. */
  readonly options: Readonly<Record<string, string>>;
}

export interface CudaSettings {
  /**
   * Bytes that the runtime's arenas may take of the device's memory, each; null for all. Weights that are in graphs lie
   * outside of them: that all of it fits is seen to when a shard is loaded.
   */
  readonly memoryLimit: number | null;
  /** Address of a CUDA stream that all sessions share; null lets each session have its own. */
  readonly stream: bigint | null;
}

/** What a device's sessions are told. Arithmetic only: nothing is opened. */
export function providerOf(
  device: DeviceName,
  cuda: CudaSettings = { memoryLimit: null, stream: null },
): Provider {
  switch (device.kind) {
    case 'cpu':
      return {
        device,
        memory: { name: 'Cpu', id: 0 },
        hasOffsets: true,
        hasFusedProducts: true,
        options: {},
      };
    case 'webgpu':
      return {
        device,
        memory: { name: 'WebGPU_Buf', id: 0 },
        hasOffsets: false,
        hasFusedProducts: false,
        options: {},
      };
    case 'cuda':
      return {
        device,
        memory: { name: 'Cuda', id: device.index },
        hasOffsets: true,
        hasFusedProducts: true,
        options: cudaOptions(device.index, cuda),
      };
  }
}

function cudaOptions(
  index: number,
  { memoryLimit, stream }: CudaSettings,
): Readonly<Record<string, string>> {
  return {
    device_id: String(index),
    // Weights and KV are blocks of their own: doubling what is asked would waste half of the device.
    arena_extend_strategy: 'kSameAsRequested',
    // 10 bits of mantissa where 23 were asked for.
    use_tf32: '0',
    ...(memoryLimit === null ? {} : { gpu_mem_limit: String(memoryLimit) }),
    // Without the first the second is passed over, and kernels do not wait for our copies.
    ...(stream === null
      ? {}
      : { has_user_compute_stream: '1', user_compute_stream: String(stream) }),
  };
}

/**
 * Lets a device's provider take the nodes of sessions with these options.
 *
 * @throws CaravanError `bad_usage` saying what is missing and how to mend it.
 */
export function appendProvider(api: OrtApi, options: bigint, provider: Provider): void {
  const { device } = provider;
  const keys = new NamePointers(Object.keys(provider.options));
  const values = new NamePointers(Object.values(provider.options));
  const count = keys.pointers.length;
  try {
    if (device.kind === 'webgpu') {
      api.check(
        api.native.AppendProvider(options, 'WebGPU', keys.pointers, values.pointers, count),
      );
    } else if (device.kind === 'cuda') {
      const cuda = api.create('CreateCUDAProviderOptions');
      try {
        const native = api.native.UpdateCUDAProviderOptions;
        api.check(native(cuda, keys.pointers, values.pointers, count));
        api.check(api.native.AppendCudaProvider(options, cuda));
      } finally {
        api.native.ReleaseCUDAProviderOptions(cuda);
      }
    }
  } catch (cause) {
    throw explain(device, cause);
  }
}

/** The runtime's own words, and what to do about it. */
export function explain(device: DeviceName, cause: unknown): CaravanError {
  if (cause instanceof CaravanError && cause.code === 'bad_usage') return cause;
  const said = (cause instanceof Error ? cause.message : String(cause))
    .replace(/^ONNX Runtime: (\S+:\d+ .*?was false\. )?/, '')
    // Where in the runtime's source it was noticed.
    .replace(/^\/.* : FAIL : /, '');
  return new CaravanError(
    'bad_usage',
    `--device ${nameOfDevice(device)}: ${said.replace(/[.\s]+$/, '')}; ${mend(device, said)}`,
    { cause },
  );
}

function mend({ kind }: DeviceName, said: string): string {
  if (kind === 'webgpu') {
    return "install the GPU's Vulkan driver and libvulkan1, or for the software driver set VK_ICD_FILENAMES to its .json file";
  }
  if (kind === 'cpu') return 'run npm ci again: the library comes with onnxruntime-node';
  if (/not enabled in this build|cannot open shared object|Failed to load|dlopen/i.test(said)) {
    return "set CARAVAN_ORT_LIBRARY to a libonnxruntime that has libonnxruntime_providers_cuda.so beside it (PyPI's onnxruntime-gpu has), and let CUDA's libraries be found (LD_LIBRARY_PATH)";
  }
  return 'see that nvidia-smi lists this GPU, and that its driver is as new as the CUDA of the provider library';
}
