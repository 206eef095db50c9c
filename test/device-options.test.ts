/** What needs no GPU of the way to one: names, options, who is refused, and in which words. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { devicesOfRanks, probeDevice, unreadablePair } from '../coordinator/devices.js';
import { planGroup } from '../coordinator/group-spec.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { deviceOfRank, parseDevice } from '../model/device-name.js';
import { weightForms } from '../model/weights.js';
import { CaravanError } from '../proto/errors.js';
import { refuseTooLittle } from '../worker/bound-device.js';
import { OrtApi } from '../worker/ort-api.js';
import { explain, providerOf } from '../worker/ort-provider.js';
import { limitCublas } from '../worker/quick-products.js';
import { withHostMemoryDevices } from './device-ranks.js';
import { llama2Shapes } from './bench/shape-checkpoint.js';

const isRefusal = (code: string, says: RegExp) => (error: unknown) => {
  assert.ok(error instanceof CaravanError, String(error));
  assert.equal(error.code, code);
  assert.match(error.message, says);
  return true;
};

void test('devices are named cpu, webgpu, cuda and cuda:N, and nothing else', () => {
  assert.deepEqual(parseDevice('cpu'), { kind: 'cpu' });
  assert.deepEqual(parseDevice('webgpu'), { kind: 'webgpu' });
  assert.deepEqual(parseDevice('cuda'), { kind: 'cuda', index: 0 });
  assert.deepEqual(parseDevice('cuda:13'), { kind: 'cuda', index: 13 });
  for (const text of ['', 'gpu', 'cuda:', 'cuda:x', 'cuda:-1', 'cuda:1000', 'CPU', 'webgpu:0']) {
    assert.throws(() => parseDevice(text), isRefusal('bad_usage', /cpu, webgpu, cuda or cuda:N/));
  }
});

void test('with cuda, rank i has GPU i; with cuda:N all have that one', () => {
  assert.equal(deviceOfRank('cuda', 3), 'cuda:3');
  assert.equal(deviceOfRank('cuda:1', 3), 'cuda:1');
  assert.equal(deviceOfRank('webgpu', 3), 'webgpu');
  assert.deepEqual(devicesOfRanks('cuda', 2), ['cuda:0', 'cuda:1']);
  assert.deepEqual(devicesOfRanks('cpu', 2), ['cpu']);
});

void test('partials stay on the GPUs of a machine where each can read all others', () => {
  const report = (device: string, readablePeers: number[] | null) => ({
    ...{ device, readablePeers },
    ...{ fault: null, memory: null },
  });
  const devices = devicesOfRanks('cuda', 3);
  const all = devices.map((device) => report(device, [0, 1, 2]));
  assert.equal(unreadablePair(devices, all), null);
  const some = [all[0]!, report('cuda:1', [0, 1]), all[2]!];
  assert.deepEqual(unreadablePair(devices, some), ['cuda:1', 'cuda:2']);
  assert.deepEqual(unreadablePair(devices, [all[0]!, report('cuda:1', null), all[2]!]), [
    ...['cuda:1', 'cuda:0'],
  ]);
});

void test("CUDA's provider is told its GPU, its limit and the stream of all sessions", () => {
  const cuda = { kind: 'cuda', index: 3 } as const;
  const limited = providerOf(cuda, { memoryLimit: 5e9, stream: 140_000_000_000_000n });
  assert.deepEqual(limited.options, {
    device_id: '3',
    arena_extend_strategy: 'kSameAsRequested',
    use_tf32: '0',
    gpu_mem_limit: '5000000000',
    has_user_compute_stream: '1',
    user_compute_stream: '140000000000000',
  });
  assert.deepEqual(limited.memory, { name: 'Cuda', id: 3 });
  const { options } = providerOf(cuda);
  assert.ok(!('gpu_mem_limit' in options) && !('user_compute_stream' in options));
});

void test('what is missing is said with how to mend it', () => {
  const cuda = { kind: 'cuda', index: 0 } as const;
  const said =
    'ONNX Runtime: /src/provider_bridge_ort.cc:1988 Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library ' +
    'libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared object file';
  const { message } = explain(cuda, new Error(said));
  assert.match(message, /^--device cuda:0: Failed to load library .*libcublasLt/);
  assert.match(message, /CARAVAN_ORT_LIBRARY .*LD_LIBRARY_PATH/);
  const other = explain(cuda, new Error('ONNX Runtime: CUDA failure 100: no CUDA-capable device'));
  assert.match(other.message, /no CUDA-capable device; see that nvidia-smi lists this GPU/);
  assert.match(explain({ kind: 'webgpu' }, new Error('No supported adapters.')).message, /Vulkan/);
});

void test('a library that is not there, or of another version, is refused by name', () => {
  assert.throws(() => new OrtApi('/nowhere/libonnxruntime.so'), /\/nowhere\/libonnxruntime\.so/);
});

void test('a device that has no rank says why', async () => {
  // No machine has that many GPUs, and the library that comes along has no CUDA.
  const [{ fault, memory }, cpu] = await Promise.all([probeDevice('cuda:999'), probeDevice('cpu')]);
  assert.match(fault ?? '', /^--device cuda:999: .*(CARAVAN_ORT_LIBRARY|nvidia-smi)/);
  assert.equal(memory, null);
  assert.equal(cpu.fault, null);
});

void test('too little memory is said before anything is read: what was asked, what is free', async () => {
  const smaller = ['int8', 'int4'] as const;
  const asked = { weightBytes: 13.5e9, kvBytes: 2e9, graphBytes: 0.5e9, smaller };
  refuseTooLittle('cuda:1', { freeBytes: 16e9, totalBytes: 24e9 }, asked);
  assert.throws(
    () => {
      refuseTooLittle('cuda:1', { freeBytes: 15.9e9, totalBytes: 24e9 }, asked);
    },
    isRefusal(
      'out_of_memory',
      /cuda:1 needs 16\.00 GB \(weights 13\.50 GB, KV 2\.00 GB, .*15\.90 GB of its 24\.00 GB are free.* take --weights int8 or int4, /,
    ),
  );
  // Nobody is told to take what he has.
  assert.throws(
    () => {
      const free = { freeBytes: 15.9e9, totalBytes: 24e9 };
      refuseTooLittle('cuda:1', free, { ...asked, smaller: [] });
    },
    isRefusal('out_of_memory', /lower --max-seq-len or --max-batch-size, or take more ranks$/),
  );
  const limits = {
    tp: 1,
    weights: 'fp32',
    maxSeqLen: 64,
    maxBatchSize: 1,
    maxStepRows: 64,
  } as const;
  const connecting = withHostMemoryDevices(
    embeddedModelPath(),
    'webgpu',
    { ...limits, memoryLimit: 1e6 },
    () => Promise.resolve(),
  );
  await assert.rejects(connecting, isRefusal('out_of_memory', /needs .* are free/));
});

void test('cuBLAS is told to keep little memory, but where the user has said something', () => {
  const silent: NodeJS.ProcessEnv = {};
  limitCublas(silent);
  assert.deepEqual(silent, { CUBLAS_WORKSPACE_CONFIG: ':16:8' });
  const said = { CUBLAS_WORKSPACE_CONFIG: ':4096:2' };
  limitCublas(said);
  assert.deepEqual(said, { CUBLAS_WORKSPACE_CONFIG: ':4096:2' });
});

void test('each device has the weights that it has kernels for, and exactness is for the CPU', () => {
  const tiny = openCheckpoint(embeddedModelPath());
  const limits = { maxSeqLen: 64, maxBatchSize: 2, maxStepRows: 64, exact: false } as const;
  const plan = (device: string, weights: 'auto' | 'fp16' | 'int8' | 'fp32', exact = false) =>
    planGroup(tiny, 1, { ...limits, device, weights, exact });
  assert.throws(() => plan('cpu', 'fp16'), isRefusal('bad_usage', /--weights fp16: cpu takes/));
  const refused = isRefusal('bad_usage', /--weights int8: webgpu takes fp32, fp16, int4$/);
  assert.throws(() => plan('webgpu', 'int8'), refused);
  assert.throws(() => plan('cuda', 'fp32', true), isRefusal('bad_usage', /--exact: cuda/));
  assert.equal(plan('cuda:1', 'auto').weights, 'fp32');
  // Keys and values have 16 bits on CUDA.
  assert.equal(2 * plan('cuda', 'fp32').ranks[0]!.kvBytes, plan('cpu', 'fp32').ranks[0]!.kvBytes);
});

void test("CUDA's 4 bits have blocks of 32, at every tp, and 16 bits where they do not fit", () => {
  for (const tp of [1, 2, 4, 8]) {
    const { variants, head } = weightForms(llama2Shapes['70b'], tp, 'int4', false, 'cuda');
    const [{ qkv, o, gateUp, down }] = variants as [(typeof variants)[number]];
    for (const form of [qkv, o, gateUp, down]) {
      assert.deepEqual(form, { kind: 'int4', block: 32, isCentred: true });
    }
    assert.deepEqual(head, { kind: 'fp16' });
  }
  const [bytes] = weightForms(llama2Shapes['70b'], 8, 'int8', false, 'cuda').variants;
  assert.deepEqual(bytes!.down, { kind: 'int8Blocks', block: 32 });
  const { config } = openCheckpoint(embeddedModelPath());
  // Its network's 352 columns are 11 blocks of 32, and no multiple of 64.
  const [tiny] = weightForms(config, 1, 'int4', false, 'cuda').variants;
  const kinds = [tiny!.qkv, tiny!.o, tiny!.gateUp, tiny!.down].map(({ kind }) => kind);
  assert.deepEqual(kinds, ['int4', 'fp16', 'fp16', 'fp16']);
  const [small] = weightForms(config, 1, 'int4', false, 'webgpu').variants;
  assert.equal(small!.o.kind, 'fp32', 'heads of 16 are no blocks of 32');
});
