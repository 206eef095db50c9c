/**
 * The real sizes of Llama 2 in Meta's layout, as files of holes: the plan, its bytes, and what it takes to inspect them
 * and to read one rank's slices of a layer. CARAVAN_LONG=1 tries every tp, and inspects through the command line.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openCheckpoint, rankBytes, sliceBytes } from '../model/checkpoint.js';
import {
  kvBytes,
  listSlices,
  planRanks,
  slicesOf,
  type Range,
  type TensorSlice,
} from '../model/plan.js';
import { SliceReader } from '../model/slice-reader.js';
import { shapeOf } from '../model/stored-tensor.js';
import { runCliJson } from './cli.js';
import { writeSparseMeta, type MetaParams } from './meta-checkpoint.js';
import { endedChildrenMs, processorMs } from './processor-time.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const withoutProc = fs.existsSync('/proc/self/io') ? false : 'there is no /proc here';
/** Processor time. */
const INSPECT_WITHIN_MS = 10_000;
const MIB = 1 << 20;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-shapes-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

interface Shape {
  readonly name: string;
  readonly mp: number;
  readonly params: MetaParams;
  readonly ffnSize: number;
  /** float16, all ranks. */
  readonly kvKibAToken: number;
  readonly parameterCount: number;
  readonly tps: readonly number[];
}

const common = { norm_eps: 1e-5, vocab_size: 32_000 };
const shapes: readonly Shape[] = [
  {
    name: '7B',
    mp: 1,
    params: { dim: 4096, n_layers: 32, n_heads: 32, multiple_of: 256, ...common },
    ffnSize: 11_008,
    kvKibAToken: 512,
    parameterCount: 6_738_415_616,
    tps: [1, 2, 3, 4, 8],
  },
  {
    name: '13B',
    mp: 2,
    params: { dim: 5120, n_layers: 40, n_heads: 40, multiple_of: 256, ...common },
    ffnSize: 13_824,
    kvKibAToken: 800,
    parameterCount: 13_015_864_320,
    tps: [1, 2, 3, 4, 8],
  },
  {
    name: '34B',
    mp: 4,
    params: {
      ...{ dim: 8192, n_layers: 48, n_heads: 64, n_kv_heads: 8, multiple_of: 256 },
      ...{ ffn_dim_multiplier: 1.0, ...common },
    },
    ffnSize: 22_016,
    kvKibAToken: 192,
    parameterCount: 33_743_970_304,
    tps: [1, 2, 3, 4, 8],
  },
  {
    name: '70B',
    mp: 8,
    params: {
      ...{ dim: 8192, n_layers: 80, n_heads: 64, n_kv_heads: 8, multiple_of: 4096 },
      ...{ ffn_dim_multiplier: 1.3, ...common },
    },
    ffnSize: 28_672,
    kvKibAToken: 320,
    parameterCount: 68_976_648_192,
    tps: [1, 2, 3, 4, 5, 6, 8],
  },
];

/** The folder of a shape; its files are written when it is first asked for. */
function sparse({ name, mp, params, ffnSize }: Shape): string {
  const folder = path.join(scratch, name);
  if (fs.existsSync(folder)) return folder;
  writeSparseMeta(
    folder,
    params,
    {
      ...{ hiddenSize: params.dim, ffnSize, layerCount: params.n_layers },
      ...{ headCount: params.n_heads, kvHeadCount: params.n_kv_heads ?? params.n_heads },
      ...{ headSize: params.dim / params.n_heads, vocabSize: params.vocab_size },
      ...{ maxPositions: 4096, normEps: params.norm_eps, ropeTheta: 10_000, isHeadTied: false },
    },
    mp,
  );
  return folder;
}

/** Elements of a tensor that the slices of all ranks hold, counted with how often each is held. */
function assertTotalAndDisjoint(slices: readonly TensorSlice[], isRepeated: boolean): void {
  const { shape } = slices[0]!;
  const [rows, columns] = shape.length === 1 ? [1, shape[0]!] : (shape as [number, number]);
  const isByColumns = slices.some((slice) => slice.columns.count < columns);
  const own = slices.map((slice): Range => (isByColumns ? slice.columns : slice.rows));
  const sorted = [...new Map(own.map((range) => [`${range.start}`, range])).values()];
  if (!isRepeated) assert.equal(sorted.length, slices.length, slices[0]!.tensor);
  sorted.sort((a, b) => a.start - b.start);
  let end = 0;
  for (const { start, count } of sorted) {
    assert.equal(start, end, slices[0]!.tensor);
    assert.ok(count > 0);
    end = start + count;
  }
  assert.equal(end, isByColumns ? columns : rows, slices[0]!.tensor);
}

for (const shape of shapes) {
  void test(`${shape.name} in ${shape.mp} files: sizes and plans at tp ${shape.tps.join()}`, (t) => {
    const folder = sparse(shape);
    const startMs = processorMs();
    const checkpoint = openCheckpoint(folder);
    const { config } = checkpoint;
    assert.equal(config.ffnSize, shape.ffnSize);
    const stored = [...checkpoint.tensors.values()].map((source) =>
      shapeOf(source).reduce((a, b) => a * b, 1),
    );
    assert.equal(
      stored.reduce((a, b) => a + b, 0),
      shape.parameterCount,
    );
    for (const tp of shape.tps) {
      const plans = planRanks(config, tp);
      const ranks = plans.map((plan) => listSlices(slicesOf(config, plan)));
      const isKvRepeated = tp > config.kvHeadCount;
      ranks[0]!.forEach((slice, i) => {
        const isVector = slice.shape.length === 1;
        if (!isVector)
          assertTotalAndDisjoint(
            ranks.map((list) => list[i]!),
            isKvRepeated,
          );
      });
      // Two bytes an element; norms are on every rank.
      const norms = (2 * config.layerCount + 1) * config.hiddenSize;
      const bytes = plans.map((plan) => rankBytes(checkpoint, slicesOf(config, plan)));
      const slices = bytes.reduce((a, b) => a + b, 0) - tp * checkpoint.headerBytes;
      assert.equal(slices, 2 * (shape.parameterCount + (tp - 1) * norms));
      const kv = plans.reduce((sum, plan) => sum + kvBytes(config, plan, 1, 1), 0);
      assert.equal(kv, 2 * 1024 * shape.kvKibAToken, 'float32 takes twice float16');
    }
    const tookMs = processorMs() - startMs;
    t.diagnostic(
      `${(tookMs / 1000).toFixed(1)} s of processor time, ${checkpoint.headerBytes} bytes of headers`,
    );
    assert.ok(tookMs < INSPECT_WITHIN_MS, `${tookMs} ms`);
  });
}

for (const shape of isLong ? shapes : shapes.slice(-1)) {
  void test(`inspect answers in seconds for ${shape.name}`, { skip: withoutProc }, async (t) => {
    const folder = sparse(shape);
    const startMs = endedChildrenMs();
    const args = ['inspect', '--model', folder, '--tp', '8'];
    const report = (await runCliJson(args)) as { layout: string; parameterCount: number };
    const tookMs = endedChildrenMs() - startMs;
    t.diagnostic(`${(tookMs / 1000).toFixed(1)} s of processor time`);
    assert.ok(tookMs > 0);
    assert.equal(report.layout, 'meta');
    assert.equal(report.parameterCount, shape.parameterCount);
    assert.ok(tookMs < INSPECT_WITHIN_MS, `${tookMs} ms`);
  });
}

/** A figure of this process; those in kB are given in bytes. */
function figure(file: 'status' | 'io', field: string): number {
  const text = fs.readFileSync(`/proc/self/${file}`, 'utf8');
  const [, value, unit] = new RegExp(`^${field}:\\s+(\\d+)( kB)?`, 'm').exec(text) ?? [];
  assert.ok(value !== undefined, field);
  return Number(value) * (unit === undefined ? 1 : 1024);
}

for (const tp of isLong ? [1, 2, 3, 4, 5, 6, 8] : [4, 8]) {
  void test(`a rank’s slices of one layer of 70B at tp ${tp}`, { skip: withoutProc }, async (t) => {
    const checkpoint = openCheckpoint(sparse(shapes.at(-1)!));
    // The last rank: with tp 3 or 6 its slices begin within a file.
    const plan = planRanks(checkpoint.config, tp)[tp - 1]!;
    const slices = Object.values(slicesOf(checkpoint.config, plan).layers[40]!);
    const share = slices.reduce((sum, slice) => sum + sliceBytes(checkpoint, slice), 0);
    const largest = Math.max(...slices.map(({ rows, columns }) => rows.count * columns.count));
    const target = new Float32Array(largest).fill(1);
    // The peak starts anew from here.
    fs.writeFileSync('/proc/self/clear_refs', '5');
    const [rss, read] = [figure('status', 'VmRSS'), figure('io', 'rchar')];
    const reader = new SliceReader(checkpoint);
    for (const slice of slices) {
      const count = slice.rows.count * slice.columns.count;
      await reader.read(slice, target, 0);
      // Holes are zeros.
      assert.ok(target.subarray(0, count).every((value) => value === 0));
      target.fill(1);
    }
    reader.close();
    const readBytes = figure('io', 'rchar') - read;
    const growth = figure('status', 'VmHWM') - rss;
    t.diagnostic(
      `share ${(share / MIB).toFixed(1)} MiB, read ${(readBytes / share).toFixed(4)} of it, ` +
        `memory grew by ${(growth / MIB).toFixed(1)} MiB beyond one slice's floats`,
    );
    assert.equal(reader.bytesRead, share);
    assert.ok(readBytes <= 1.1 * share, `${readBytes} of ${share}`);
    assert.ok(growth < 64 * MIB, `${growth / MIB} MiB`);
  });
}
