/**
 * What loading takes at its peak: a rank's final weights and 512 MiB, and the bytes of its share, whatever the layout,
 * the weights mode and the size of the checkpoint. CARAVAN_LONG=1 tries every mode, on layers of 70B and on files of
 * some hundred MB.
 */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import type { WeightsMode } from '../model/weights.js';
import { rewriteAsGguf } from './gguf-checkpoint.js';
import { largeConfig } from './large-config.js';
import type { LoneRank } from './lone-rank.js';
import { writeSparseMeta } from './meta-checkpoint.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const skip = fs.existsSync('/proc/self/io') ? false : 'there is no /proc here';
const MIB = 1 << 20;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-peak-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

const program = fileURLToPath(new URL('lone-rank.js', import.meta.url));

async function assertBounded(
  model: string,
  mode: WeightsMode,
  tp: number,
  rank: number,
): Promise<string> {
  const args = [program, model, mode, String(tp), String(rank)];
  const { stdout } = await promisify(execFile)(process.execPath, args);
  const found = JSON.parse(stdout) as LoneRank;
  const { weightBytes, shareBytes, peakBytes, requestedBytes } = found;
  const beyond = (peakBytes - weightBytes) / MIB;
  const said =
    `${mode}, rank ${rank} of ${tp}: ${beyond.toFixed(0)} MiB beyond its ` +
    `${(weightBytes / MIB).toFixed(0)} MiB, ${(requestedBytes / shareBytes).toFixed(4)} of its share`;
  assert.ok(peakBytes > weightBytes / 2, said);
  assert.ok(beyond <= 512, said);
  assert.ok(requestedBytes <= 1.1 * shareBytes, said);
  assert.ok(requestedBytes >= shareBytes, said);
  return said;
}

/** 70B with one layer, so that embedding and head are there too: holes in eight files. */
function oneLayerOf70B(): string {
  const folder = path.join(scratch, '70b');
  if (fs.existsSync(folder)) return folder;
  const params = {
    ...{ dim: 8192, n_layers: 1, n_heads: 64, n_kv_heads: 8, multiple_of: 4096 },
    ...{ ffn_dim_multiplier: 1.3, norm_eps: 1e-5, vocab_size: 32_000 },
  };
  const config = {
    ...{ hiddenSize: 8192, ffnSize: 28_672, layerCount: 1, headCount: 64, kvHeadCount: 8 },
    ...{ headSize: 128, vocabSize: 32_000, maxPositions: 4096, normEps: 1e-5 },
    ...{ ropeTheta: 10_000, isHeadTied: false },
  };
  writeSparseMeta(folder, params, config, 8);
  return folder;
}

const layers: readonly (readonly [WeightsMode, number])[] = isLong
  ? (['fp32', 'int8', 'int4', 'int4+int8'] as const).flatMap((mode) =>
      [4, 8].map((tp) => [mode, tp] as const),
    )
  : [['int8', 8]];

for (const [mode, tp] of layers) {
  void test(`a layer, embedding and head of 70B in ${mode} at tp ${tp}`, { skip }, async (t) => {
    t.diagnostic(await assertBounded(oneLayerOf70B(), mode, tp, tp - 1));
  });
}

const cannot = skip !== false ? skip : isLong ? false : 'only in the long form';

void test('files of some hundred MB, in every mode', { skip: cannot }, async (t) => {
  const folder = path.join(scratch, 'hf');
  const config = largeConfig(1);
  const byteCount = writeRandomCheckpoint(folder, {
    config,
    seed: 1,
    format: 'BF16',
    shardCount: 3,
  });
  assert.ok(byteCount > 0.5e9, String(byteCount));
  for (const mode of ['fp32', 'int8', 'int4', 'int4+int8'] as const) {
    for (const [tp, rank] of [
      [1, 0],
      [3, 1],
    ] as const) {
      t.diagnostic(`safetensors: ${await assertBounded(folder, mode, tp, rank)}`);
    }
  }
});

void test('a GGUF file whose blocks straddle the cuts', { skip: cannot }, async (t) => {
  const folder = path.join(scratch, 'small');
  const config = { ...largeConfig(0.3), ffnSize: 2752 };
  writeRandomCheckpoint(folder, { config, seed: 2, format: 'F32', shardCount: 1 });
  const file = path.join(scratch, 'model.gguf');
  await rewriteAsGguf(file, folder, { format: 'Q8_0' });
  for (const mode of ['fp32', 'int8', 'int4+int8'] as const) {
    t.diagnostic(`GGUF: ${await assertBounded(file, mode, 3, 1)}`);
  }
});
