/**
 * Every logit of a random model is the oracle's. Tokens alone do not show that much: over the eight models of
 * engine-matches-oracle.test.ts's short run, another rms_norm_eps (1e-5 for 1e-6, and back) changed no token, and
 * a lost last row of the vocabulary or weights cut to bfloat16 changed tokens of one and of two models. So here most
 * epsilons are large, and neither FFN nor vocabulary divides by a tp above 1.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { SampledRows } from '../proto/gen/cluster.js';
import { Oracle, prefill } from './oracle.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';

const TOLERANCE = 2e-4;
const PROMPT_LENGTH = 40;
const LIMITS = { maxSeqLen: 64, maxBatchSize: 1, maxStepRows: 64 };

const cases = [
  { tp: 1, headSize: 64, normEps: 0.1, ropeTheta: 10_000, isHeadTied: false, format: 'F32' },
  { tp: 2, headSize: 16, normEps: 1e-6, ropeTheta: 500_000, isHeadTied: true, format: 'F16' },
  { tp: 3, headSize: 8, normEps: 0.3, ropeTheta: 500_000, isHeadTied: false, format: 'F32' },
  { tp: 4, headSize: 128, normEps: 0.05, ropeTheta: 10_000, isHeadTied: true, format: 'F32' },
] as const;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-logits-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

for (const { tp, format, ...settings } of cases) {
  void test(`tp ${tp}, ${format}, ${JSON.stringify(settings)}`, async (t) => {
    const folder = path.join(scratch, String(tp));
    const config = {
      ...{ hiddenSize: 72, ffnSize: 101, layerCount: 2, headCount: 6, kvHeadCount: 3 },
      ...{ vocabSize: 173, maxPositions: 64, ...settings },
    };
    writeRandomCheckpoint(folder, { config, seed: tp, format, shardCount: 1 });
    const random = new Random(tp);
    const prompt = Array.from({ length: PROMPT_LENGTH }, () => random.below(config.vocabSize));
    const expected = prefill(new Oracle(folder), prompt).logits;
    const row = await pool.withGroup(folder, { tp, ...LIMITS }, async ({ ranks }) => {
      const sampledRows = SampledRows.SAMPLED_ROWS_LAST;
      await ranks.forward({
        number: 1,
        joins: [{ slot: 0, temperature: 0 }],
        ...{ decodeSlots: [], decodeTokens: [], topK: 1 },
        chunks: [{ slot: 0, tokens: prompt, sampledRows, targets: [] }],
      });
      return ranks.fetchRow(1, 0);
    });
    assert.equal(row.length, expected.length);
    const most = expected.reduce((m, logit, id) => Math.max(m, Math.abs(logit - row[id]!)), 0);
    t.diagnostic(`largest difference ${most.toExponential(1)}`);
    assert.ok(most < TOLERANCE, String(most));
  });
}
