/** A device whose memory ONNX Runtime's IoBinding reaches: weights, KV and activations stay in it. */
import { sliceBytes } from '../model/checkpoint.js';
import { nameOfDevice, type DeviceKind, type DeviceName } from '../model/device-name.js';
import { kvBytes, listSlices, slicesOf } from '../model/plan.js';
import {
  formBytes,
  graphBytes,
  modesOfDevice,
  weightBytes,
  type WeightsMode,
} from '../model/weights.js';
import { CaravanError } from '../proto/errors.js';
import type { LoadProgress } from '../proto/gen/cluster.js';
import type { AllReduce } from './all-reduce.js';
import { Capturing, type Capturer } from './device-launch.js';
import type { DirectMemory, StreamSignals } from './direct-memory.js';
import { mostAttentionRows } from './attention-probe.js';
import type {
  Device,
  DeviceMemory,
  GroupLimits,
  LoadedShard,
  LoadTerms,
  OpenPass,
} from './device.js';
import { DeviceKv } from './device-kv.js';
import { DevicePass } from './device-pass.js';
import { Made } from './device-runs.js';
import { DeviceShard, deviceShape, type MatrixSource } from './device-shard.js';
import { DeviceWorkspace } from './device-workspace.js';
import { HalfNarrower } from './half-widener.js';
import { elementType, type Ort } from './ort.js';
import { CudaRuntime } from './ort-cuda.js';
import { OrtDevice } from './ort-device.js';
import { providerOf } from './ort-provider.js';
import { limitCublas } from './quick-products.js';
import type { StreamExchange } from './stream-exchange.js';
import type { WeightsOrigin } from './weight-cache.js';
import { WeightLoader } from './weight-loader.js';

export class BoundDevice implements Device {
  readonly name: string;
  readonly kind: DeviceKind;
  readonly #ort: Ort;
  readonly #device: OrtDevice;
  readonly #cuda: CudaRuntime | null;
  readonly #directMemory: DirectMemory | null;
  readonly #signals: StreamSignals | null;
  readonly #memoryLimit: number | null;
  readonly #attentionRows: number | null;

  /**
   * @param kind whose graphs are computed: that of the device, but for tests, which compute a GPU's in host memory.
   * @param memoryLimit bytes that may be taken of the device's memory; null for all.
   * @param attentionRows most rows of a slot that a run of attention takes; found out if it is null.
   * @param directMemory, capturer, signals in place of CUDA's, for tests.
   * @param captures whether steps that come again are given to the device as one.
   * @throws CaravanError `bad_usage` when the device is not there, saying how to mend it.
   */
  constructor(
    ort: Ort,
    name: DeviceName,
    {
      kind = name.kind,
      memoryLimit = null,
      attentionRows = null,
      directMemory = null,
      capturer = null,
      signals = null,
      captures = true,
    }: {
      kind?: DeviceKind;
      memoryLimit?: number | null;
      attentionRows?: number | null;
      directMemory?: DirectMemory | null;
      capturer?: Capturer | null;
      signals?: StreamSignals | null;
      captures?: boolean;
    } = {},
  ) {
    this.name = nameOfDevice(name);
    this.kind = kind;
    this.#ort = ort;
    this.#memoryLimit = memoryLimit;
    this.#attentionRows = attentionRows;
    if (name.kind === 'cuda') limitCublas();
    this.#cuda = name.kind === 'cuda' ? CudaRuntime.open(name.index) : null;
    const provider = providerOf(name, { memoryLimit, stream: this.#cuda?.stream ?? null });
    this.#directMemory = directMemory ?? this.#cuda;
    this.#signals = signals ?? this.#cuda?.signals ?? null;
    const capturing = captures
      ? new Capturing(capturer ?? this.#cuda, `${this.name} has no graphs`)
      : new Capturing(null, 'they are switched off');
    this.#device = new OrtDevice(ort, provider, this.#cuda, capturing);
  }

  async load(
    origin: WeightsOrigin,
    terms: LoadTerms,
    onProgress: (progress: LoadProgress) => void,
    signal: AbortSignal,
  ): Promise<LoadedShard> {
    const { checkpoint, plan } = origin;
    const slices = listSlices(slicesOf(checkpoint.config, plan));
    const bytesTotal = slices.reduce((sum, slice) => sum + sliceBytes(checkpoint, slice), 0);
    const report = (bytesRead: number): void => {
      onProgress({ bytesRead, bytesTotal, isCached: false });
    };
    const source = new WeightLoader(
      this.#ort,
      checkpoint,
      { kind: 'checkpoint', recorder: null },
      report,
      signal,
    );
    const shard = await this.loadFrom(source, origin, terms);
    report(bytesTotal);
    return shard;
  }

  /** What is free of the device's memory, as far as it can be known and may be used. */
  memory(): DeviceMemory | null {
    const limit = this.#memoryLimit;
    const whole = this.#cuda?.memory() ?? null;
    if (limit === null) return whole;
    if (whole === null) return { freeBytes: limit, totalBytes: limit };
    return { freeBytes: Math.min(limit, whole.freeBytes), totalBytes: whole.totalBytes };
  }

  readablePeers(): readonly number[] | null {
    return this.#cuda?.readablePeers() ?? null;
  }

  /** As `load`, of weights from anywhere. @param source is closed at the end. */
  async loadFrom(
    source: MatrixSource,
    { checkpoint: { config }, plan, mode, forms }: WeightsOrigin,
    limits: GroupLimits,
  ): Promise<LoadedShard> {
    const shape = deviceShape(this.kind, this.#device.provider, config, plan, forms);
    const kvElementBytes = shape.attention === elementType.float16 ? 2 : 4;
    const kvOf = ({ maxSeqLen, maxBatchSize }: GroupLimits): number =>
      kvBytes(config, plan, maxSeqLen, maxBatchSize, kvElementBytes);
    // A head with the embedding's weights lies in the same place.
    const tiedBytes = config.isHeadTied
      ? formBytes(forms.head, plan.vocab.count, config.hiddenSize)
      : 0;
    const memory = this.memory();
    if (memory !== null) {
      refuseTooLittle(this.name, memory, {
        weightBytes: weightBytes(config, plan, forms) - tiedBytes,
        kvBytes: kvOf(limits),
        graphBytes: graphBytes(config, forms, this.kind),
        smaller: smallerModes(this.kind, mode),
      });
    }
    const device = this.#device;
    const isUnknown = this.#attentionRows === null && this.kind === 'webgpu';
    let attentionRows: number;
    let shard: DeviceShard;
    try {
      attentionRows = isUnknown
        ? mostAttentionRows(device, shape)
        : (this.#attentionRows ?? Infinity);
      const halves = new HalfNarrower(this.#ort);
      shard = await DeviceShard.load(device, shape, forms, source, halves);
    } catch (error) {
      throw withoutHalves(this.name, error);
    }
    return {
      config,
      plan,
      weightBytes: shard.weightBytes,
      bytesRead: shard.bytesRead,
      cachedBytes: 0,
      cacheFault: '',
      directMemory: this.#directMemory,
      captureFault: () => (this.kind === 'cuda' ? (device.capturing.fault ?? '') : ''),
      kvBytes: kvOf,
      openPass: (own, allReduce) =>
        openPass(device, shard, own, allReduce, attentionRows, this.#cuda, this.#signals),
      release: () => {
        shard.release();
      },
    };
  }
}

async function openPass(
  device: OrtDevice,
  shard: DeviceShard,
  { maxSeqLen, maxBatchSize, maxStepRows }: GroupLimits,
  allReduce: AllReduce,
  attentionRows: number,
  cuda: CudaRuntime | null,
  signals: StreamSignals | null,
): Promise<OpenPass> {
  const { config, plan, attention } = shard.shape;
  // Copies of pinned memory need no second copy on their way.
  const isStaged = cuda !== null && allReduce.direct === null;
  const releases = isStaged ? allReduce.partials.flat().map((array) => cuda.pin(array)) : [];
  const release = (): void => {
    try {
      device.synchronize();
    } catch {
      // A device that is lost does nothing more; what is on the host is to be freed.
    }
    // What was made last goes first.
    for (const undo of releases.splice(0).reverse()) undo();
  };
  try {
    const kv = new DeviceKv(device, config, plan, attention, maxSeqLen, maxBatchSize);
    releases.push(() => {
      kv.release();
    });
    const made = new Made(device);
    releases.push(() => {
      made.release();
    });
    const workspace = new DeviceWorkspace(
      device,
      made,
      shard,
      kv,
      maxStepRows,
      allReduce,
      attentionRows,
    );
    releases.push(() => {
      workspace.release();
    });
    const stream = signals === null ? null : attachedTo(allReduce, signals);
    if (stream !== null) {
      releases.push(() => {
        stream.release();
      });
    }
    const pass = new DevicePass(device, shard, kv, workspace, allReduce, stream);
    await pass.warmUp(() => new Promise((resolve) => setImmediate(resolve)));
    return { pass, release };
  } catch (error) {
    release();
    throw error;
  }
}

/** A device that lacks 16-bit floats says so when the first of them comes. */
function withoutHalves(device: string, error: unknown): unknown {
  if (!(error instanceof CaravanError) || !/f16|float16/.test(error.message)) return error;
  return new CaravanError(
    'bad_usage',
    `${device} has no 16-bit floats: take --weights fp32 or int4`,
    { cause: error },
  );
}

/** Where a device cannot reach shared memory the host exchanges. */
function attachedTo(allReduce: AllReduce, signals: StreamSignals): StreamExchange | null {
  try {
    return allReduce.attach(signals);
  } catch {
    return null;
  }
}

/** From the most bits on. */
function smallerModes(kind: DeviceKind, mode: WeightsMode): readonly WeightsMode[] {
  const modes = modesOfDevice[kind];
  return modes.slice(modes.indexOf(mode) + 1);
}

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`;

/**
 * Refuses a shard that a device has no room for.
 *
 * @throws CaravanError `out_of_memory` saying what was asked, what is free, and what would help.
 */
export function refuseTooLittle(
  device: string,
  { freeBytes, totalBytes }: DeviceMemory,
  asked: {
    readonly weightBytes: number;
    readonly kvBytes: number;
    readonly graphBytes: number;
    /** Weights of fewer bits. */
    readonly smaller: readonly WeightsMode[];
  },
): void {
  const { weightBytes: weights, kvBytes: kv, graphBytes: graphs, smaller } = asked;
  const sum = weights + kv + graphs;
  if (sum <= freeBytes) return;
  const fewer = smaller.length === 0 ? '' : `take --weights ${smaller.join(' or ')}, `;
  throw new CaravanError(
    'out_of_memory',
    `${device} needs ${gigabytes(sum)} (weights ${gigabytes(weights)}, KV ${gigabytes(kv)}, graphs ` +
      `${gigabytes(graphs)}), ${gigabytes(freeBytes)} of its ${gigabytes(totalBytes)} are free: ` +
      `lower --max-seq-len or --max-batch-size, ${fewer}or take more ranks`,
  );
}
