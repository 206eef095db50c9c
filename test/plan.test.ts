import assert from 'node:assert/strict';
import { test } from 'node:test';
import { parseHuggingFaceConfig, type LlamaConfig } from '../model/config.js';
import {
  kvBytes,
  legalTps,
  listSlices,
  planRanks,
  slicesOf,
  type Range,
  type RankPlan,
} from '../model/plan.js';
import { CaravanError } from '../proto/errors.js';
import { Random } from './random.js';

const shape = (fields: Partial<LlamaConfig>): LlamaConfig => ({
  hiddenSize: 64,
  ffnSize: 172,
  layerCount: 2,
  headCount: 8,
  kvHeadCount: 4,
  headSize: 8,
  vocabSize: 512,
  maxPositions: 512,
  normEps: 1e-5,
  ropeTheta: 10_000,
  isHeadTied: false,
  ...fields,
});

/** Llama 2 7B, 13B, 34B (as Code Llama), 70B, and shapes that nobody would choose. */
function shapes(): LlamaConfig[] {
  const random = new Random(7);
  const llama2 = [
    { hiddenSize: 4096, ffnSize: 11008, headCount: 32, kvHeadCount: 32 },
    { hiddenSize: 5120, ffnSize: 13824, headCount: 40, kvHeadCount: 40 },
    { hiddenSize: 8192, ffnSize: 22016, headCount: 64, kvHeadCount: 8 },
    { hiddenSize: 8192, ffnSize: 28672, headCount: 64, kvHeadCount: 8 },
  ].map((fields) => shape({ ...fields, headSize: 128, vocabSize: 32000 }));
  const odd = Array.from({ length: 60 }, () => {
    const kvHeadCount = 1 + random.below(9);
    return shape({
      kvHeadCount,
      headCount: kvHeadCount * (1 + random.below(8)),
      headSize: random.pick([2, 8, 64]),
      hiddenSize: 1 + random.below(100),
      ffnSize: 72 + random.below(200),
      vocabSize: 72 + random.below(500),
      isHeadTied: random.below(2) === 0,
    });
  });
  return [...llama2, shape({}), ...odd];
}

const everyPlan = function* (): Generator<[LlamaConfig, RankPlan[]]> {
  for (const config of shapes()) {
    for (const tp of legalTps(config)) yield [config, planRanks(config, tp)];
  }
};

/** The ranges follow each other from 0 to total: nothing twice, nothing left out, nobody without. */
function assertPartition(ranges: readonly Range[], total: number, what: string): void {
  let next = 0;
  for (const { start, count } of ranges) {
    assert.equal(start, next, what);
    assert.ok(count >= 1, `${what}: a rank with nothing`);
    next += count;
  }
  assert.equal(next, total, what);
}

function assertEven(ranges: readonly Range[], what: string): void {
  const counts = ranges.map(({ count }) => count);
  assert.ok(Math.max(...counts) - Math.min(...counts) <= 1, `${what}: ${counts.join(' ')}`);
}

void test('every query head, FFN column and vocabulary row has exactly one rank', () => {
  let plans = 0;
  for (const [config, ranks] of everyPlan()) {
    const what = `${JSON.stringify(config)} on ${ranks.length}`;
    assertPartition(
      ranks.map((rank) => rank.queryHeads),
      config.headCount,
      what,
    );
    for (const [key, total] of [
      ['ffn', config.ffnSize],
      ['vocab', config.vocabSize],
    ] as const) {
      const ranges = ranks.map((rank) => rank[key]);
      assertPartition(ranges, total, what);
      assertEven(ranges, what);
    }
    ranks.forEach((rank, i) => {
      assert.deepEqual([rank.rank, rank.tp], [i, ranks.length]);
    });
    plans += 1;
  }
  assert.ok(plans > 500);
});

void test('KV heads are whole up to their number, and repeat only above it', () => {
  for (const [config, ranks] of everyPlan()) {
    const groupSize = config.headCount / config.kvHeadCount;
    const what = `${config.headCount}/${config.kvHeadCount} heads on ${ranks.length}`;
    const kvHeads = ranks.map((rank) => rank.kvHeads);
    if (ranks.length <= config.kvHeadCount) {
      assertPartition(kvHeads, config.kvHeadCount, what);
      assertEven(kvHeads, what);
      for (const { queryHeads, kvHeads: held } of ranks) {
        assert.equal(queryHeads.start, held.start * groupSize, what);
        assert.equal(queryHeads.count, held.count * groupSize, what);
      }
      continue;
    }
    for (const { queryHeads, kvHeads: held } of ranks) {
      assert.equal(held.count, 1, what);
      const last = queryHeads.start + queryHeads.count - 1;
      assert.equal(Math.floor(queryHeads.start / groupSize), held.start, what);
      assert.equal(Math.floor(last / groupSize), held.start, what);
    }
    assert.equal(new Set(kvHeads.map(({ start }) => start)).size, config.kvHeadCount, what);
    // Ranks are dealt to KV heads as evenly as can be.
    const ranksOf = Array.from(
      { length: config.kvHeadCount },
      (_, head) => kvHeads.filter(({ start }) => start === head).length,
    );
    assert.ok(Math.max(...ranksOf) - Math.min(...ranksOf) <= 1, what);
  }
});

void test('three KV heads on two ranks are two and one', () => {
  const ranks = planRanks(shape({ headCount: 6, kvHeadCount: 3 }), 2);
  assert.deepEqual(
    ranks.map(({ kvHeads, queryHeads }) => [kvHeads.count, queryHeads.count]),
    [
      [2, 4],
      [1, 2],
    ],
  );
});

void test('the slices of all ranks cover every element of every matrix', () => {
  for (const [config, ranks] of everyPlan()) {
    if (config.hiddenSize > 1000 && ranks.length > 9) continue;
    const covered = new Map<string, number>();
    const whole = new Map<string, number>();
    for (const rank of ranks) {
      const slices = listSlices(slicesOf(config, rank));
      assert.equal(new Set(slices.map(({ tensor }) => tensor)).size, slices.length);
      for (const { tensor, shape: full, rows, columns } of slices) {
        const [rowCount, columnCount] = full.length === 1 ? [1, full[0]!] : [full[0]!, full[1]!];
        assert.ok(rows.start >= 0 && rows.start + rows.count <= rowCount, tensor);
        assert.ok(columns.start >= 0 && columns.start + columns.count <= columnCount, tensor);
        covered.set(tensor, (covered.get(tensor) ?? 0) + rows.count * columns.count);
        whole.set(tensor, rowCount * columnCount);
      }
    }
    // With disjoint ranges (above), as many elements as there are means: each of them once.
    const kvHeads = ranks.reduce((sum, rank) => sum + rank.kvHeads.count, 0);
    for (const [tensor, total] of whole) {
      const times = /norm/.test(tensor)
        ? ranks.length
        : /[kv]_proj/.test(tensor)
          ? kvHeads / config.kvHeadCount
          : 1;
      assert.equal(covered.get(tensor), Math.round(total * times), `${tensor} on ${ranks.length}`);
    }
    assert.equal(whole.has('lm_head.weight'), !config.isHeadTied);
    assert.equal(whole.size, 9 * config.layerCount + (config.isHeadTied ? 2 : 3));
  }
});

void test('an illegal tp is refused with the legal ones', () => {
  const config = shape({});
  for (const tp of [0, -1, 1.5, 9, NaN]) {
    assert.throws(
      () => planRanks(config, tp),
      (error) =>
        error instanceof CaravanError &&
        error.code === 'illegal_tp' &&
        error.message.includes('from 1 to 8'),
    );
  }
  assert.deepEqual(legalTps(config), [1, 2, 3, 4, 5, 6, 7, 8]);
});

void test('KV bytes are keys and values of every layer, slot and position in float32', () => {
  // Llama 2 70B on 8 ranks: 80 layers of one KV head of 128 channels.
  const config = shape({ layerCount: 80, headCount: 64, kvHeadCount: 8, headSize: 128 });
  for (const plan of planRanks(config, 8)) {
    assert.equal(kvBytes(config, plan, 4096, 16), 2 * 80 * 128 * 4 * 4096 * 16);
  }
});

void test('a configuration that contradicts itself is refused by field and value', () => {
  const json = {
    model_type: 'llama',
    hidden_size: 64,
    intermediate_size: 172,
    num_hidden_layers: 2,
    num_attention_heads: 8,
    num_key_value_heads: 4,
    vocab_size: 512,
  };
  const messageOf = (fields: object): string => {
    try {
      parseHuggingFaceConfig(JSON.stringify({ ...json, ...fields }), 'config.json');
    } catch (error) {
      assert.ok(error instanceof CaravanError);
      return error.message;
    }
    return 'nothing';
  };
  assert.equal(messageOf({}), 'nothing');
  assert.match(messageOf({ num_key_value_heads: 3 }), /num_key_value_heads 3/);
  assert.match(messageOf({ num_attention_heads: 7, num_key_value_heads: 7 }), /heads 7/);
  assert.match(messageOf({ hidden_size: 0 }), /hidden_size/);
  assert.match(messageOf({ hidden_size: 'big' }), /hidden_size/);
  assert.match(messageOf({ model_type: 'gpt2' }), /model_type.*gpt2/);
  assert.equal(messageOf({ rope_scaling: { type: 'linear', factor: 2 } }), 'nothing');
  assert.match(messageOf({ rope_scaling: { type: 'linear' } }), /rope_scaling.factor/);
  assert.match(messageOf({ rope_scaling: { type: 'yarn', factor: 2 } }), /rope_scaling.*yarn/);
});
