/** The CPU: weights as sessions' own, everything else in host memory that sessions compute in. */
import os from 'node:os';
import { kvBytes } from '../model/plan.js';
import { CaravanError } from '../proto/errors.js';
import { KvForm, type LoadProgress } from '../proto/gen/cluster.js';
import type { AllReduce } from './all-reduce.js';
import { ByteKvCache } from './byte-kv-cache.js';
import type { Device, GroupLimits, LoadedShard, LoadTerms, OpenPass } from './device.js';
import { HostPass } from './host-pass.js';
import { FloatKvCache, kvShape } from './kv-cache.js';
import { attentionGraph } from './graph.js';
import type { Ort, Session } from './ort.js';
import type { Shard } from './shard.js';
import { loadShard } from './shard-loading.js';
import type { WeightsOrigin } from './weight-cache.js';
import { Workspace } from './workspace.js';

export class HostDevice implements Device {
  readonly name = 'cpu';
  readonly kind = 'cpu';
  readonly #ort: Ort;

  constructor(ort: Ort) {
    this.#ort = ort;
  }

  readablePeers(): null {
    return null;
  }

  memory(): null {
    return null;
  }

  async load(
    origin: WeightsOrigin,
    { weightCache }: LoadTerms,
    onProgress: (progress: LoadProgress) => void,
    signal: AbortSignal,
  ): Promise<LoadedShard> {
    const loaded = await loadShard(this.#ort, origin, weightCache, onProgress, signal);
    return new HostShard(this.#ort, loaded.shard, loaded);
  }
}

/** A shard in host memory, whole: weights, and what computes with them. */
export class HostShard implements LoadedShard {
  readonly #ort: Ort;
  readonly #shard: Shard;
  #byteAttention: Session | null = null;
  readonly cachedBytes: number;
  readonly cacheFault: string;
  // Peers read a host's partials in shared memory.
  readonly directMemory = null;
  readonly captureFault = (): string => '';

  constructor(
    ort: Ort,
    shard: Shard,
    cache: { readonly cachedBytes: number; readonly cacheFault: string },
  ) {
    this.#ort = ort;
    this.#shard = shard;
    this.cachedBytes = cache.cachedBytes;
    this.cacheFault = cache.cacheFault;
  }

  get config() {
    return this.#shard.config;
  }

  get plan() {
    return this.#shard.plan;
  }

  get weightBytes() {
    return this.#shard.weightBytes;
  }

  get bytesRead() {
    return this.#shard.bytesRead;
  }

  kvBytes({ maxSeqLen, maxBatchSize, kv }: GroupLimits): number {
    const elementBytes = kv === KvForm.KV_FORM_INT8 ? 1 : 4;
    return kvBytes(this.config, this.plan, maxSeqLen, maxBatchSize, elementBytes);
  }

  openPass(limits: GroupLimits, allReduce: AllReduce): Promise<OpenPass> {
    refuseTooLittleMemory(this.kvBytes(limits));
    const { config, plan } = this;
    const { maxSeqLen, maxBatchSize, maxStepRows } = limits;
    const shape = kvShape(config, plan, maxSeqLen, maxBatchSize);
    const isInBytes = limits.kv === KvForm.KV_FORM_INT8;
    const kv = isInBytes ? new ByteKvCache(this.#ort, shape) : new FloatKvCache(this.#ort, shape);
    const attention = isInBytes ? this.#attentionInBytes() : this.#shard.attention;
    const { partials } = allReduce;
    const workspace = new Workspace(this.#ort, config, plan, maxStepRows, maxSeqLen, partials);
    return Promise.resolve({
      pass: new HostPass(this.#shard, attention, kv, workspace, allReduce),
      release: () => {
        workspace.release();
        kv.release();
      },
    });
  }

  release(): void {
    this.#byteAttention?.release();
    this.#shard.release();
  }

  #attentionInBytes(): Session {
    this.#byteAttention ??= this.#ort.createSession(attentionGraph(this, 'int8'));
    return this.#byteAttention;
  }
}

/** The KV cache is committed as it fills: it is checked here, where it can still be said in one line. */
function refuseTooLittleMemory(byteCount: number): void {
  const total = os.totalmem();
  if (byteCount > total) {
    throw new CaravanError(
      'out_of_memory',
      `the KV cache needs ${byteCount} bytes, this machine has ${total}: lower max_seq_len or max_batch_size`,
    );
  }
}
