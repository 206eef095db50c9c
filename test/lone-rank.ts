/**
 * Loads what one rank of a group would, in this process alone, and prints what that took, as JSON:
 * `node lone-rank.js MODEL MODE TP RANK`. Peaks are those of the process's resident memory from the load on.
 */
import fs from 'node:fs';
import { openCheckpoint, rankBytes } from '../model/checkpoint.js';
import { planRanks, slicesOf } from '../model/plan.js';
import { weightForms, type WeightsMode } from '../model/weights.js';
import { Ort } from '../worker/ort.js';
import { holdLargeBlocks } from '../worker/ort-memory.js';
import { loadShard } from '../worker/shard-loading.js';

export interface LoneRank {
  /** Final weights, as arithmetic says of the forms that were settled on. */
  readonly weightBytes: number;
  /** What the rank must read: headers and slices. */
  readonly shareBytes: number;
  readonly peakBytes: number;
  /** Asked of files, /proc/self/io. */
  readonly requestedBytes: number;
}

function figure(file: 'status' | 'io', field: string): number {
  const text = fs.readFileSync(`/proc/self/${file}`, 'utf8');
  const [, value, unit] = new RegExp(`^${field}:\\s+(\\d+)( kB)?`, 'm').exec(text) ?? [];
  return Number(value) * (unit === undefined ? 1 : 1024);
}

const [model, modeName, tpText, rankText] = process.argv.slice(2);
const mode = modeName as WeightsMode;
const [tp, rank] = [Number(tpText), Number(rankText)];
const ort = new Ort(1);
holdLargeBlocks('loading');
// The peak starts anew from here.
fs.writeFileSync('/proc/self/clear_refs', '5');
const before = { rss: figure('status', 'VmRSS'), rchar: figure('io', 'rchar') };
const checkpoint = openCheckpoint(model!);
const { config } = checkpoint;
const forms = weightForms(config, tp, mode, false);
const plan = planRanks(config, tp, forms.ffnGrid)[rank]!;
const origin = { checkpoint, plan, mode, forms };
const never = new AbortController().signal;
const { shard } = await loadShard(ort, origin, undefined, () => undefined, never);
const found: LoneRank = {
  weightBytes: shard.weightBytes,
  shareBytes: rankBytes(checkpoint, slicesOf(config, plan)),
  peakBytes: figure('status', 'VmHWM') - before.rss,
  requestedBytes: figure('io', 'rchar') - before.rchar,
};
shard.release();
process.stdout.write(JSON.stringify(found));
