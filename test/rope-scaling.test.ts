/**
 * The engine turns positions as the oracle does, for each kind of rope_scaling, however the model is cut and the prompt
 * is chunked. Prompts reach far beyond the original context, where dynamic NTK begins to act, and the model's scaling
 * must show: with the scaling taken away the logits differ.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { evaluate } from '../coordinator/evaluation.js';
import type { LlamaConfig } from '../model/config.js';
import type { RopeScaling } from '../model/rope-scaling.js';
import { Oracle } from './oracle.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';

const TOLERANCE = 2e-4;
/** What a scaling must change at the least, or it is not tested. */
const VISIBLE = 1e-2;
const LENGTH = 90;
const MAX_SEQ_LEN = 96;

const plain: LlamaConfig = {
  ...{ hiddenSize: 64, ffnSize: 93, layerCount: 2, headCount: 6, kvHeadCount: 3, headSize: 16 },
  ...{ vocabSize: 131, maxPositions: MAX_SEQ_LEN, normEps: 1e-5, ropeTheta: 10_000 },
  isHeadTied: false,
};

const scalings: readonly RopeScaling[] = [
  { kind: 'linear', factor: 4 },
  { kind: 'dynamic', factor: 2, originalPositions: 32 },
  {
    kind: 'llama3',
    factor: 8,
    // Of eight channels some lie on each side of the slope, and some on it.
    lowFrequencyFactor: 1,
    highFrequencyFactor: 4,
    originalPositions: 64,
  },
];

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-rope-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

const random = new Random(77);
const tokens = Array.from({ length: LENGTH }, () => random.below(plain.vocabSize));
const positions = [0, 1, 30, 31, 32, 33, 47, 64, LENGTH - 1];

function write(name: string, ropeScaling: RopeScaling | undefined): string {
  const folder = path.join(scratch, name);
  const config = ropeScaling === undefined ? plain : { ...plain, ropeScaling };
  writeRandomCheckpoint(folder, { config, seed: 5, format: 'F32', shardCount: 1 });
  return folder;
}

/** By position: (vocabulary). */
function oracleLogits(folder: string): Map<number, Float64Array> {
  const oracle = new Oracle(folder);
  const cache = oracle.start();
  return new Map(tokens.map((token, position) => [position, oracle.next(cache, token)]));
}

const distance = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.from(a).reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0);

const unscaled = oracleLogits(write('plain', undefined));

for (const scaling of scalings) {
  void test(`${scaling.kind}: the oracle's logits at tp 1, 2, 3 and 4, in chunks of any size`, async (t) => {
    const folder = write(scaling.kind, scaling);
    const expected = oracleLogits(folder);
    assert.deepEqual(new Oracle(folder).config.ropeScaling, scaling);
    const last = LENGTH - 1;
    assert.ok(distance(expected.get(last)!, unscaled.get(last)!) > VISIBLE);
    for (const [tp, chunk] of [
      [1, LENGTH],
      [2, 7],
      [3, 33],
      [4, 2],
    ] as const) {
      const limits = { tp, maxSeqLen: MAX_SEQ_LEN, maxBatchSize: 1, maxStepRows: MAX_SEQ_LEN };
      const { logits } = await pool.withGroup(folder, limits, ({ ranks }) =>
        evaluate(ranks, tokens, chunk, positions, MAX_SEQ_LEN),
      );
      assert.equal(logits.size, positions.length);
      const most = Math.max(
        ...positions.map((position) => distance(logits.get(position)!, expected.get(position)!)),
      );
      t.diagnostic(`tp ${tp}, chunks of ${chunk}: largest difference ${most.toExponential(1)}`);
      assert.ok(most < TOLERANCE, `tp ${tp}, chunks of ${chunk}: ${most}`);
    }
  });
}

void test('dynamic NTK turns nothing otherwise within the original context', () => {
  const dynamic = oracleLogits(write('within', scalings[1]));
  assert.deepEqual(dynamic.get(31), unscaled.get(31));
  assert.notDeepEqual(dynamic.get(32), unscaled.get(32));
});
