/** Weights in 8 and 4 bits: how near they come, that a tp changes nothing, and what they take. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { evaluate } from '../coordinator/evaluation.js';
import { planGroup, type GroupLimits, type GroupSpec } from '../coordinator/group-spec.js';
import { openModelTokenizer } from '../coordinator/model-tokenizer.js';
import { packageRoot } from '../coordinator/package-root.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import type { LlamaConfig } from '../model/config.js';
import { legalTps, planRanks } from '../model/plan.js';
import { weightForms, weightsCodes, type WeightForm, type WeightsMode } from '../model/weights.js';
import { CaravanError } from '../proto/errors.js';
import type { Weights } from '../proto/gen/cluster.js';
import { emptyLinear, type Linear } from '../worker/linear.js';
import { Ort } from '../worker/ort.js';
import { Quantizer } from '../worker/quantizer.js';
import { largeConfig } from './large-config.js';
import { Random } from './random.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-weights-'));
const pool = new RankPool();
const quantizer = new Quantizer(new Ort(1));
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true, force: true });
});

/** The weight (output, input) that a matrix stands for. */
function valueOf(linear: Linear, output: number, input: number) {
  switch (linear.kind) {
    case 'fp32':
      return linear.values[output * linear.inputs + input]!;
    case 'int8':
      return linear.values[input * linear.outputs + output]! * linear.scales[output]!;
    case 'int8Blocks': {
      const at = output * linear.inputs + input;
      return (linear.values[at]! - 128) * linear.scales[Math.floor(at / linear.block)]!;
    }
    case 'int4': {
      const at = output * linear.inputs + input;
      const nibble = (linear.values[at >> 1]! >> (4 * (at & 1))) & 15;
      const blocks = linear.inputs / linear.block;
      const block = Math.floor(input / linear.block);
      const pair = linear.zeros?.[output * Math.ceil(blocks / 2) + (block >> 1)] ?? 0x88;
      const zero = (pair >> (4 * (block & 1))) & 15;
      return (nibble - zero) * linear.scales[output * blocks + block]!;
    }
  }
}

const forms: readonly WeightForm[] = [
  { kind: 'fp32' },
  { kind: 'int8' },
  { kind: 'int4', block: 32 },
  { kind: 'int4', block: 128 },
  { kind: 'int4', block: 32, isCentred: true },
  { kind: 'int8Blocks', block: 32 },
];

for (const form of forms) {
  const isCentred = form.kind === 'int4' && form.isCentred === true;
  const name = 'block' in form ? `${form.kind} in blocks of ${form.block}` : form.kind;
  void test(`${name}${isCentred ? ' around 8' : ''}: every weight is within its step of what it was`, () => {
    const random = new Random(1);
    const [outputs, inputs] = [77, 256];
    const rows = Float32Array.from({ length: outputs * inputs }, () => random.next() - 0.3);
    rows.fill(0, 3 * inputs, 4 * inputs);
    const matrix = emptyLinear(form, outputs, inputs, { take: (n) => new ArrayBuffer(n) });
    // Rows come some at a time.
    for (const [first, count] of [
      [0, 5],
      [5, 40],
      [45, 32],
    ] as const) {
      quantizer.write(matrix, rows.subarray(first * inputs), first, count);
    }
    const block = 'block' in form ? form.block : inputs;
    // Half a step. With 4 bits a step is an eighth of the largest, and zero may lie half a step off, or the weight
    // opposite to the largest be cut off by a whole one.
    const eight = 0.5 / 127;
    const steps = { fp32: 0, fp16: 0, int8: eight, int8Blocks: eight, int4: 1 / 7.5 }[form.kind];
    let [lost, size] = [0, 0];
    for (let output = 0; output < outputs; output += 1) {
      for (let input = 0; input < inputs; input += 1) {
        const start = output * inputs + Math.floor(input / block) * block;
        const largest = rows
          .subarray(start, start + block)
          .reduce((m, x) => Math.max(m, Math.abs(x)), 0);
        const error = Math.abs(valueOf(matrix, output, input) - rows[output * inputs + input]!);
        assert.ok(error <= steps * largest * 1.0001, `${output}, ${input}: off by ${error}`);
        lost += error ** 2;
        size += rows[output * inputs + input]! ** 2;
      }
    }
    if (form.kind !== 'int4' || isCentred) return;
    const [told, seen] = [quantizer.errorOf(rows, block), Math.sqrt(lost / size)];
    assert.ok(told > 0.03 && Math.abs(told / seen - 1) < 1e-5, `${told} told, ${seen} seen`);
    assert.equal(quantizer.errorOf(new Float32Array(4 * block), block), 0);
  });
}

const heldOut = JSON.parse(
  fs.readFileSync(path.join(packageRoot, 'test/golden/held-out.json'), 'utf8'),
) as { stories: readonly string[] };

void test('caravan-tiny keeps its perplexity: 1 % with 8 bits, 6 % with 4', async (t) => {
  const tokenizer = openModelTokenizer(undefined);
  const stories = heldOut.stories.map((story) => [
    tokenizer.bosTokenId,
    ...tokenizer.encode(story),
  ]);
  const limits = { tp: 2, maxSeqLen: 256, maxBatchSize: 1, maxStepRows: 256 };
  const measure = async (weights: WeightsMode) => {
    let surprise = 0;
    let count = 0;
    const argmax: number[] = [];
    for (const ids of stories) {
      // A group begins with empty slots; ranks keep their weights from one to the next.
      const terms = { ...limits, weights, exact: false };
      const evaluation = await pool.withGroup(embeddedModelPath(), terms, ({ ranks }) =>
        evaluate(ranks, ids, 256, [], 256),
      );
      surprise += Math.log(evaluation.perplexity!) * (ids.length - 1);
      count += ids.length - 1;
      argmax.push(...evaluation.argmax);
    }
    return { perplexity: Math.exp(surprise / count), argmax };
  };
  const whole = await measure('fp32');
  for (const [mode, most] of [
    ['int8', 1.01],
    ['int4', 1.06],
  ] as const) {
    const { perplexity, argmax } = await measure(mode);
    const agreed = argmax.filter((id, i) => id === whole.argmax[i]).length / argmax.length;
    const ratio = perplexity / whole.perplexity;
    t.diagnostic(
      `${mode}: perplexity ${perplexity.toFixed(4)}, ${ratio.toFixed(4)} of fp32's; ` +
        `the likeliest token agrees at ${(100 * agreed).toFixed(1)} % of ${argmax.length} positions`,
    );
    assert.ok(ratio < most, `${mode}: ${ratio}`);
    assert.ok(agreed > 0.9, `${mode}: ${agreed}`);
  }
});

const config: LlamaConfig = {
  hiddenSize: 256,
  ffnSize: 768,
  layerCount: 2,
  headCount: 8,
  kvHeadCount: 4,
  headSize: 32,
  vocabSize: 300,
  maxPositions: 128,
  normEps: 1e-5,
  ropeTheta: 10_000,
  isHeadTied: true,
};

void test('a rank that holds some columns holds the same 4-bit weights as one that holds all', () => {
  const random = new Random(4);
  const [outputs, inputs] = [6, 768];
  const rows = Float32Array.from({ length: outputs * inputs }, () => random.next() - 0.5);
  const take = (n: number) => new ArrayBuffer(n);
  const block = 128;
  const whole = emptyLinear({ kind: 'int4', block }, outputs, inputs, { take });
  quantizer.write(whole, rows, 0, outputs);
  for (const tp of [2, 3]) {
    const shape = { ...config, hiddenSize: 2048, ffnSize: inputs };
    const { ffnGrid } = weightForms(shape, tp, 'int4', false);
    assert.equal(ffnGrid, block);
    for (const { ffn } of planRanks(shape, tp, ffnGrid)) {
      const part = emptyLinear({ kind: 'int4', block }, outputs, ffn.count, { take });
      for (let output = 0; output < outputs; output += 1) {
        const from = output * inputs + ffn.start;
        quantizer.write(part, rows.subarray(from, from + ffn.count), output, 1);
      }
      for (let output = 0; output < outputs; output += 1) {
        for (let input = 0; input < ffn.count; input += 1) {
          const value = valueOf(part, output, input);
          assert.equal(value, valueOf(whole, output, ffn.start + input));
        }
      }
    }
  }
});

void test('quantized logits stay near those of float32, and near each other at every tp', async (t) => {
  const folder = path.join(scratch, 'even');
  writeRandomCheckpoint(folder, { config, seed: 4, format: 'F32', shardCount: 1 });
  const random = new Random(4);
  const tokens = Array.from({ length: 40 }, () => random.below(config.vocabSize));
  const positions = [0, 20, 39];
  const logitsAt = (tp: number, weights: WeightsMode) =>
    pool.withGroup(
      folder,
      { tp, maxSeqLen: 128, maxBatchSize: 1, maxStepRows: 64, weights, exact: true },
      async ({ ranks }) => {
        const { logits } = await evaluate(ranks, tokens, 40, positions, 128);
        return positions.flatMap((position) => [...logits.get(position)!]);
      },
    );
  const meanDistance = (a: readonly number[], b: readonly number[]): number =>
    a.reduce((sum, x, i) => sum + Math.abs(x - b[i]!), 0) / a.length;
  const whole = await logitsAt(1, 'fp32');
  for (const [mode, nearFloat, nearEachOther] of [
    // Each rank scales what it holds of a row of 8 bits: rounded otherwise, no worse.
    ['int8', 0.1, 0.1],
    ['int4', 0.8, 0.03],
  ] as const) {
    const alone = await logitsAt(1, mode);
    const lost = meanDistance(alone, whole);
    const apart: number[] = [];
    for (const tp of [2, 3, 4]) apart.push(meanDistance(await logitsAt(tp, mode), alone));
    const shown = apart.map((distance) => distance.toExponential(1)).join(', ');
    t.diagnostic(`${mode}: ${lost.toFixed(4)} from float32; tp 2, 3, 4: ${shown} from tp 1`);
    assert.ok(lost > 0 && lost < nearFloat, `${mode}: ${lost}`);
    for (const distance of apart) assert.ok(distance < nearEachOther, `${mode}: ${distance}`);
  }
});

const wide = { ...config, hiddenSize: 2048, headCount: 64, kvHeadCount: 8, headSize: 128 };

void test('narrow models take blocks of 32, wide ones have the choice of larger ones', () => {
  const [narrow] = weightForms({ ...wide, hiddenSize: 1920 }, 2, 'int4', false).variants;
  assert.deepEqual(narrow!.qkv, { kind: 'int4', block: 32 });
  const [first] = weightForms({ ...wide, headSize: 64 }, 2, 'int4', false).variants;
  assert.deepEqual(first!.qkv, { kind: 'int4', block: 32, coarser: [128, 64] });
  assert.deepEqual(first!.o, { kind: 'int4', block: 32, coarser: [64] });
  const [exact] = weightForms(wide, 2, 'int4', true).variants;
  assert.deepEqual(exact!.down, { kind: 'int4', block: 16 });
});

void test('ranks are cut on the grid of blocks, as evenly as it allows', () => {
  for (const [ffnSize, tp, grid] of [
    [5632, 2, 128],
    [11008, 8, 128],
    [11008, 5, 128],
    [28672, 8, 128],
    // 43 blocks of 128 on 8 ranks would be 6 for some and 5 for others.
    [5504, 8, 64],
    [172, 2, 1],
  ] as const) {
    const shape = { ...wide, ffnSize };
    const chosen = weightForms(shape, tp, 'int4', false);
    assert.equal(chosen.ffnGrid, grid, `${ffnSize} on ${tp}`);
    const plans = planRanks(shape, tp, chosen.ffnGrid);
    assert.equal(
      plans.reduce((sum, { ffn }) => sum + ffn.count, 0),
      ffnSize,
    );
    assert.ok(plans.every(({ ffn }) => ffn.start % grid === 0));
    const most = Math.max(...plans.map(({ ffn }) => ffn.count));
    if (grid > 1) assert.ok(most <= (1.05 * ffnSize) / tp);
  }
  assert.equal(legalTps(config).length, 8);
});

void test('auto takes the fastest that fits, and exactness refuses what cannot be exact', () => {
  const folder = path.join(scratch, 'shape');
  writeRandomCheckpoint(folder, {
    ...{ config: { ...largeConfig(0.25), layerCount: 4 }, seed: 1 },
    ...{ format: 'BF16', shardCount: 1 },
  });
  const large = openCheckpoint(folder);
  const tiny = openCheckpoint(embeddedModelPath());
  const limits: GroupLimits = {
    ...{ weights: 'auto', exact: false, maxSeqLen: 128 },
    ...{ maxBatchSize: 1, maxStepRows: 64 },
  };
  assert.equal(planGroup(tiny, 2, limits).weights, 'fp32');
  const both = planGroup(large, 2, limits);
  assert.equal(both.weights, 'int4+int8');
  assert.equal(planGroup(large, 2, limits, both.neededBytes).weights, 'int4');
  assert.equal(planGroup(large, 2, { ...limits, exact: true }).weights, 'int8');
  // A device's rank refuses what does not fit, and is asked for less.
  for (const [device, modes] of [
    ['webgpu', ['fp16', 'int4']],
    ['cuda', ['fp16', 'int8', 'int4']],
  ] as const) {
    const asked: Weights[] = [];
    let spec: GroupSpec | null = planGroup(large, 2, { ...limits, device }).spec;
    for (; spec !== null; spec = spec.smaller) asked.push(spec.weights);
    assert.deepEqual(
      asked,
      modes.map((mode) => weightsCodes[mode]),
      device,
    );
  }
  assert.throws(
    () => planGroup(large, 2, { ...limits, weights: 'int4+int8', exact: true }),
    (error) => error instanceof CaravanError && /int4\+int8.*--exact/.test(error.message),
  );
});
