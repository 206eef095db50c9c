/** A model whose feed-forward networks and head are cut into several sessions answers as one whose are not. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openCheckpoint } from '../model/checkpoint.js';
import { planRanks } from '../model/plan.js';
import { weightForms, type WeightsMode } from '../model/weights.js';
import { DeviceKind, KvForm, SampledRows, Transport, Weights } from '../proto/gen/cluster.js';
import { Group } from '../worker/group.js';
import { HostShard } from '../worker/host-device.js';
import { Lobby } from '../worker/lobby.js';
import { Ort } from '../worker/ort.js';
import { partsOf, Shard } from '../worker/shard.js';
import { WeightLoader } from '../worker/weight-loader.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-segments-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

const ort = new Ort(1);
const LIMITS = { maxSeqLen: 64, maxBatchSize: 2, maxStepRows: 64, stepTimeoutMs: 10_000 };

/** All logits of the last two rows of a prompt, and of a token after it. */
async function logitsOf(
  folder: string,
  mode: WeightsMode,
  segmentBytes: number,
): Promise<Float32Array[]> {
  const checkpoint = openCheckpoint(folder);
  const { config, digest, path: modelPath } = checkpoint;
  const forms = weightForms(config, 1, mode, false);
  const plan = planRanks(config, 1, forms.ffnGrid)[0]!;
  const { signal } = new AbortController();
  const source = { kind: 'checkpoint', recorder: null } as const;
  const loader = new WeightLoader(ort, checkpoint, source, () => undefined, signal);
  const shard = await Shard.load(config, plan, forms, loader, null, segmentBytes);
  loader.close();
  const load = {
    ...{ protocol: 0, modelPath, checkpointDigest: digest, weights: Weights.WEIGHTS_INT8 },
    ...{ rank: 0, peers: ['127.0.0.1:1'], group: 'alone', isExact: false, weightCache: undefined },
    ...{
      transport: Transport.TRANSPORT_UNSPECIFIED,
      device: DeviceKind.DEVICE_KIND_UNSPECIFIED,
      kv: KvForm.KV_FORM_UNSPECIFIED,
      ...LIMITS,
    },
  };
  const own = new HostShard(ort, shard, { cachedBytes: 0, cacheFault: '' });
  const group = await Group.join(own, load, new Lobby(), signal);
  const step = (number: number, tokens: readonly number[], joins: boolean) => ({
    number,
    joins: joins ? [{ slot: 0, temperature: 0 }] : [],
    decodeSlots: [],
    decodeTokens: [],
    chunks: [
      { slot: 0, tokens: [...tokens], sampledRows: SampledRows.SAMPLED_ROWS_ALL, targets: [] },
    ],
    topK: 1,
  });
  const rows: Float32Array[] = [];
  for (const [number, tokens] of [
    [1, [5, 9, 300, 2, 77, 1, 44]],
    [2, [8, 250]],
  ] as const) {
    await group.forward.run(step(number, tokens, number === 1));
    for (let row = 0; row < tokens.length; row += 1) {
      rows.push(group.forward.row({ stepNumber: number, row, isAdjusted: false }).slice());
    }
  }
  group.close();
  shard.release();
  return rows;
}

const config = {
  ...{ hiddenSize: 128, ffnSize: 1152, layerCount: 2, headCount: 4, kvHeadCount: 2, headSize: 32 },
  ...{ vocabSize: 700, maxPositions: 64, normEps: 1e-5, ropeTheta: 10_000 },
};

const farthest = (a: readonly Float32Array[], b: readonly Float32Array[]): number =>
  Math.max(...a.flatMap((row, i) => [...row].map((logit, id) => Math.abs(logit - b[i]![id]!))));

for (const isHeadTied of [false, true]) {
  const head = isHeadTied ? 'a tied head' : 'a head of its own';
  void test(`with ${head}, cut or not, logits are the same`, async (t) => {
    const folder = path.join(scratch, `tied-${isHeadTied}`);
    const checkpoint = { config: { ...config, isHeadTied }, seed: 3, format: 'F32' } as const;
    writeRandomCheckpoint(folder, { ...checkpoint, shardCount: 1 });
    const whole = await logitsOf(folder, 'fp32', Infinity);
    assert.equal(whole.length, 9);
    assert.equal(whole[0]!.length, config.vocabSize);
    for (const mode of ['fp32', 'int8', 'int4+int8'] as const) {
      const one = await logitsOf(folder, mode, Infinity);
      // Three or more parts of each.
      const cut = await logitsOf(folder, mode, 40_000);
      const [apart, error] = [farthest(one, cut), farthest(one, whole)];
      t.diagnostic(
        `${mode}: ${apart.toExponential(1)} apart, ${error.toExponential(1)} from float32`,
      );
      // Scales of 8 bits cover the part that they belong to.
      assert.ok(mode === 'fp32' ? apart < 1e-5 : farthest(cut, whole) < 1.5 * error, String(apart));
    }
  });
}

void test('parts are disjoint and total, and cut on the grid of the whole', () => {
  for (const [start, count, parts, grid] of [
    [0, 1152, 3, 256],
    [7168, 7168, 5, 256],
    [333, 700, 4, 64],
    [10, 5, 4, 64],
    [0, 64, 1, 64],
  ] as const) {
    const found = partsOf({ start, count }, parts, grid);
    let end = 0;
    for (const part of found) {
      assert.equal(part.start, end);
      assert.ok(part.count > 0);
      assert.ok(part.start === 0 || (start + part.start) % grid === 0);
      end += part.count;
    }
    assert.equal(end, count);
    assert.ok(found.length <= parts + 1);
  }
});
