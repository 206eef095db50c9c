/**
 * What a rank reads and holds: its share, and no more. CARAVAN_LONG=1 measures it on a checkpoint above 1 GB instead
 * of one of 0.6 GB.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { RankEngine, type SequenceSink, type SequenceSpec } from '../coordinator/engine.js';
import { Ranks } from '../coordinator/ranks.js';
import type { LlamaConfig } from '../model/config.js';
import { CaravanError } from '../proto/errors.js';
import { SampledRows } from '../proto/gen/cluster.js';
import { runCliJson } from './cli.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { largeConfig } from './large-config.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const skip = fs.existsSync('/proc/self/io') ? false : 'there is no /proc here';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-memory-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

/** A figure of /proc/PID/FILE; those in kB are given in bytes. */
function procFigure(pid: number, file: 'status' | 'io', field: string): number {
  const text = fs.readFileSync(`/proc/${pid}/${file}`, 'utf8');
  const [, figure, unit] = new RegExp(`^${field}:\\s+(\\d+)( kB)?`, 'm').exec(text) ?? [];
  assert.ok(figure !== undefined, `${field} in /proc/${pid}/${file}`);
  return Number(figure) * (unit === undefined ? 1 : 1024);
}

const rssOf = (pid: number): number => procFigure(pid, 'status', 'VmRSS');

interface Inspection {
  readonly ranks: readonly { readonly readBytes: number; readonly kvBytes: number }[];
}

interface RankFigures {
  readonly heldBytes: number;
  readonly readBytes: number;
  readonly kvBytes: number;
}

const LIMITS = { maxSeqLen: 512, maxBatchSize: 4, maxStepRows: 64 };

/** Loads a checkpoint into fresh processes, runs a prompt, and looks at what each of them took for it. */
async function loadAndLook(folder: string, tp: number): Promise<RankFigures[]> {
  const pool = new RankPool();
  try {
    const processes = await pool.start(tp);
    const idle = processes.map(({ process: { pid } }) => ({
      rss: rssOf(pid!),
      read: procFigure(pid!, 'io', 'rchar'),
    }));
    return await pool.withGroup(folder, { tp, ...LIMITS }, async ({ ranks }) => {
      const readBytes = processes.map(
        ({ process: { pid } }, i) => procFigure(pid!, 'io', 'rchar') - idle[i]!.read,
      );
      await ranks.forward(promptStep(1, 0, 32));
      return processes.map(({ process: { pid } }, i) => ({
        heldBytes: rssOf(pid!) - idle[i]!.rss,
        readBytes: readBytes[i]!,
        kvBytes: ranks.loaded[i]!.kvBytes,
      }));
    });
  } finally {
    await pool.stop();
  }
}

const promptStep = (number: number, slot: number, count: number, isNew = true) => ({
  number,
  joins: isNew ? [{ slot, temperature: 0 }] : [],
  decodeSlots: [],
  decodeTokens: [],
  chunks: [
    {
      slot,
      tokens: Array.from({ length: count }, (_, i) => i),
      sampledRows: SampledRows.SAMPLED_ROWS_LAST,
      targets: [],
    },
  ],
  topK: 1,
});

const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(1)} MB`;

void test('a rank of four reads and holds its quarter', { skip, timeout: 600_000 }, async (t) => {
  const folder = path.join(scratch, 'large');
  const byteCount = writeRandomCheckpoint(folder, {
    config: largeConfig(isLong ? 1 : 0.6),
    seed: 1,
    format: 'F32',
    shardCount: 2,
  });
  assert.ok(byteCount > (isLong ? 1e9 : 0.55e9), megabytes(byteCount));
  const held: number[] = [];
  for (const tp of [1, 4]) {
    const figures = await loadAndLook(folder, tp);
    const limits = ['--weights', 'fp32', '--max-seq-len', '512', '--max-batch-size', '4'];
    const inspection = (await runCliJson([
      ...['inspect', '--model', folder, '--tp', String(tp)],
      ...limits,
    ])) as Inspection;
    figures.forEach(({ heldBytes, readBytes, kvBytes }, rank) => {
      const expected = inspection.ranks[rank]!;
      t.diagnostic(
        `tp ${tp}, rank ${rank}: holds ${megabytes(heldBytes)}, read ${megabytes(readBytes)}, ` +
          `${(readBytes / expected.readBytes).toFixed(3)} of what inspect says`,
      );
      assert.equal(kvBytes, expected.kvBytes);
      assert.ok(readBytes <= 1.1 * expected.readBytes, `rank ${rank} read ${readBytes}`);
      assert.ok(readBytes >= expected.readBytes, `rank ${rank} read ${readBytes}`);
    });
    held.push(Math.max(...figures.map(({ heldBytes }) => heldBytes)));
  }
  const [solo, quarter] = held as [number, number];
  t.diagnostic(`${megabytes(byteCount)}: tp 4 holds ${(quarter / solo).toFixed(3)} of tp 1`);
  assert.ok(quarter <= 0.35 * solo, `${quarter} of ${solo}`);
  fs.rmSync(folder, { recursive: true });
});

/** Little but KV cache: 16 KB a position. */
const kvConfig: LlamaConfig = {
  hiddenSize: 64,
  ffnSize: 64,
  layerCount: 4,
  headCount: 8,
  kvHeadCount: 8,
  headSize: 64,
  vocabSize: 512,
  maxPositions: 4096,
  normEps: 1e-5,
  ropeTheta: 10_000,
  isHeadTied: true,
};
const KV_BYTES_PER_POSITION = 2 * 4 * 8 * 64 * 4;

const kvFolder = path.join(scratch, 'kv');
writeRandomCheckpoint(kvFolder, { config: kvConfig, seed: 2, format: 'F16', shardCount: 1 });

void test('the KV cache is reserved at start and committed with use', { skip }, async (t) => {
  const pool = new RankPool();
  const limits = { maxSeqLen: 4096, maxBatchSize: 8, maxStepRows: 512 };
  try {
    const [rank] = await pool.start(1);
    const pid = rank!.process.pid!;
    const idleRss = rssOf(pid);
    await pool.withGroup(kvFolder, { tp: 1, ...limits }, async ({ ranks }) => {
      const kvBytes = ranks.loaded[0]!.kvBytes;
      assert.equal(kvBytes, KV_BYTES_PER_POSITION * 4096 * 8);
      const loadedRss = rssOf(pid);
      assert.ok(procFigure(pid, 'status', 'VmSize') > kvBytes);
      assert.ok(loadedRss - idleRss < kvBytes / 4, `${megabytes(loadedRss - idleRss)} at start`);
      // The first sequence also commits what else steps of this size need.
      let number = 0;
      const fill = async (slot: number, chunks: number): Promise<void> => {
        for (let i = 0; i < chunks; i += 1) {
          await ranks.forward(promptStep((number += 1), slot, 512, i === 0));
        }
      };
      await fill(0, 4);
      const before = { rss: rssOf(pid), size: procFigure(pid, 'status', 'VmSize') };
      await fill(1, 4);
      const committed = rssOf(pid) - before.rss;
      const expected = 4 * 512 * KV_BYTES_PER_POSITION;
      t.diagnostic(`2048 positions commit ${megabytes(committed)} of ${megabytes(kvBytes)}`);
      assert.ok(committed > 0.8 * expected && committed < 1.5 * expected, megabytes(committed));
      const grown = procFigure(pid, 'status', 'VmSize') - before.size;
      t.diagnostic(`address space grew by ${megabytes(grown)}`);
      assert.ok(grown < expected / 4, megabytes(grown));
    });
  } finally {
    await pool.stop();
  }
});

void test('the position after max_seq_len is refused', async () => {
  const pool = new RankPool();
  const limits = { maxSeqLen: 64, maxBatchSize: 2, maxStepRows: 64 };
  const isPast = (error: unknown): boolean =>
    error instanceof CaravanError && /position 64 is past max_seq_len 64/.test(error.message);
  try {
    await pool.withGroup(kvFolder, { tp: 2, ...limits }, async ({ ranks }) => {
      await ranks.forward(promptStep(1, 0, 64));
      const past = { ...promptStep(2, 1, 2), decodeSlots: [0], decodeTokens: [1] };
      await assert.rejects(ranks.forward(past), isPast);
    });
    await pool.withGroup(kvFolder, { tp: 2, ...limits }, async ({ ranks }) => {
      await assert.rejects(ranks.forward(promptStep(1, 0, 65)), isPast);
    });
  } finally {
    await pool.stop();
  }
});

const silent: SequenceSink = {
  token: () => undefined,
  end: () => undefined,
  fail: () => undefined,
};

const spec = (promptLength: number, maxTokens: number): SequenceSpec => ({
  id: 'sequence',
  index: 0,
  resumeTokenIds: [],
  request: {
    version: 1,
    model: 'random',
    promptTokenIds: new Array<number>(promptLength).fill(3),
    sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    maxTokens,
    stop: [],
    ignoreEos: true,
    isTextStart: false,
  },
});

void test('an engine has max_batch_size slots, and one that ends makes room', async () => {
  const pool = new RankPool();
  const limits = { maxSeqLen: 64, maxBatchSize: 3, maxStepRows: 64 };
  try {
    await pool.withGroup(kvFolder, { tp: 1, ...limits }, async ({ ranks }) => {
      await fillAndWait(ranks, limits);
    });
  } finally {
    await pool.stop();
  }
});

async function fillAndWait(
  ranks: Ranks,
  limits: { maxSeqLen: number; maxBatchSize: number; maxStepRows: number },
): Promise<void> {
  const engine = new RankEngine(ranks, fakeTokenizer(512), { ...limits, isExact: true });
  const stop = new AbortController();
  const running = engine.run(stop.signal);
  assert.throws(
    () => engine.add(spec(64, 1), silent),
    (error) => error instanceof CaravanError && error.code === 'context_length_exceeded',
  );
  // Runs to the end of its context: 64 positions.
  let tokens = 0;
  const ended = new Promise<string>((resolve, reject) => {
    const token = (): void => {
      tokens += 1;
    };
    engine.add(spec(10, 1000), { token, end: resolve, fail: reject });
  });
  const handles = [engine.add(spec(2, 1000), silent), engine.add(spec(2, 1000), silent)];
  assert.equal(engine.freeSlotCount, 0);
  assert.throws(() => engine.add(spec(2, 1), silent), /no slot is free/);
  assert.equal(await ended, 'length');
  assert.equal(tokens, 54);
  assert.equal(engine.freeSlotCount, 1);
  const next = new Promise<string>((resolve, reject) => {
    engine.add(spec(2, 2), { ...silent, end: resolve, fail: reject });
  });
  assert.equal(engine.freeSlotCount, 0);
  assert.equal(await next, 'length');
  for (const handle of handles) handle.cancel();
  stop.abort();
  await running;
}
