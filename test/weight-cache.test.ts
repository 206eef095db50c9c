/** Weights that are kept for the next start: the same bits, no look at the checkpoint, and whatever goes wrong. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { evaluate } from '../coordinator/evaluation.js';
import type { LlamaConfig } from '../model/config.js';
import { listCachedWeights } from '../model/weight-cache-folder.js';
import type { WeightsMode } from '../model/weights.js';
import type { Loaded } from '../proto/gen/cluster.js';
import { WeightRecorder } from '../worker/weight-cache.js';
import { WeightFileWriter } from '../worker/weight-file.js';
import { runCli, runCliJson } from './cli.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-kept-'));
const pool = new RankPool();
const crowd = [pool, new RankPool()];
after(async () => {
  for (const one of crowd) await one.stop();
  fs.rmSync(scratch, { recursive: true });
});

const config: LlamaConfig = {
  ...{ hiddenSize: 256, ffnSize: 512, layerCount: 3, headCount: 8, kvHeadCount: 4, headSize: 32 },
  ...{ vocabSize: 1024, maxPositions: 256, normEps: 1e-5, ropeTheta: 10_000, isHeadTied: false },
};

function checkpointOf(
  name: string,
  format: 'F16' | 'F32',
  seed: number,
  changes: Partial<LlamaConfig> = {},
): string {
  const folder = path.join(scratch, name);
  writeRandomCheckpoint(folder, { config: { ...config, ...changes }, seed, format, shardCount: 1 });
  return folder;
}

const model = checkpointOf('model', 'F16', 1);
/** Small: it is loaded between any two loads of the others. */
const other = checkpointOf('other', 'F32', 2, {
  ...{ hiddenSize: 32, ffnSize: 64, layerCount: 1, headCount: 4, headSize: 8, vocabSize: 64 },
});
const tensorBytes = fs.statSync(path.join(model, 'model.safetensors')).size;
const LIMITS = { maxSeqLen: 64, maxBatchSize: 1, maxStepRows: 64, exact: false };
const random = new Random(3);
const tokens = Array.from({ length: 40 }, () => random.below(config.vocabSize));

interface Start {
  readonly logits: readonly Float32Array[];
  readonly loaded: readonly Loaded[];
  /** By rank: bytes that its process asked for while it loaded and computed. */
  readonly readBytes: readonly number[];
}

const rchar = (pid: number): number =>
  Number(/^rchar: (\d+)/m.exec(fs.readFileSync(`/proc/${pid}/io`, 'utf8'))?.[1]);

/** Loads a model, as if its ranks had just been started, and computes. */
async function start(
  pool: RankPool,
  folder: string,
  tp: number,
  weights: WeightsMode,
  cache: string,
  maxBytes = 1e9,
): Promise<Start> {
  const pids = (await pool.start(tp)).map(({ process: { pid } }) => pid!);
  // A rank keeps the shard of its last group.
  await pool.withGroup(other, { ...LIMITS, tp, weights: 'fp32' }, () => Promise.resolve());
  const before = pids.map(rchar);
  const keptWeights = { folder: cache, maxBytes };
  return pool.withGroup(folder, { ...LIMITS, tp, weights, keptWeights }, async ({ ranks }) => {
    const { logits } = await evaluate(ranks, tokens, tokens.length, [0, 20, 39], LIMITS.maxSeqLen);
    const readBytes = pids.map((pid, i) => rchar(pid) - before[i]!);
    return { logits: [...logits.values()], loaded: ranks.loaded, readBytes };
  });
}

const isLong = process.env['CARAVAN_LONG'] === '1';
const few = [
  ['int4+int8', 2, [true]],
  ['int8', 1, [false]],
  ['fp32', 2, [false]],
] as const;
const all = (['fp32', 'int8', 'int4', 'int4+int8'] as const).flatMap((mode) =>
  [1, 2, 3].map((tp) => [mode, tp, [false, true]] as const),
);

for (const [mode, tp, heads] of isLong ? all : few) {
  void test(`${mode} at tp ${tp}: the second start maps the same bits and reads headers`, async () => {
    for (const isHeadTied of heads) {
      const cache = path.join(scratch, `cache-${mode}-${tp}-${isHeadTied}`);
      const folder = isHeadTied
        ? checkpointOf(`tied-${mode}-${tp}`, 'F16', 4, { isHeadTied })
        : model;
      const first = await start(pool, folder, tp, mode, cache);
      const second = await start(pool, folder, tp, mode, cache);
      assert.deepEqual(second.logits, first.logits);
      assert.equal(listCachedWeights(cache).length, tp);
      for (let rank = 0; rank < tp; rank += 1) {
        const [before, now] = [first.loaded[rank]!, second.loaded[rank]!];
        assert.equal(before.cachedBytes, 0);
        assert.ok(before.bytesRead > tensorBytes / tp / 4, String(before.bytesRead));
        assert.equal(before.cacheFault + now.cacheFault, '');
        assert.equal(now.bytesRead, 0);
        assert.ok(now.cachedBytes >= now.weightBytes);
        // Headers of the checkpoint and the table of the cache file.
        assert.ok(second.readBytes[rank]! < 100_000, String(second.readBytes[rank]));
      }
    }
  });
}

void test('float32 weights of a float32 checkpoint are not kept', async () => {
  const cache = path.join(scratch, 'needless');
  const [loaded] = (await start(pool, checkpointOf('whole', 'F32', 5), 1, 'fp32', cache)).loaded;
  assert.equal(loaded!.cacheFault, '');
  assert.ok(!fs.existsSync(cache));
});

void test('another checkpoint with the same headers gets weights of its own', async () => {
  const cache = path.join(scratch, 'replaced');
  const folder = checkpointOf('replaced-model', 'F16', 6);
  const before = await start(pool, folder, 1, 'int8', cache);
  checkpointOf('replaced-model', 'F16', 7);
  const now = await start(pool, folder, 1, 'int8', cache);
  assert.equal(now.loaded[0]!.cachedBytes, 0);
  assert.notDeepEqual(now.logits, before.logits);
});

void test('damaged files are noticed, and written anew', async () => {
  const cache = path.join(scratch, 'damaged');
  const good = await start(pool, model, 1, 'int8', cache);
  const { file } = listCachedWeights(cache)[0]!;
  const bytes = fs.readFileSync(file);
  const flipped = (at: number): Buffer => {
    const copy = Buffer.from(bytes);
    copy[at]! ^= 1;
    return copy;
  };
  const tableAt = bytes.indexOf('{"digest"');
  const damages: readonly [string, (place: string) => void][] = [
    [
      'a bit of the first array',
      (place) => {
        fs.writeFileSync(place, flipped(5));
      },
    ],
    [
      'a bit of a later one',
      (place) => {
        fs.writeFileSync(place, flipped(tableAt - 5000));
      },
    ],
    [
      'a bit of the table',
      (place) => {
        fs.writeFileSync(place, flipped(tableAt + 3));
      },
    ],
    [
      'a bit of the trailer',
      (place) => {
        fs.writeFileSync(place, flipped(bytes.length - 1));
      },
    ],
    [
      'the end is missing',
      (place) => {
        fs.writeFileSync(place, bytes.subarray(0, -100));
      },
    ],
    [
      'the beginning is missing',
      (place) => {
        fs.writeFileSync(place, bytes.subarray(4096));
      },
    ],
    [
      'nothing is there',
      (place) => {
        fs.writeFileSync(place, '');
      },
    ],
    [
      'a folder is in its place',
      (place) => {
        fs.mkdirSync(place);
      },
    ],
  ];
  for (const [name, damage] of damages) {
    fs.rmSync(file, { recursive: true });
    damage(file);
    const { logits, loaded } = await start(pool, model, 1, 'int8', cache);
    assert.deepEqual(logits, good.logits, name);
    assert.equal(loaded[0]!.cachedBytes, 0, name);
    assert.equal(loaded[0]!.cacheFault, '', name);
    assert.ok(fs.readFileSync(file).equals(bytes), name);
  }
  assert.deepEqual(fs.readdirSync(cache), [path.basename(file)]);
});

void test('several groups may write at once, and one may be killed meanwhile', async () => {
  const cache = path.join(scratch, 'crowd');
  const starts = await Promise.all(crowd.map((one) => start(one, model, 2, 'int4', cache)));
  for (const { logits } of starts) assert.deepEqual(logits, starts[0]!.logits);
  const files = listCachedWeights(cache);
  assert.deepEqual(files.map(({ rank }) => rank).sort(), [0, 1]);
  // What a killed process leaves is no file of weights, and goes in time.
  const left = `${files[0]!.file}.0123-4567.new`;
  fs.writeFileSync(left, 'half');
  const second = await start(pool, model, 2, 'int4', cache);
  assert.deepEqual(second.logits, starts[0]!.logits);
  assert.ok(second.loaded.every(({ cachedBytes }) => cachedBytes > 0));
  assert.ok(fs.existsSync(left), 'it may still be written');
  const longAgo = new Date(Date.now() - 2 * 3_600_000);
  fs.utimesSync(left, longAgo, longAgo);
  await start(pool, model, 1, 'int4', cache);
  assert.ok(!fs.existsSync(left));
});

void test('the least recently used weights go, never those of the same group', async () => {
  const cache = path.join(scratch, 'bounded');
  const modes = (): string[] =>
    listCachedWeights(cache)
      .map(({ mode, tp }) => `${mode} ${tp}`)
      .sort();
  await start(pool, model, 1, 'int4', cache);
  await start(pool, model, 1, 'int8', cache);
  const [int8, int4] = listCachedWeights(cache);
  assert.equal(int4!.mode, 'int4');
  const age = (file: string, minutes: number): void => {
    const then = new Date(Date.now() - 60_000 * minutes);
    fs.utimesSync(file, then, then);
  };
  age(int8!.file, 10);
  age(int4!.file, 20);
  // Used again: now the other is the oldest.
  await start(pool, model, 1, 'int4', cache);
  const room = int4!.byteCount + int8!.byteCount;
  const third = await start(pool, model, 2, 'int4', cache, room);
  assert.deepEqual(
    third.loaded.map(({ cacheFault }) => cacheFault),
    ['', ''],
  );
  assert.deepEqual(modes(), ['int4 1', 'int4 2', 'int4 2']);
  const small = Math.floor(0.75 * int8!.byteCount);
  const tooSmall = await start(pool, model, 2, 'int8', cache, small);
  // There was room for one of the two: the other does not push it out, now or later. (Both may step back at once.)
  const faults = tooSmall.loaded.map(({ cacheFault }) => cacheFault).filter((f) => f !== '');
  assert.ok(faults.length >= 1);
  assert.match(
    faults[0]!,
    /^weight cache: .* GB of weights do not fit into the .* --weight-cache-max$/,
  );
  assert.ok(listCachedWeights(cache).reduce((sum, file) => sum + file.byteCount, 0) <= small);
  const again = await start(pool, model, 2, 'int8', cache, small);
  assert.deepEqual(again.logits, tooSmall.logits);
  assert.equal(again.loaded.filter(({ cachedBytes }) => cachedBytes > 0).length, 2 - faults.length);
});

const generate = (cache: string, ...more: string[]): Promise<Awaited<ReturnType<typeof runCli>>> =>
  runCli([
    ...['generate', '--weights', 'int8', '--prompt', 'The', '--max-tokens', '4'],
    ...['--temperature', '0', '--weight-cache', cache, ...more],
  ]);

void test('a folder that cannot be written costs a line', async () => {
  const notFolder = path.join(scratch, 'a-file');
  fs.writeFileSync(notFolder, '');
  const good = await generate('off');
  const { code, stdout, stderr } = await generate(path.join(notFolder, 'cache'), '--tp', '2');
  assert.equal(code, 0);
  assert.equal(stdout, good.stdout);
  const said = stderr.split('\n').filter((line) => line.includes('weight cache'));
  assert.equal(said.length, 1, stderr);
  assert.match(
    said[0]!,
    /^caravan: weight cache: .*a-file\/cache cannot be read: ENOTDIR: not a directory$/,
  );
});

const cannotMount = process.getuid?.() === 0 ? false : 'only root can mount a small file system';

void test('a full disk costs the cache and nothing else', { skip: cannotMount }, async (t) => {
  const folder = path.join(scratch, 'full');
  fs.mkdirSync(folder);
  try {
    execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', folder], { stdio: 'pipe' });
  } catch (error) {
    t.skip(`nothing can be mounted here: ${String(error)}`);
    return;
  }
  try {
    const { code, stderr } = await generate(folder);
    assert.equal(code, 0);
    assert.match(stderr, /weight cache: .* GB of weights would leave too little of the .* free/);
    assert.deepEqual(fs.readdirSync(folder), []);
    // Nothing of it was known when the writing began.
    const writer = await WeightFileWriter.create(path.join(folder, 'weights'));
    const faults: unknown[] = [];
    const recorder = new WeightRecorder(writer, { digest: '', rank: 0 }, (fault) => {
      faults.push(fault);
    });
    for (const name of ['a', 'b', 'c']) recorder.append(name, new ArrayBuffer(700_000));
    await recorder.finish();
    assert.equal(faults.length, 1);
    assert.match(String(faults[0]), /ENOSPC/);
    assert.deepEqual(fs.readdirSync(folder), []);
  } finally {
    execFileSync('umount', [folder]);
  }
});

void test('cache ls and rm show and remove what generate has kept', async () => {
  const cache = path.join(scratch, 'listed');
  assert.equal((await generate(cache, '--tp', '2')).code, 0);
  interface Listed {
    readonly files: readonly {
      readonly file: string;
      readonly rank: number;
      readonly bytes: number;
      readonly used: string;
    }[];
  }
  const at = ['--weight-cache', cache];
  const listed = (await runCliJson(['cache', 'ls', ...at])) as Listed;
  const { file, bytes, used, ...shown } = listed.files.find(({ rank }) => rank === 1)!;
  assert.deepEqual(shown, {
    model: 'caravan-tiny',
    weights: 'int8',
    rank: 1,
    tp: 2,
    isWhole: true,
  });
  assert.equal(fs.statSync(path.join(cache, file)).size, bytes);
  assert.ok(Math.abs(Date.parse(used) - Date.now()) < 600_000);
  const [text, unknown, nothing] = await Promise.all([
    runCli(['cache', 'ls', ...at]),
    runCli(['cache', 'rm', 'llama', ...at]),
    runCli(['cache', 'rm', ...at]),
  ]);
  assert.equal(text.stdout.trim().split('\n').length, 2);
  assert.match(text.stderr, /: 2 files, [\d.]+ MB\n$/);
  assert.equal(unknown.code, 1);
  assert.match(unknown.stderr, /^caravan: llama: no weights of it are in .*\n$/);
  assert.equal(nothing.code, 2);
  const one = (await runCliJson(['cache', 'rm', file, ...at])) as Listed;
  assert.deepEqual(one.files, [listed.files.find((kept) => kept.file === file)]);
  const rest = (await runCliJson(['cache', 'rm', 'caravan-tiny', ...at])) as Listed;
  assert.equal(rest.files.length, 1);
  assert.deepEqual(fs.readdirSync(cache), []);
});
