/** Loads a shard: from the weight cache where it is there, else from the checkpoint, into the cache. */
import { sliceBytes } from '../model/checkpoint.js';
import { listSlices, slicesOf } from '../model/plan.js';
import type { LoadProgress, WeightCache as Terms } from '../proto/gen/cluster.js';
import type { Ort } from './ort.js';
import { Shard } from './shard.js';
import { WeightCache, type WeightsOrigin } from './weight-cache.js';
import { DamagedWeights, type WeightFileReader } from './weight-file.js';
import { WeightLoader } from './weight-loader.js';

export interface LoadedShard {
  readonly shard: Shard;
  /** Bytes of the weight cache that it lies in; 0 when it came from the checkpoint. */
  readonly cachedBytes: number;
  /** Why it was not kept for the next start; empty where it was, or need not be. */
  readonly cacheFault: string;
}

/**
 * @param terms of the weight cache; undefined leaves it alone.
 * @throws CaravanError `invalid_checkpoint`, `out_of_memory`, or `cancelled` when the signal aborts.
 */
export async function loadShard(
  ort: Ort,
  origin: WeightsOrigin,
  terms: Terms | undefined,
  onProgress: (progress: LoadProgress) => void,
  signal: AbortSignal,
): Promise<LoadedShard> {
  const cache = WeightCache.of(ort, origin, terms);
  const file = cache?.open() ?? null;
  if (file !== null) {
    try {
      const shard = await loadCached(ort, origin, file, onProgress, signal);
      return { shard, cachedBytes: file.byteCount, cacheFault: '' };
    } catch (error) {
      file.close();
      if (!(error instanceof DamagedWeights)) throw error;
      cache?.discard(error);
    }
  }
  const shard = await loadAnew(ort, origin, cache, onProgress, signal);
  const fault = cache?.fault ?? null;
  return { shard, cachedBytes: 0, cacheFault: fault === null ? '' : `weight cache: ${fault}` };
}

async function loadCached(
  ort: Ort,
  { checkpoint, plan, forms }: WeightsOrigin,
  file: WeightFileReader,
  onProgress: (progress: LoadProgress) => void,
  signal: AbortSignal,
): Promise<Shard> {
  const report = (bytesRead: number): void => {
    onProgress({ bytesRead, bytesTotal: file.byteCount, isCached: true });
  };
  const source = { kind: 'cache', file } as const;
  const loader = new WeightLoader(ort, checkpoint, source, report, signal);
  try {
    const shard = await Shard.load(checkpoint.config, plan, forms, loader, file);
    report(file.byteCount);
    return shard;
  } finally {
    loader.close();
  }
}

async function loadAnew(
  ort: Ort,
  { checkpoint, plan, forms }: WeightsOrigin,
  cache: WeightCache | null,
  onProgress: (progress: LoadProgress) => void,
  signal: AbortSignal,
): Promise<Shard> {
  const slices = listSlices(slicesOf(checkpoint.config, plan));
  const bytesTotal = slices.reduce((sum, slice) => sum + sliceBytes(checkpoint, slice), 0);
  const report = (bytesRead: number): void => {
    onProgress({ bytesRead, bytesTotal, isCached: false });
  };
  const recorder = (await cache?.record()) ?? null;
  const source = { kind: 'checkpoint', recorder } as const;
  const loader = new WeightLoader(ort, checkpoint, source, report, signal);
  try {
    const shard = await Shard.load(checkpoint.config, plan, forms, loader, null);
    await recorder?.finish();
    if (recorder !== null && cache?.fault === null) cache.settle();
    report(bytesTotal);
    return shard;
  } catch (error) {
    await recorder?.abandon();
    throw error;
  } finally {
    loader.close();
  }
}
