/** Ranks exchange partials in shared memory or over gRPC: the same sums, and nothing left behind by the dead. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import fs from 'node:fs';
import { after, test } from 'node:test';
import { evaluate } from '../coordinator/evaluation.js';
import { planGroup } from '../coordinator/group-spec.js';
import { startLocalRank, stopLocalRank } from '../coordinator/local-ranks.js';
import { Ranks } from '../coordinator/ranks.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { CaravanError } from '../proto/errors.js';
import { SampledRows } from '../proto/gen/cluster.js';
import { SharedSegment, sharedMemoryHost } from '../worker/shared-memory.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const pool = new RankPool();
after(() => pool.stop());

const limits = { maxSeqLen: 256, maxBatchSize: 2, maxStepRows: 128 };
const random = new Random(5);
const tokens = Array.from({ length: 90 }, () => 3 + random.below(1000));
const positions = [0, 1, 44, 89];

/** Segments of a process: those that still have a name in /dev/shm, and those that have none any more. */
function segmentsOf(pid: number): { named: string[]; unnamed: string[] } {
  const lines = fs.readFileSync(`/proc/${pid}/maps`, 'utf8').split('\n');
  const mapped = lines.filter((line) => line.includes('/dev/shm/caravan-'));
  const isUnnamed = (line: string): boolean => line.endsWith(' (deleted)');
  const nameOf = (line: string): string => /caravan-[0-9a-f-]+/.exec(line)![0];
  return {
    named: mapped.filter((line) => !isUnnamed(line)).map(nameOf),
    unnamed: mapped.filter(isUnnamed).map(nameOf),
  };
}

for (const tp of [2, 3, 8]) {
  void test(`tp ${tp}: shared memory and gRPC give the same logits, bit for bit`, async () => {
    const logitsOver = (transport: 'grpc' | 'shm') =>
      pool.withGroup(embeddedModelPath(), { ...limits, tp, transport }, async (group) => {
        const { logits } = await evaluate(group.ranks, tokens, 64, positions, limits.maxSeqLen);
        const { unnamed } = segmentsOf(group.processes[0]!.process.pid!);
        assert.equal(unnamed.length > 0, transport === 'shm', 'segments are mapped');
        return positions.map((position) => logits.get(position)!);
      });
    assert.deepEqual(await logitsOver('shm'), await logitsOver('grpc'));
  });
}

void test('segments have no name once ranks have exchanged, and are unmapped after the group', async () => {
  const pid = await pool.withGroup(
    embeddedModelPath(),
    { ...limits, tp: 2 },
    async ({ ranks, processes }) => {
      await evaluate(ranks, tokens, 64, [], limits.maxSeqLen);
      const own = processes[0]!.process.pid!;
      const { named, unnamed } = segmentsOf(own);
      assert.deepEqual(named, []);
      assert.equal(unnamed.length, 2, "its own and its peer's");
      return own;
    },
  );
  // The next group can only begin when the last is dissolved.
  await pool.withGroup(embeddedModelPath(), { ...limits, tp: 1 }, () => {
    assert.deepEqual(segmentsOf(pid), { named: [], unnamed: [] });
    return Promise.resolve();
  });
});

void test('a rank that is killed in mid-step ends its group, and what it leaves is removed', async () => {
  const ranks = await Promise.all(
    [0, 1].map(() => startLocalRank({ threads: 1, device: 'cpu', logLevel: 'silent' })),
  );
  const checkpoint = openCheckpoint(embeddedModelPath());
  const terms = { ...limits, weights: 'fp32', exact: true, transport: 'shm' } as const;
  const { spec } = planGroup(checkpoint, 2, terms);
  const group = await Ranks.connect(
    ranks.map(({ address }) => address),
    spec,
  );
  const victim = ranks[1]!.process;
  // Stopped, not dead: its peer waits for it in shared memory.
  victim.kill('SIGSTOP');
  const { named } = segmentsOf(victim.pid!);
  assert.equal(named.length, 2, 'before the first exchange segments have names');
  const chunk = {
    slot: 0,
    tokens: [5, 6],
    sampledRows: SampledRows.SAMPLED_ROWS_LAST,
    targets: [],
  };
  const step = group.forward({
    number: 1,
    joins: [{ slot: 0, temperature: 0 }],
    decodeSlots: [],
    decodeTokens: [],
    chunks: [chunk],
    topK: 1,
  });
  const gone = once(victim, 'exit');
  victim.kill('SIGKILL');
  await assert.rejects(
    step,
    (error) => error instanceof CaravanError && error.code === 'rank_failed',
  );
  await gone;
  group.close();
  const orphan = named.find((name) => name.endsWith('-1'))!;
  assert.ok(fs.existsSync(`/dev/shm/${orphan}`), 'a killed rank cannot clean up');
  const next = await startLocalRank({ threads: 1, device: 'cpu', logLevel: 'silent' });
  assert.ok(!fs.existsSync(`/dev/shm/${orphan}`), 'the next rank does');
  await Promise.all([stopLocalRank(ranks[0]!), stopLocalRank(next)]);
});

void test('the number of partials may wrap, and a living owner keeps its segment', () => {
  assert.notEqual(sharedMemoryHost(), null);
  const owner = SharedSegment.create('5eed', process.pid % 10_000, 16);
  try {
    SharedSegment.removeOrphans();
    assert.ok(fs.existsSync(`/dev/shm/${owner.name}`));
    const peer = SharedSegment.open(owner.name, 16);
    owner.turns[1].set([1.5, -2]);
    owner.publish(2 ** 31 - 1, 1, 2);
    assert.ok(peer.has(2 ** 31 - 1) && !peer.has(2 ** 31));
    assert.deepEqual([...peer.turns[1].subarray(0, peer.count(1))], [1.5, -2]);
    owner.publish(2 ** 31, 0, 3);
    assert.ok(peer.spin(2 ** 31, 0) && !peer.has(2 ** 31 + 1));
    const startMs = performance.now();
    peer.sleep(2 ** 31 + 1, 20);
    assert.ok(performance.now() - startMs >= 15, 'it slept');
    assert.throws(() => SharedSegment.open(owner.name, 100_000), /has \d+ bytes/);
    peer.close();
  } finally {
    owner.close();
  }
  assert.throws(() => SharedSegment.open(owner.name, 16), /cannot be opened/);
  assert.throws(() => SharedSegment.open('../etc/passwd', 16), /is no name of a segment/);
});
