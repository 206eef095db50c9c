/**
 * A model gives the same tokens and logits from GGUF as from Hugging Face's layout, quantized or not, in one file or
 * several, however many ranks read it. CARAVAN_LONG=1 tries every tp.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openModelTokenizer } from '../coordinator/model-tokenizer.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { listSlices, planRanks, slicesOf } from '../model/plan.js';
import { runCliJson } from './cli.js';
import { partFile, rewriteAsGguf } from './gguf-checkpoint.js';
import {
  differ,
  oracleGoldens,
  storiesGoldens,
  tinyGoldens,
  type Golden,
} from './golden-evaluation.js';
import { sharedGolden } from './golden.js';
import { greedy, Oracle } from './oracle.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';
import { sharedPath, skipWithout } from './shared.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const TOLERANCE = 2e-4;
/** So that a hang ends: eight ranks on a busy machine take minutes. */
const GENERATE_WITHIN_MS = 600_000;
const TPS = isLong ? [1, 2, 3, 4, 8] : [1, 2, 3];

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-gguf-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

/** Compares a file with goldens, at each tp. @returns the largest difference. */
async function assertSame(
  model: string,
  tps: readonly number[],
  goldens: readonly Golden[],
): Promise<string> {
  let most = 0;
  for (const tp of tps) {
    for (const golden of isLong ? goldens : goldens.slice(-1)) {
      const difference = await differ(pool, model, tp, golden);
      assert.ok(difference < TOLERANCE, `tp ${tp}: ${difference}`);
      most = Math.max(most, difference);
    }
  }
  return `largest difference ${most.toExponential(1)}`;
}

const generate = async (model: string, tp: number, count: number) => {
  const args = ['generate', '--model', model, '--tp', String(tp), '--weights', 'fp32'];
  args.push('--temperature', '0', '--ignore-eos', '--max-tokens', String(count));
  return (await runCliJson(args, GENERATE_WITHIN_MS)) as { text: string; tokenIds: number[] };
};

void test(
  'stories260K in F32: golden tokens and logits',
  { skip: skipWithout(sharedGolden.file) },
  async (t) => {
    const file = path.join(scratch, 'stories.gguf');
    await rewriteAsGguf(file, sharedPath(sharedGolden.model), { format: 'F32' });
    t.diagnostic(await assertSame(file, isLong ? TPS : [1, 2], storiesGoldens()));
  },
);

const foreign = 'models/stories260k/gguf/stories260K.f32.gguf';
void test(
  'stories260K in a file of another writer: golden tokens and logits',
  { skip: skipWithout(foreign) },
  async (t) => {
    t.diagnostic(await assertSame(sharedPath(foreign), isLong ? TPS : [3], storiesGoldens()));
  },
);

for (const [name, settings] of [
  ['F16', { format: 'F16' }],
  ['version 2, with the data aligned to 256 bytes', { format: 'F16', version: 2, alignment: 256 }],
] as const) {
  void test(`caravan-tiny in ${name}: the oracle’s tokens and logits`, async (t) => {
    const file = path.join(scratch, `tiny ${name}.gguf`);
    await rewriteAsGguf(file, embeddedModelPath(), settings);
    t.diagnostic(await assertSame(file, isLong ? TPS : [2], tinyGoldens()));
  });
}

void test(
  'stories260K in Q8_0 tells the golden text for 60 tokens',
  { skip: skipWithout(sharedGolden.text) },
  async () => {
    const file = path.join(scratch, 'stories-q8.gguf');
    await rewriteAsGguf(file, sharedPath(sharedGolden.model), { format: 'Q8_0' });
    const formats = [...openCheckpoint(file).tensors].flatMap(([tensor, { pieces }]) =>
      pieces.map(({ format }) => `${tensor.replace(/\d+/, 'N')} ${format}`),
    );
    assert.ok(formats.includes('model.layers.N.self_attn.q_proj.weight Q8_0'));
    assert.ok(formats.includes('model.layers.N.mlp.down_proj.weight F32'));
    const golden = fs.readFileSync(sharedPath(sharedGolden.text), 'utf8');
    for (const tp of isLong ? TPS : [3]) {
      const { text, tokenIds } = await generate(file, tp, 60);
      assert.equal(tokenIds.length, 60);
      assert.ok(text.length > 100, text);
      assert.ok(golden.startsWith(text), text);
    }
  },
);

/** What rounding to 4 bits does to a model this small no reader can mend: its own text is what the oracle says of it. */
void test(
  'stories260K in Q4_0: the oracle’s logits and greedy text of the stored numbers',
  { skip: skipWithout(sharedGolden.file) },
  async (t) => {
    const file = path.join(scratch, 'stories-q4.gguf');
    const numbersFolder = path.join(scratch, 'stories-q4');
    await rewriteAsGguf(file, sharedPath(sharedGolden.model), { format: 'Q4_0', numbersFolder });
    const prompts = storiesGoldens().map(({ ids }) => ids);
    t.diagnostic(await assertSame(file, TPS, oracleGoldens(numbersFolder, prompts)));
    const bos = 1;
    const expected = greedy(new Oracle(numbersFolder), [bos], 60);
    for (const tp of isLong ? TPS : [2]) {
      assert.deepEqual((await generate(file, tp, 60)).tokenIds, expected, `tp ${tp}`);
    }
  },
);

for (const format of ['Q8_0', 'Q4_0'] as const) {
  void test(`caravan-tiny in ${format}: the oracle’s logits of the stored numbers`, async (t) => {
    const file = path.join(scratch, `tiny-${format}.gguf`);
    const numbersFolder = path.join(scratch, `tiny-${format}`);
    await rewriteAsGguf(file, embeddedModelPath(), { format, numbersFolder });
    const prompts = tinyGoldens().map(({ ids }) => ids.slice(0, 40));
    const tps = isLong ? TPS : [format === 'Q8_0' ? 1 : 3];
    t.diagnostic(await assertSame(file, tps, oracleGoldens(numbersFolder, prompts)));
  });
}

/** Neither FFN columns nor heads end with the blocks: cuts of 54, 53 and 53 columns, and of 32, 16 and 16. */
const straddling = {
  ...{ hiddenSize: 64, ffnSize: 160, layerCount: 2, headCount: 4, kvHeadCount: 4, headSize: 16 },
  ...{ vocabSize: 131, maxPositions: 512, normEps: 1e-5, ropeTheta: 10_000 },
};

for (const format of ['Q8_0', 'Q4_0'] as const) {
  void test(`${format} blocks that straddle the cuts between ranks`, async (t) => {
    for (const isHeadTied of [false, true]) {
      const from = path.join(scratch, `straddling-${format}-${isHeadTied}`);
      const config = { ...straddling, isHeadTied };
      writeRandomCheckpoint(from, { config, seed: 5, format: 'F32', shardCount: 1 });
      const [file, numbersFolder] = [`${from}.gguf`, `${from}-numbers`];
      await rewriteAsGguf(file, from, { format, numbersFolder });
      const random = new Random(6);
      const prompt = Array.from({ length: 30 }, () => random.below(config.vocabSize));
      const checkpoint = openCheckpoint(file);
      const cuts = planRanks(checkpoint.config, 3)
        .flatMap((plan) => listSlices(slicesOf(checkpoint.config, plan)))
        .filter(({ tensor }) => checkpoint.tensors.get(tensor)!.pieces[0]!.format === format)
        .map(({ tensor, columns }) => `${tensor.split('.').at(-2)!} ${columns.start % 32}`);
      assert.ok(cuts.includes('down_proj 22') && cuts.includes('o_proj 16'), cuts.join());
      const tps = isLong ? [1, 2, 3, 4] : [3];
      t.diagnostic(await assertSame(file, tps, oracleGoldens(numbersFolder, [prompt])));
    }
  });
}

void test('a model in three files is that of one, whichever of them is named', async (t) => {
  const whole = path.join(scratch, 'whole.gguf');
  const settings = { format: 'Q8_0', alignment: 64 } as const;
  await rewriteAsGguf(whole, embeddedModelPath(), settings);
  const name = path.join(scratch, 'parts.gguf');
  const numbersFolder = path.join(scratch, 'parts');
  const parts = { ...settings, numbersFolder, partCount: 3 };
  const files = await rewriteAsGguf(name, embeddedModelPath(), parts);
  const expected = openCheckpoint(whole);
  const opened = files.map((file) => openCheckpoint(file));
  for (const checkpoint of opened) {
    assert.deepEqual(checkpoint.config, expected.config);
    assert.deepEqual([...checkpoint.tensors.keys()], [...expected.tensors.keys()]);
    assert.equal(checkpoint.digest, opened[0]!.digest);
    assert.equal(checkpoint.path, files[0]);
    const used = [...checkpoint.tensors.values()].map(({ pieces }) => pieces[0]!.file);
    assert.deepEqual([...new Set(used)].sort(), files);
  }
  const ids = tinyGoldens()[0]!.ids.slice(0, 40);
  t.diagnostic(await assertSame(files[1]!, [3], oracleGoldens(numbersFolder, [ids])));
  const text = 'Tell me of the caravan.';
  const tokens = openModelTokenizer(embeddedModelPath()).encode(text);
  for (const file of files) assert.deepEqual(openModelTokenizer(file).encode(text), tokens);
  assert.equal(files[1], partFile(name, 1, 3));
});
