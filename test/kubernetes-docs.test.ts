/** docs/kubernetes.md: its sizes are what the plan says, and every alert has an entry of what to do. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { parse } from 'yaml';
import { packageRoot } from '../coordinator/package-root.js';
import type { LlamaConfig } from '../model/config.js';
import { kvBytes, planRanks } from '../model/plan.js';
import { graphBytes, kvElementBytes, weightBytes, weightForms } from '../model/weights.js';
import { render, skipWithoutHelm } from './chart.js';

const docs = fs.readFileSync(path.join(packageRoot, 'docs/kubernetes.md'), 'utf8');
const alerts = fs.readFileSync(path.join(packageRoot, 'helm/caravan/files/alerts.yaml'), 'utf8');

const shape = (
  layerCount: number,
  hiddenSize: number,
  ffnSize: number,
  headCount: number,
  kvHeadCount: number,
): LlamaConfig => ({
  ...{ hiddenSize, ffnSize, layerCount, headCount, kvHeadCount },
  ...{ headSize: 128, vocabSize: 32_000, maxPositions: 4096, normEps: 1e-5, ropeTheta: 10_000 },
  isHeadTied: false,
});

const models = [
  ['7B', shape(32, 4096, 11_008, 32, 32), [1, 2]],
  ['13B', shape(40, 5120, 13_824, 40, 40), [1, 2, 4]],
  ['70B', shape(80, 8192, 28_672, 64, 8), [1, 2, 4, 8]],
] as const;

const SLOTS = 16;
const POSITIONS = 4096;
const CARDS_GB = [24, 48, 80, 141];
const USABLE = 0.95;

/** Gigabytes that the fullest card holds. */
function fullestCard(config: LlamaConfig, tp: number, mode: 'fp16' | 'int8' | 'int4') {
  const forms = weightForms(config, tp, mode, false, 'cuda');
  const ranks = planRanks(config, tp, forms.ffnGrid).map((plan) => {
    const element = kvElementBytes('cuda', mode, 'auto');
    const kv = kvBytes(config, plan, POSITIONS, SLOTS, element) / 1e9;
    const weights = weightBytes(config, plan, forms) / 1e9;
    return { weights, kv, all: weights + kv + graphBytes(config, forms, 'cuda') / 1e9 };
  });
  return ranks.reduce((most, rank) => (rank.all > most.all ? rank : most));
}

/** Rows of the table, as cells. */
const sizes = models.flatMap(([name, config, tps]) =>
  (['fp16', 'int8', 'int4'] as const).flatMap((mode) =>
    tps.map((tp) => {
      const { weights, kv, all } = fullestCard(config, tp, mode);
      const card = CARDS_GB.find((gigabytes) => USABLE * gigabytes >= all);
      const cards = card === undefined ? 'none: a higher tp' : `${tp} × ${card} GB`;
      return [name, mode, String(tp), `${weights.toFixed(1)} GB`, `${kv.toFixed(1)} GB`, cards];
    }),
  ),
);

void test('the sizes are those that the plan gives', () => {
  const section = /<!-- sizes -->\n([^]*)<!-- end of sizes -->/.exec(docs)![1]!;
  const rows = section
    .split('\n')
    .filter((line) => line.startsWith('|'))
    .slice(2)
    .map((line) =>
      line
        .split('|')
        .slice(1, -1)
        .map((cell) => cell.trim()),
    );
  assert.deepEqual(rows, sizes);
  // Nothing so small that it says nothing.
  assert.ok(sizes.length > 15);
});

void test('the runbook has an entry for each alert, and none for others', () => {
  const inRunbook = [...docs.matchAll(/^\| `(Caravan\w+)` /gm)].map(([, name]) => name);
  const inRules = [...alerts.matchAll(/- alert: (\w+)/g)].map(([, name]) => name);
  assert.ok(inRules.length > 8);
  assert.deepEqual(inRunbook, [...new Set(inRunbook)]);
  assert.deepEqual(inRunbook.toSorted(), inRules.toSorted());
});

void test('the values that the docs show are taken', { skip: skipWithoutHelm }, () => {
  const readme = fs.readFileSync(path.join(packageRoot, 'helm/caravan/README.md'), 'utf8');
  const examples = [...`${docs}\n${readme}`.matchAll(/```yaml\n([^]*?)```/g)];
  assert.ok(examples.length >= 2);
  for (const [, text] of examples) {
    const objects = render(parse(text!) as object);
    assert.ok(objects.some(({ kind }) => kind === 'ScaledObject'));
  }
});
