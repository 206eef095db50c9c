/**
 * The command line gives the golden logits and the golden text, at every tp, in one pass and in chunks.
 * CARAVAN_LONG=1 tries all combinations.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { embeddedModelPath } from '../model/checkpoint.js';
import { runCliJson } from './cli.js';
import { readTinyGolden, sharedGolden } from './golden.js';
import { sharedPath, skipWithout } from './shared.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const TOLERANCE = 2e-4;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-golden-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

interface Evaluation {
  readonly tokens: number;
  readonly perplexity: number | null;
  readonly argmax: number[];
  readonly logits: Record<string, number[]>;
}

async function evaluate(
  model: string,
  ids: readonly number[],
  positions: readonly number[],
  tp: number,
  chunk: number | null,
): Promise<Evaluation> {
  const file = path.join(scratch, `${ids.length}.json`);
  fs.writeFileSync(file, JSON.stringify(ids));
  const args = ['eval', '--model', model, '--weights', 'fp32', '--tp', String(tp)];
  args.push('--tokens', file, '--logits', positions.join());
  if (chunk !== null) args.push('--chunk', String(chunk));
  return (await runCliJson(args)) as Evaluation;
}

/** The largest absolute difference. */
function distance(actual: readonly number[] | undefined, expected: readonly number[]): number {
  assert.equal(actual?.length, expected.length);
  return expected.reduce((most, value, id) => Math.max(most, Math.abs(actual[id]! - value)), 0);
}

const combinations = [1, 2, 3, 4, 8].flatMap((tp) =>
  [null, 7].flatMap((chunk) => [0, 1].map((golden) => ({ tp, chunk, golden }))),
);

/** In the short run some of each; caravan-tiny has the other tps. */
const isShort = ({ tp, chunk, golden }: (typeof combinations)[number]): boolean =>
  (tp === 2 && chunk === 7 && golden === 1) ||
  (tp === 3 && chunk === null && golden === 1) ||
  (tp === 8 && chunk === 7 && golden === 0);

for (const combination of combinations.filter((c) => isLong || isShort(c))) {
  const { tp, chunk, golden: index } = combination;
  void test(
    `stories260K at tp ${tp}, ${chunk === null ? 'in one pass' : `chunks of ${chunk}`}: golden ${index}`,
    { skip: skipWithout(sharedGolden.file) },
    async (t) => {
      const golden = sharedGolden.read()[index]!;
      const positions = [...golden.logits.keys()];
      const model = sharedPath(sharedGolden.model);
      const evaluation = await evaluate(model, golden.ids, positions, tp, chunk);
      assert.equal(evaluation.tokens, golden.ids.length);
      assert.deepEqual(evaluation.argmax, golden.argmax);
      let most = 0;
      for (const [position, expected] of golden.logits) {
        most = Math.max(most, distance(evaluation.logits[String(position)], expected));
      }
      t.diagnostic(`largest difference ${most.toExponential(1)}`);
      assert.ok(most < TOLERANCE, String(most));
      assert.equal(Object.keys(evaluation.logits).length, positions.length);
    },
  );
}

for (const tp of isLong ? [1, 2, 3, 4, 8] : [2]) {
  void test(
    `stories260K generates the golden text at tp ${tp}`,
    { skip: skipWithout(sharedGolden.text) },
    async () => {
      const model = sharedPath(sharedGolden.model);
      const args = ['generate', '--model', model, '--tp', String(tp), '--temperature', '0'];
      args.push('--ignore-eos', '--max-tokens', '200');
      const { text, completionTokens } = (await runCliJson(args)) as {
        text: string;
        completionTokens: number;
      };
      const golden = fs.readFileSync(sharedPath(sharedGolden.text), 'utf8');
      assert.equal(text.trimEnd(), golden.trimEnd());
      assert.equal(completionTokens, 200);
    },
  );
}

for (const tp of isLong ? [1, 2, 3, 4, 8] : [1, 4]) {
  void test(`caravan-tiny gives the oracle's tokens and logits at tp ${tp}`, async () => {
    const goldens = readTinyGolden();
    for (const golden of isLong ? goldens : goldens.slice(tp === 1 ? 0 : 1, tp === 1 ? 1 : 2)) {
      const ids = [...golden.promptIds, ...golden.ids];
      const last = golden.promptIds.length - 1;
      const evaluation = await evaluate(embeddedModelPath(), ids, [last], tp, tp === 4 ? 7 : null);
      assert.deepEqual(evaluation.argmax.slice(last, -1), golden.ids);
      assert.ok(distance(evaluation.logits[String(last)], golden.firstLogits) < TOLERANCE);
    }
  });
}

void test('caravan-tiny generates the oracle’s tokens', async () => {
  const golden = readTinyGolden().find(({ isChat }) => isChat)!;
  const file = path.join(scratch, 'chat.json');
  fs.writeFileSync(file, JSON.stringify([{ role: 'user', content: golden.prompt }]));
  const args = ['generate', '--tp', '2', '--chat', file, '--temperature', '0', '--ignore-eos'];
  const generation = (await runCliJson([...args, '--max-tokens', '24'])) as {
    tokenIds: number[];
    promptTokens: number;
    finishReason: string;
  };
  assert.deepEqual(generation.tokenIds, golden.ids.slice(0, 24));
  assert.equal(generation.promptTokens, golden.promptIds.length);
  assert.equal(generation.finishReason, 'length');
});
