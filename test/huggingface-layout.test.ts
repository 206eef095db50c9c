/**
 * A model in shards of bfloat16, as Hugging Face's repositories hold it, gives the tokens and logits of the whole one, as
 * far as its rounding lets it. CARAVAN_LONG=1 tries every tp.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openCheckpoint } from '../model/checkpoint.js';
import { runCliJson } from './cli.js';
import { differ, oracleGoldens, storiesGoldens } from './golden-evaluation.js';
import { sharedGolden } from './golden.js';
import { rewriteAsBfloat16 } from './huggingface-checkpoint.js';
import { RankPool } from './rank-pool.js';
import { sharedPath, skipWithout } from './shared.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const TPS = isLong ? [1, 2, 3, 4, 8] : [1, 3];
/** Beside the oracle with the same rounded weights. */
const TOLERANCE = 2e-4;
/** Of the largest logit, beside the weights before they were rounded: see meta-layout. */
const ROUNDED_TOLERANCE = 2e-2;
/** So that a hang ends: eight ranks on a busy machine take minutes. */
const GENERATE_WITHIN_MS = 600_000;
/** In float64, too, the text of the rounded weights is another one from token 185 on. */
const TEXT_TOKENS = 150;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-shards-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

const skip = skipWithout(sharedGolden.file);
const folder = path.join(scratch, 'stories');
if (skip === false) rewriteAsBfloat16(folder, sharedPath(sharedGolden.model), 3);

void test(
  'stories260K in three shards of bfloat16: golden tokens and logits',
  { skip },
  async (t) => {
    const { tensors } = openCheckpoint(folder);
    const files = new Set([...tensors.values()].map(({ pieces }) => pieces[0]!.file));
    assert.equal(files.size, 3);
    const goldens = storiesGoldens();
    const largest = Math.max(...goldens.flatMap(({ logits }) => [...logits.values()].flat()));
    const prompts = goldens.map(({ ids }) => ids);
    for (const [expected, tolerance] of [
      [goldens, ROUNDED_TOLERANCE * largest],
      [oracleGoldens(folder, prompts), TOLERANCE],
    ] as const) {
      let most = 0;
      for (const tp of TPS) {
        for (const golden of expected) {
          const difference = await differ(pool, folder, tp, golden);
          assert.ok(difference < tolerance, `tp ${tp}: ${difference}`);
          most = Math.max(most, difference);
        }
      }
      t.diagnostic(`largest difference ${most.toExponential(1)}, of ${largest.toFixed(1)}`);
    }
  },
);

void test('the golden text comes from it', { skip }, async () => {
  const golden = fs.readFileSync(sharedPath(sharedGolden.text), 'utf8');
  for (const tp of isLong ? TPS : [2]) {
    const args = ['generate', '--model', folder, '--tp', String(tp), '--temperature', '0'];
    args.push('--ignore-eos', '--max-tokens', String(TEXT_TOKENS));
    const { text, tokenIds } = (await runCliJson(args, GENERATE_WITHIN_MS)) as {
      text: string;
      tokenIds: number[];
    };
    assert.equal(tokenIds.length, TEXT_TOKENS);
    assert.ok(text.length > 300 && golden.startsWith(text), text);
  }
});
