/**
 * A model gives the same tokens and logits from Meta's layout as from Hugging Face's, however many files it is cut
 * into, and however many ranks read them. CARAVAN_LONG=1 tries all combinations.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test, type TestContext } from 'node:test';
import { openModelTokenizer } from '../coordinator/model-tokenizer.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { runCliJson } from './cli.js';
import {
  differ,
  oracleGoldens,
  storiesGoldens,
  tinyGoldens,
  type Golden,
} from './golden-evaluation.js';
import { sharedGolden } from './golden.js';
import { rewriteAsBfloat16 } from './huggingface-checkpoint.js';
import { rewriteAsMeta } from './meta-checkpoint.js';
import { RankPool } from './rank-pool.js';
import { sharedPath, skipWithout } from './shared.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const TOLERANCE = 2e-4;
/** So that a hang ends: eight ranks on a busy machine take minutes. */
const GENERATE_WITHIN_MS = 600_000;
/**
 * Of the largest logit, where weights were rounded to bfloat16. In float64, too, this rounding alone moves logits of
 * stories260K by up to 0.087, of at most 19.3: nearer than that no reader of such files comes.
 */
const ROUNDED_TOLERANCE = 2e-2;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-meta-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

const all = [1, 2, 4].flatMap((mp) => [1, 2, 3, 4, 8].map((tp) => ({ mp, tp })));
const few = [
  { mp: 1, tp: 2 },
  { mp: 2, tp: 3 },
  { mp: 4, tp: 1 },
];

/** Rewrites a checkpoint for every mp and compares it at every tp. */
async function assertSame(
  t: TestContext,
  from: string,
  format: 'F32' | 'F16' | 'BF16',
  goldens: readonly Golden[],
  tolerance: number,
): Promise<void> {
  let most = 0;
  for (const { mp, tp } of isLong ? all : few) {
    const folder = path.join(scratch, `${path.basename(from)}-${format}-${mp}`);
    if (!fs.existsSync(folder)) await rewriteAsMeta(folder, from, mp, format);
    for (const golden of isLong ? goldens : goldens.slice(-1)) {
      const difference = await differ(pool, folder, tp, golden);
      assert.ok(difference < tolerance, `mp ${mp}, tp ${tp}: ${difference}`);
      most = Math.max(most, difference);
    }
  }
  t.diagnostic(`${format}: largest difference ${most.toExponential(1)}`);
}

void test(
  'stories260K in files of Meta’s layout: golden tokens and logits',
  { skip: skipWithout(sharedGolden.file) },
  async (t) => {
    await assertSame(t, sharedPath(sharedGolden.model), 'F32', storiesGoldens(), TOLERANCE);
  },
);

void test(
  'stories260K in bfloat16 files of Meta’s layout: golden tokens, and the oracle’s logits of such weights',
  { skip: skipWithout(sharedGolden.file) },
  async (t) => {
    const from = sharedPath(sharedGolden.model);
    const goldens = storiesGoldens();
    const largest = Math.max(...goldens.flatMap(({ logits }) => [...logits.values()].flat()));
    await assertSame(t, from, 'BF16', goldens, ROUNDED_TOLERANCE * largest);
    const rounded = path.join(scratch, 'rounded');
    rewriteAsBfloat16(rounded, from, 1);
    const prompts = goldens.map(({ ids }) => ids);
    await assertSame(t, from, 'BF16', oracleGoldens(rounded, prompts), TOLERANCE);
  },
);

void test('caravan-tiny in files of Meta’s layout: the oracle’s tokens and logits', async (t) => {
  for (const format of ['F32', 'F16'] as const) {
    await assertSame(t, embeddedModelPath(), format, tinyGoldens(), TOLERANCE);
  }
});

void test('matrices that lie column by column, in one shared storage, are the same', async () => {
  const folder = path.join(scratch, 'transposed');
  await rewriteAsMeta(folder, embeddedModelPath(), 2, 'F32', true);
  const sources = [...openCheckpoint(folder).tensors.values()];
  assert.ok(sources.some(({ pieces }) => pieces[0]!.strides?.[0] === 1));
  for (const tp of [1, 3]) {
    const difference = await differ(pool, folder, tp, tinyGoldens()[0]!);
    assert.ok(difference < TOLERANCE, String(difference));
  }
});

const real = 'models/stories260k/meta-mp2';
for (const tp of isLong ? [1, 2, 3, 4, 8] : [1, 3]) {
  void test(`files that torch.save wrote, at tp ${tp}`, { skip: skipWithout(real) }, async () => {
    for (const golden of storiesGoldens()) {
      const difference = await differ(pool, sharedPath(real), tp, golden);
      assert.ok(difference < TOLERANCE, String(difference));
    }
  });
}

for (const tp of isLong ? [1, 2, 3, 4, 8] : [3]) {
  void test(
    `the golden text comes from them at tp ${tp}`,
    { skip: skipWithout(real) },
    async () => {
      const args = [
        'generate',
        '--model',
        sharedPath(real),
        '--tp',
        String(tp),
        '--temperature',
        '0',
      ];
      args.push('--ignore-eos', '--max-tokens', '200');
      const { text } = (await runCliJson(args, GENERATE_WITHIN_MS)) as { text: string };
      const golden = fs.readFileSync(sharedPath(sharedGolden.text), 'utf8');
      assert.equal(text.trimEnd(), golden.trimEnd());
    },
  );
}

void test('tokenizer.model may lie one folder above', async () => {
  const home = path.join(scratch, 'home');
  const folder = path.join(home, 'llama-tiny');
  await rewriteAsMeta(folder, embeddedModelPath(), 1, 'F16');
  fs.renameSync(path.join(folder, 'tokenizer.model'), path.join(home, 'tokenizer.model'));
  const expected = openModelTokenizer(embeddedModelPath());
  assert.equal(openCheckpoint(folder).config.vocabSize, expected.vocabSize);
  const text = 'A caravan at night';
  assert.deepEqual(openModelTokenizer(folder).encode(text), expected.encode(text));
});
