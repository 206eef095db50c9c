/** `caravan inspect`: what a checkpoint is, and what each rank would hold of it. */
import os from 'node:os';
import type { Command } from 'commander';
import { openCheckpoint, rankBytes, resolveModelPath, sliceBytes } from '../../model/checkpoint.js';
import { legalTps, listSlices, slicesOf } from '../../model/plan.js';
import type { Checkpoint } from '../../model/checkpoint.js';
import { verifyChecklist } from '../checklist.js';
import { devicesOfRanks, probeDevice, type DeviceReport } from '../devices.js';
import {
  DEFAULT_MAX_STEP_ROWS,
  parameterCount,
  fullestBytes,
  planGroup,
  type PlannedGroup,
} from '../group-spec.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('inspect')
    .description('Shows what a checkpoint is, the plan of every rank, and whether it fits.')
    .option('--slices', 'list every tensor slice of every rank')
    .option('--verify', "hold Meta's files to checklist.chk first");
  const settings = declareSettings(command, [
    'model',
    'tp',
    'device',
    'weights',
    'exact',
    'kv',
    'maxSeqLen',
    'maxBatchSize',
    'json',
  ]);
  command.action(async () => {
    const s = settings();
    const { json } = s;
    const { slices: showsSlices, verify } = command.opts<{ slices?: true; verify?: true }>();
    const path = resolveModelPath(s.model);
    // Before anything is read that may be damaged.
    const verified =
      verify === true
        ? await verifyChecklist(path, process.stderr.isTTY ? process.stderr : null)
        : null;
    const checkpoint = openCheckpoint(path);
    const maxStepRows = DEFAULT_MAX_STEP_ROWS;
    const group = planGroup(checkpoint, s.tp, { ...s, maxStepRows });
    const devices = await Promise.all(devicesOfRanks(s.device, s.tp).map(probeDevice));
    const report = { ...describe(checkpoint, group, devices), verified };
    if (json) process.stdout.write(`${JSON.stringify(report)}\n`);
    else process.stdout.write(toText(report, showsSlices === true));
  });
}

function describe(checkpoint: Checkpoint, group: PlannedGroup, devices: readonly DeviceReport[]) {
  const { spec, weights, ranks, neededBytes } = group;
  const { config } = checkpoint;
  const machineBytes = os.totalmem();
  const stored = [...checkpoint.tensors.values()];
  return {
    path: checkpoint.path,
    layout: checkpoint.layout,
    digest: checkpoint.digest,
    config,
    formats: [...new Set(stored.flatMap(({ pieces }) => pieces.map((p) => p.format)))].sort(),
    parameterCount: parameterCount(checkpoint),
    weights,
    tp: ranks.length,
    legalTp: { least: 1, most: legalTps(config).length },
    maxSeqLen: spec.maxSeqLen,
    maxBatchSize: spec.maxBatchSize,
    ranks: ranks.map((rank) => describeRank(checkpoint, rank)),
    // All ranks on this machine: what `caravan up` would need.
    neededBytes,
    machineBytes,
    // What ranks compute on, and what is free there.
    devices,
    fits: fitsDevices(group, devices) ?? neededBytes <= machineBytes,
  };
}

/** Whether every rank fits what is free on every device; null where that is not known. */
function fitsDevices(group: PlannedGroup, devices: readonly DeviceReport[]): boolean | null {
  const free = devices.flatMap(({ memory }) => memory?.freeBytes ?? []);
  if (free.length === 0) return null;
  return fullestBytes(group) <= Math.min(...free);
}

/** `verified`: files that are as their checklist says; null if that was not asked for. */
type Report = ReturnType<typeof describe> & { readonly verified: readonly string[] | null };

function describeRank(
  checkpoint: Checkpoint,
  { plan, weightBytes, kvBytes, graphBytes }: PlannedGroup['ranks'][number],
) {
  const slices = slicesOf(checkpoint.config, plan);
  return {
    rank: plan.rank,
    queryHeads: plan.queryHeads,
    kvHeads: plan.kvHeads,
    ffn: plan.ffn,
    vocab: plan.vocab,
    /** What the rank reads of the checkpoint: headers and slices. Samples by which it chooses blocks come to it. */
    readBytes: rankBytes(checkpoint, slices),
    weightBytes,
    kvBytes,
    /** What a GPU's graphs take beside them. */
    graphBytes,
    slices: listSlices(slices).map((slice) => ({
      tensor: slice.tensor,
      rows: slice.rows,
      columns: slice.columns,
      bytes: sliceBytes(checkpoint, slice),
    })),
  };
}

const span = ({ start, count }: { start: number; count: number }): string =>
  count === 0 ? 'none' : `${start}–${start + count - 1}`;

const gigabytes = (bytes: number): string =>
  bytes < 1e9 ? `${(bytes / 1e6).toFixed(1)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;

function toText(report: Report, showsSlices: boolean): string {
  const { config } = report;
  const lines = [
    `${report.path} (${report.layout}, ${report.formats.join(', ')})`,
    `  ${(report.parameterCount / 1e6).toFixed(1)} M parameters: ` +
      `hidden ${config.hiddenSize}, ${config.layerCount} layers, ${config.headCount} query heads, ` +
      `${config.kvHeadCount} KV heads of size ${config.headSize}, FFN ${config.ffnSize}, ` +
      `vocabulary ${config.vocabSize}, context ${config.maxPositions}`,
    `  tp ${report.tp} (legal: 1 to ${report.legalTp.most}), weights ${report.weights}, ` +
      `${report.maxBatchSize} slots of ${report.maxSeqLen} positions`,
  ];
  if (report.verified !== null) {
    lines.push(`  as checklist.chk says: ${report.verified.join(', ')}`);
  }
  for (const rank of report.ranks) {
    lines.push(
      `  rank ${rank.rank}: query heads ${span(rank.queryHeads)}, KV heads ${span(rank.kvHeads)}, ` +
        `FFN ${span(rank.ffn)}, vocabulary ${span(rank.vocab)}; reads ${gigabytes(rank.readBytes)}, ` +
        `weights ${gigabytes(rank.weightBytes)}, KV ${gigabytes(rank.kvBytes)}`,
    );
    if (!showsSlices) continue;
    for (const { tensor, rows, columns, bytes } of rank.slices) {
      lines.push(`    ${tensor} [${span(rows)}, ${span(columns)}] ${bytes} bytes`);
    }
  }
  for (const { device, fault, memory } of report.devices) {
    const free =
      memory === null
        ? ''
        : `, ${gigabytes(memory.freeBytes)} of ${gigabytes(memory.totalBytes)} free`;
    lines.push(
      `  device ${fault === null ? `${device}: a rank starts${free}` : `missing: ${fault}`}`,
    );
  }
  lines.push(
    `  all ranks on this machine: ${gigabytes(report.neededBytes)} of ${gigabytes(report.machineBytes)}: ` +
      (report.fits ? 'fits' : 'does not fit; lower --max-seq-len or --max-batch-size'),
  );
  return `${lines.join('\n')}\n`;
}
