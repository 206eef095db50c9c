import assert from 'node:assert/strict';
import { test } from 'node:test';
import { coin, philox, purpose } from '../coordinator/coin.js';
import type { Sampling } from '../coordinator/request.js';
import {
  mergeCandidates,
  pickToken,
  SAMPLED_TOP_K,
  wholeRowCandidates,
} from '../coordinator/sampler.js';
import type { StepResult } from '../proto/gen/cluster.js';
import { cut } from '../model/plan.js';
import { selectTopK } from '../worker/top-k.js';
import { Random } from './random.js';

type Settings = Omit<Sampling, 'seed'>;

/** What ranks would report of rows of logits. */
function reportsOf(
  rows: readonly Float32Array[],
  tp: number,
  topK: number,
  temperature: number,
): { results: StepResult[]; vocabCounts: number[] } {
  const slices = Array.from({ length: tp }, (_, rank) => cut(rows[0]!.length, tp, rank));
  const results = slices.map(({ start, count }): StepResult => {
    const topIds: number[] = [];
    const topLogits: number[] = [];
    const lse = (row: Float32Array, t: number) =>
      Math.log(row.subarray(start, start + count).reduce((sum, x) => sum + Math.exp(x / t), 0));
    for (const row of rows) {
      const ids = Array.from({ length: count }, (_, i) => start + i);
      ids.sort((a, b) => row[b]! - row[a]! || a - b);
      for (const id of ids.slice(0, topK)) {
        topIds.push(id);
        topLogits.push(row[id]!);
      }
    }
    return {
      number: 1,
      topIds,
      topLogits,
      lseRaw: rows.map((row) => lse(row, 1)),
      lseAdjusted: rows.map((row) => (temperature === 0 ? 0 : lse(row, temperature))),
      targetLogits: [],
      computeUs: 0,
      waitUs: 0,
      longestStretchUs: 0,
      copyUs: 0,
      bytesToDevice: 0,
      bytesToHost: 0,
    };
  });
  return { results, vocabCounts: slices.map(({ count }) => count) };
}

/** The whole row, sorted, cut and inverted, by the book. */
function reference(row: Float32Array, settings: Settings, drawn: number) {
  const { temperature, topP, topK, minP } = settings;
  const ids = Array.from(row, (_, id) => id).sort((a, b) => row[b]! - row[a]! || a - b);
  if (temperature === 0) return { token: ids[0]!, isEdge: false };
  let kept = ids.map((id) => ({ id, p: Math.exp((row[id]! - row[ids[0]!]!) / temperature) }));
  const normalise = () => {
    const sum = kept.reduce((total, { p }) => total + p, 0);
    kept = kept.map(({ id, p }) => ({ id, p: p / sum }));
  };
  normalise();
  if (topK > 0) {
    kept = kept.slice(0, topK);
    normalise();
  }
  // How near a decision comes to an edge that rounding could move.
  let nearest = 1;
  if (minP !== undefined) {
    const least = minP * kept[0]!.p;
    kept = kept.filter(({ p }) => {
      nearest = Math.min(nearest, Math.abs(p - least));
      return p >= least;
    });
    normalise();
  }
  if (topP < 1) {
    let before = 0;
    kept = kept.filter(({ p }) => {
      nearest = Math.min(nearest, Math.abs(before - topP));
      const isKept = before <= topP;
      before += p;
      return isKept;
    });
    normalise();
  }
  let sum = 0;
  let token = -1;
  for (const { id, p } of kept) {
    sum += p;
    nearest = Math.min(nearest, Math.abs(sum - drawn));
    if (token === -1 && sum > drawn) token = id;
  }
  return { token: token === -1 ? kept.at(-1)!.id : token, isEdge: nearest < 1e-12 };
}

void test('a token is the one that the whole row would give, whatever the ranks and settings', () => {
  const random = new Random(11);
  let wholeRows = 0;
  let partial = 0;
  for (let run = 0; run < 4000; run += 1) {
    const vocabSize = random.pick([5, 64, 65, 300, 1000]);
    const tp = 1 + random.below(Math.min(8, vocabSize));
    const spread = random.pick([0.05, 1, 3, 8]);
    const rowCount = 1 + random.below(3);
    // Rounded values make ties.
    const round = random.below(4) === 0;
    const rows = Array.from({ length: rowCount }, () =>
      Float32Array.from({ length: vocabSize }, () => {
        const logit = spread * random.normal();
        return round ? Math.round(logit) : logit;
      }),
    );
    const settings: Settings = {
      temperature: random.pick([0, 0.3, 0.8, 1, 2]),
      topP: random.pick([1, 1, 0.99, 0.9, 0.5, 0.01]),
      topK: random.pick([0, 0, 1, 5, 40, 64, 100, 5000]),
      ...random.pick([{}, {}, { minP: 1 }, { minP: 0.3 }, { minP: 0.02 }, { minP: 1e-6 }]),
    };
    const drawn = random.pick([random.next(), random.next(), 0, 0.9999999]);
    const topK = settings.temperature === 0 ? 1 : SAMPLED_TOP_K;
    const { results, vocabCounts } = reportsOf(rows, tp, topK, settings.temperature);
    rows.forEach((row, i) => {
      const candidates = mergeCandidates(results, vocabCounts, i);
      let token = pickToken(candidates, settings, drawn);
      if (token === null) {
        wholeRows += 1;
        assert.equal(candidates.isWhole, false);
        token = pickToken(wholeRowCandidates(row, candidates.lse), settings, drawn);
      } else if (!candidates.isWhole) partial += 1;
      const expected = reference(row, settings, drawn);
      if (!expected.isEdge) {
        const what = `${JSON.stringify(settings)}, coin ${drawn}, ${vocabSize} ids on ${tp}`;
        assert.equal(token, expected.token, what);
      }
    });
  }
  // Both ways are taken often, or this test proves nothing.
  assert.ok(wholeRows > 200 && partial > 200, `${wholeRows} whole rows, ${partial} partial`);
});

void test('merged candidates fall, ties rise by id, and end where a rank may have more', () => {
  const random = new Random(12);
  for (let run = 0; run < 500; run += 1) {
    const vocabSize = 2 + random.below(200);
    const tp = 1 + random.below(Math.min(8, vocabSize));
    const row = Float32Array.from({ length: vocabSize }, () => random.below(20));
    const topK = 1 + random.below(40);
    const { results, vocabCounts } = reportsOf([row], tp, topK, 1);
    const { ids, logits, lse, isWhole } = mergeCandidates(results, vocabCounts, 0);
    const sorted = Array.from(row, (_, id) => id).sort((a, b) => row[b]! - row[a]! || a - b);
    assert.deepEqual(ids, sorted.slice(0, ids.length));
    assert.deepEqual(
      logits,
      ids.map((id) => row[id]),
    );
    assert.equal(isWhole, ids.length === vocabSize);
    assert.ok(ids.length >= Math.min(topK, vocabSize));
    const exact = Math.log(row.reduce((sum, x) => sum + Math.exp(x), 0));
    assert.ok(Math.abs(lse - exact) < 1e-9);
  }
});

void test('a rank selects its largest logits in falling order, ties by rising id', () => {
  const random = new Random(13);
  for (let run = 0; run < 2000; run += 1) {
    const start = random.below(10);
    const count = 1 + random.below(150);
    const logits = Float32Array.from({ length: start + count + 5 }, () =>
      run % 2 === 0 ? random.below(10) : random.normal(),
    );
    const k = 1 + random.below(count);
    const ids: number[] = [];
    const values: number[] = [];
    selectTopK(logits, start, count, 100, k, ids, values, 0);
    const sorted = Array.from({ length: count }, (_, i) => i)
      .sort((a, b) => logits[start + b]! - logits[start + a]! || a - b)
      .slice(0, k);
    assert.deepEqual(
      ids,
      sorted.map((i) => 100 + i),
    );
    assert.deepEqual(
      values,
      sorted.map((i) => logits[start + i]),
    );
  }
});

void test('Philox gives the known answers of Random123', () => {
  const all = (word: number) => [word, word, word, word] as const;
  assert.deepEqual(philox(all(0), [0, 0]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
  assert.deepEqual(
    philox(all(0xffffffff), [0xffffffff, 0xffffffff]),
    [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd],
  );
  assert.deepEqual(
    philox([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
    [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1],
  );
});

void test('coins depend on seed, sequence and position alone, and are spread evenly', () => {
  const draw = (seed: number, index: number, position: number) =>
    coin(seed, index, position, purpose.sample);
  assert.equal(draw(42, 1, 7), draw(42, 1, 7));
  const seen = new Set<number>();
  const counts = new Array<number>(10).fill(0);
  for (const seed of [0, 1, -1, 2 ** 32, Number.MAX_SAFE_INTEGER, Number.MIN_SAFE_INTEGER]) {
    for (let index = 0; index < 4; index += 1) {
      for (let position = 0; position < 500; position += 1) {
        const drawn = draw(seed, index, position);
        assert.ok(drawn >= 0 && drawn < 1);
        seen.add(drawn);
        counts[Math.floor(10 * drawn)]! += 1;
      }
    }
  }
  assert.equal(seen.size, 12_000);
  // Six standard deviations around 1200.
  for (const count of counts) assert.ok(Math.abs(count - 1200) < 200, counts.join(' '));
});
