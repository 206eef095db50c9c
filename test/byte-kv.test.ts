/** Keys and values in 8 bits: how near answers come, that scales grow without harm, and what it takes. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { after, test } from 'node:test';
import { evaluate } from '../coordinator/evaluation.js';
import { planGroup, type GroupLimits } from '../coordinator/group-spec.js';
import { openModelTokenizer } from '../coordinator/model-tokenizer.js';
import { packageRoot } from '../coordinator/package-root.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import type { KvMode } from '../model/weights.js';
import { ByteKvCache } from '../worker/byte-kv-cache.js';
import { attentionGraph } from '../worker/graph.js';
import { FloatKvCache, type KvCache } from '../worker/kv-cache.js';
import { Ort, type Session } from '../worker/ort.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const pool = new RankPool();
after(() => pool.stop());

const heldOut = JSON.parse(
  fs.readFileSync(path.join(packageRoot, 'test/golden/held-out.json'), 'utf8'),
) as { stories: readonly string[] };

void test('caravan-tiny keeps its perplexity with keys and values in 8 bits, at tp 1 and 2', async (t) => {
  const tokenizer = openModelTokenizer(undefined);
  const stories = heldOut.stories
    .slice(0, 3)
    .map((story) => [tokenizer.bosTokenId, ...tokenizer.encode(story)]);
  const measure = async (tp: number, kv: KvMode) => {
    let surprise = 0;
    let count = 0;
    for (const ids of stories) {
      const limits = { tp, kv, maxSeqLen: 256, maxBatchSize: 1, maxStepRows: 256, exact: false };
      // In chunks, so that later rows look at what was kept.
      const { perplexity } = await pool.withGroup(embeddedModelPath(), limits, ({ ranks }) =>
        evaluate(ranks, ids, 32, [], 256),
      );
      surprise += Math.log(perplexity!) * (ids.length - 1);
      count += ids.length - 1;
    }
    return Math.exp(surprise / count);
  };
  const floats = await measure(1, 'auto');
  for (const tp of [1, 2]) {
    const ratio = (await measure(tp, 'int8')) / floats;
    t.diagnostic(`tp ${tp}: ${ratio.toFixed(4)} of the perplexity with floats`);
    assert.ok(Math.abs(ratio - 1) < 0.005, `${ratio}`);
  }
});

const shape = { heads: 2, headSize: 16, maxSeqLen: 32, slotCount: 3, layerCount: 1 };
const width = shape.heads * shape.headSize;
const QUERY_HEADS = 4;
const config = { headSize: shape.headSize };
const plan = {
  queryHeads: { start: 0, count: QUERY_HEADS },
  kvHeads: { start: 0, count: shape.heads },
};
const ort = new Ort(1);
const sessionOf = (form: 'fp32' | 'int8'): Session =>
  ort.createSession(attentionGraph({ config, plan } as Parameters<typeof attentionGraph>[0], form));

/** Attention of one slot's next rows; they are appended to its keys and values. */
function attend(
  session: Session,
  kv: KvCache,
  slot: number,
  { q, k, v }: { q: Float32Array; k: Float32Array; v: Float32Array },
): Float32Array {
  const rows = k.length / width;
  const attended = new Float32Array(q.length);
  kv.admit(0, k, v, rows);
  const { keys, values } = kv.view(slot, 1)[0]!;
  const total = kv.lengths[slot]! + rows;
  const tensors = [
    ort.tensor(q, [1, rows, QUERY_HEADS * shape.headSize]),
    ort.tensor(k, [1, rows, width]),
    ort.tensor(v, [1, rows, width]),
  ];
  const last = ort.tensor(Int32Array.of(total - 1), [1]);
  const longest = ort.tensor(Int32Array.of(total), [1]);
  const out = ort.tensor(attended, [1, rows, QUERY_HEADS * shape.headSize]);
  const inputs = [...tensors, keys, values, last, longest, ...kv.scales(0)];
  session.run(inputs, [out, keys, values]);
  kv.lengths[slot] = total;
  for (const tensor of [...tensors, last, longest, out]) tensor.release();
  return attended;
}

void test('scales grow with what comes, and what the cache has stays what it was, also in copies', (t) => {
  const random = new Random(7);
  const normal = (count: number, scale: (i: number) => number) =>
    Float32Array.from({ length: count }, (_, i) => scale(i) * (random.next() - 0.5));
  // Channels of very different sizes, as Llama's keys have them; and one that is always zero.
  const channel = (i: number): number => [1, 40, 0.01, 0, 3][(i % width) % 5]!;
  const rowsOf = (count: number, growth: number) => ({
    q: normal(count * QUERY_HEADS * shape.headSize, () => 1),
    k: normal(count * width, (i) => growth * channel(i)),
    v: normal(count * width, (i) => growth * channel(i)),
  });
  const [floats, bytes] = [new FloatKvCache(ort, shape), new ByteKvCache(ort, shape)];
  const [floatSession, byteSession] = [sessionOf('fp32'), sessionOf('int8')];
  assert.equal(bytes.byteCount, floats.byteCount / 4);
  const compare = (slot: number, rows: ReturnType<typeof rowsOf>): number => {
    const wanted = attend(floatSession, floats, slot, rows);
    const got = attend(byteSession, bytes, slot, rows);
    const largest = wanted.reduce((m, x) => Math.max(m, Math.abs(x)), 0);
    const off = wanted.reduce((m, x, i) => Math.max(m, Math.abs(x - got[i]!)), 0);
    return off / largest;
  };
  const errors: number[] = [];
  // Each time larger values than ever: every channel is rounded anew.
  for (const [i, growth] of [1, 1.1, 2, 4].entries())
    errors.push(compare(0, rowsOf(3 + i, growth)));
  errors.push(compare(0, rowsOf(1, 4)));
  for (const kv of [floats, bytes]) {
    kv.copy(0, 2, 10);
    kv.lengths[2] = 10;
  }
  errors.push(compare(2, rowsOf(1, 4)), compare(1, rowsOf(5, 3)));
  t.diagnostic(`errors: ${errors.map((x) => x.toExponential(1)).join(', ')}`);
  for (const error of errors) assert.ok(error < 0.03, `${error}`);
  for (const releasable of [floats, bytes, floatSession, byteSession]) releasable.release();
});

void test('the plan counts a quarter of the bytes; exact runs and GPUs refuse', () => {
  const tiny = openCheckpoint(embeddedModelPath());
  const limits: GroupLimits = {
    ...{ weights: 'auto', exact: false, maxSeqLen: 64, maxBatchSize: 4, maxStepRows: 64 },
  };
  const bytesOf = (kv: KvMode) => planGroup(tiny, 2, { ...limits, kv }).ranks[0]!.kvBytes;
  assert.equal(4 * bytesOf('int8'), bytesOf('auto'));
  assert.throws(() => planGroup(tiny, 2, { ...limits, kv: 'int8', exact: true }), /--exact/);
  assert.throws(() => planGroup(tiny, 2, { ...limits, kv: 'int8', device: 'cuda' }), /--kv int8/);
});
