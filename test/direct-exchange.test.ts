/**
 * Ranks that read each other's partials on their devices. Here the devices are host memory that processes share: of a GPU's
 * only the way to open it differs. Same sums as through the host, nothing copied, all of a group or none of it.
 */
import assert from 'node:assert/strict';
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import { after, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import type { Config } from '../coordinator/config.js';
import { evaluate } from '../coordinator/evaluation.js';
import { planGroup } from '../coordinator/group-spec.js';
import { Ranks } from '../coordinator/ranks.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import type { DeviceKind } from '../model/device-name.js';
import { CaravanError } from '../proto/errors.js';
import { SampledRows, type Step } from '../proto/gen/cluster.js';
import { readTinyGolden } from './golden.js';
import { SharedSegment } from '../worker/shared-memory.js';
import type { DirectFault } from './host-memory-rank.js';

interface RankProcess {
  readonly child: ChildProcess;
  readonly address: string;
}

const started: RankProcess[] = [];
after(() => {
  for (const { child } of started) {
    child.kill('SIGKILL');
    // What a killed process has left has a name.
    for (const file of fs.readdirSync('/dev/shm')) {
      if (file.startsWith(`direct-${child.pid!}-`)) fs.rmSync(`/dev/shm/${file}`);
    }
  }
  SharedSegment.removeOrphans();
});

async function start(kind: DeviceKind, fault: DirectFault = 'none'): Promise<RankProcess> {
  const child = fork(fileURLToPath(new URL('host-memory-rank.js', import.meta.url)), [kind, fault]);
  const [message] = (await once(child, 'message')) as [{ address: string }];
  const rank = { child, address: message.address };
  started.push(rank);
  return rank;
}

const checkpoint = openCheckpoint(embeddedModelPath());
const limits = { maxSeqLen: 192, maxBatchSize: 2, maxStepRows: 64 };

async function withGroup<T>(
  processes: readonly RankProcess[],
  device: DeviceKind,
  {
    stepTimeoutMs,
    ...own
  }: { weights: Config['weights']; transport: Config['transport']; stepTimeoutMs?: number },
  use: (ranks: Ranks) => Promise<T>,
): Promise<T> {
  const terms = { ...limits, ...own, device, exact: false };
  const { spec } = planGroup(checkpoint, processes.length, terms);
  const ranks = await Ranks.connect(
    processes.map(({ address }) => address),
    stepTimeoutMs === undefined ? spec : { ...spec, stepTimeoutMs },
  );
  try {
    return await use(ranks);
  } finally {
    ranks.close();
  }
}

const noStep: Omit<Step, 'number'> = {
  ...{ joins: [], decodeSlots: [], decodeTokens: [], chunks: [] },
  topK: 2,
};
const prompt = (tokens: readonly number[]) => ({
  joins: [{ slot: 0, temperature: 0 }],
  chunks: [
    {
      ...{ slot: 0, tokens: [...tokens], targets: [] },
      sampledRows: SampledRows.SAMPLED_ROWS_LAST,
    },
  ],
});

/** Blocks that a process has mapped, by the name that they had. */
const blocksOf = ({ child }: RankProcess): string[] => [
  ...new Set(
    fs
      .readFileSync(`/proc/${child.pid!}/maps`, 'utf8')
      .split('\n')
      .flatMap((line) => /direct-\d+-\d+/.exec(line)?.[0] ?? []),
  ),
];

void test('the golden text, and no partial is copied', async () => {
  const processes = await Promise.all([start('webgpu'), start('webgpu')]);
  const own = { weights: 'fp32', transport: 'auto' } as const;
  await withGroup(processes, 'webgpu', own, async (ranks) => {
    for (const { transport, directFault } of ranks.loaded) {
      assert.deepEqual({ transport, directFault }, { transport: 'direct', directFault: '' });
    }
    assert.deepEqual(
      processes.map((rank) => blocksOf(rank).length),
      [2, 2],
    );
    const golden = readTinyGolden()[0]!;
    const ids: number[] = [];
    let results = await ranks.forward({ ...noStep, ...prompt(golden.promptIds), number: 1 });
    for (let number = 2; ids.length < golden.ids.length; number += 1) {
      const best = results.reduce((a, b) => (b.topLogits[0]! > a.topLogits[0]! ? b : a));
      ids.push(best.topIds[0]!);
      const decode = { decodeSlots: [0], decodeTokens: [ids.at(-1)!] };
      results = await ranks.forward({ ...noStep, ...decode, number });
      for (const { bytesToDevice, bytesToHost } of results) {
        // Token, position, last position, sampled row, inverse temperature; two logits and their places, two sums.
        assert.equal(bytesToDevice, 8 + 8 + 4 + 8 + 4);
        assert.equal(bytesToHost, 2 * (4 + 8) + 2 * 4);
      }
    }
    assert.deepEqual(ids, golden.ids);
  });
});

void test('the same logits as through the host, bit for bit, group after group', async () => {
  const processes = await Promise.all([0, 1, 2].map(() => start('cuda')));
  const tokens = Array.from({ length: 70 }, (_, i) => 3 + ((i * 41) % 900));
  const positions = [0, 31, 69];
  const logitsOver = (transport: Config['transport'], tp: number) =>
    withGroup(processes.slice(0, tp), 'cuda', { weights: 'fp16', transport }, async (ranks) => {
      const used = transport === 'auto' ? 'direct' : transport;
      assert.deepEqual(new Set(ranks.loaded.map((rank) => rank.transport)), new Set([used]));
      const { logits } = await evaluate(ranks, tokens, 23, positions, limits.maxSeqLen);
      return positions.map((position) => logits.get(position)!);
    });
  for (const tp of [2, 3]) {
    const direct = await logitsOver('direct', tp);
    assert.deepEqual(direct, await logitsOver('shm', tp));
    assert.deepEqual(direct, await logitsOver('auto', tp));
  }
});

for (const [fault, reason] of [
  ['shares-none', /rank 1 shares none of its memory: .*it shares none$/],
  ['opens-none', /rank 1 cannot read rank 0's memory: .*peer access is not supported$/],
  ['reads-zeros', /rank 1 reads something else than rank 0 has written$/],
] as const) {
  void test(`${fault}: all of the group go through shared memory, and --transport direct is refused`, async () => {
    const processes = [await start('webgpu'), await start('webgpu', fault)];
    const weights = 'fp32';
    await withGroup(processes, 'webgpu', { weights, transport: 'auto' }, async (ranks) => {
      for (const { transport, directFault } of ranks.loaded) {
        assert.equal(transport, 'shm');
        assert.match(directFault, reason);
      }
      const golden = readTinyGolden()[0]!;
      const results = await ranks.forward({ ...noStep, ...prompt(golden.promptIds), number: 1 });
      const best = results.reduce((a, b) => (b.topLogits[0]! > a.topLogits[0]! ? b : a));
      assert.equal(best.topIds[0], golden.ids[0]);
      // Nobody keeps what could not be used.
      assert.deepEqual(blocksOf(processes[0]!), []);
    });
    await assert.rejects(
      withGroup(processes, 'webgpu', { weights, transport: 'direct' }, () => Promise.resolve()),
      (error) =>
        error instanceof CaravanError &&
        error.code === 'invalid_request' &&
        error.message.includes('--transport direct: rank 1') &&
        reason.test(error.message),
    );
  });
}

void test("a peer that is killed ends the group; its memory is let go, and the next group has others'", async () => {
  const processes = await Promise.all([start('webgpu'), start('webgpu')]);
  const [survivor, victim] = processes;
  const own = { weights: 'fp32', transport: 'direct' } as const;
  await withGroup(processes, 'webgpu', own, async (ranks) => {
    victim.child.kill('SIGSTOP');
    const step = ranks.forward({ ...noStep, ...prompt([5, 6, 7]), number: 1 });
    const gone = once(victim.child, 'exit');
    victim.child.kill('SIGKILL');
    await assert.rejects(step, (e) => e instanceof CaravanError && e.code === 'rank_failed');
    await gone;
  });
  const next = [survivor, await start('webgpu')];
  await withGroup(next, 'webgpu', own, async (ranks) => {
    const golden = readTinyGolden()[0]!;
    const results = await ranks.forward({ ...noStep, ...prompt(golden.promptIds), number: 1 });
    const best = results.reduce((a, b) => (b.topLogits[0]! > a.topLogits[0]! ? b : a));
    assert.equal(best.topIds[0], golden.ids[0]);
    assert.ok(blocksOf(survivor).every((name) => !name.includes(`-${victim.child.pid!}-`)));
    assert.equal(blocksOf(survivor).length, 2);
  });
});

/** Partials that each rank's stream has shown by itself. */
const shownBy = (processes: readonly RankProcess[]): Promise<number[]> =>
  Promise.all(
    processes.map(async ({ child }) => {
      child.send('shown');
      const [{ shown }] = (await once(child, 'message')) as [{ shown: number }];
      return shown;
    }),
  );

/** A prompt and some greedy tokens after it, and all logits of the last one. */
async function generate(ranks: Ranks, count: number) {
  const ids: number[] = [];
  let results = await ranks.forward({ ...noStep, ...prompt([1, 5, 6, 7]), number: 1 });
  for (let number = 2; number <= count + 1; number += 1) {
    const best = results.reduce((a, b) => (b.topLogits[0]! > a.topLogits[0]! ? b : a));
    ids.push(best.topIds[0]!);
    const decode = { decodeSlots: [0], decodeTokens: [ids.at(-1)!] };
    results = await ranks.forward({ ...noStep, ...decode, number });
  }
  return { ids, logits: await ranks.fetchRow(count + 1, 0) };
}

void test('streams exchange by themselves once a step is captured, beside ranks whose streams cannot', async () => {
  const processes = await Promise.all([start('cuda'), start('cuda'), start('cuda', 'no-signals')]);
  const weights = 'fp16';
  // Of three ranks one exchanges as ranks without such streams do.
  for (const [tp, count] of [
    [2, 12],
    [3, 8],
  ] as const) {
    const group = processes.slice(0, tp);
    const before = await shownBy(group);
    const streamed = await withGroup(group, 'cuda', { weights, transport: 'direct' }, (ranks) =>
      generate(ranks, count),
    );
    const shown = (await shownBy(group)).map((count, rank) => count - before[rank]!);
    // Three steps are made and captured; then the embedding's and two of each layer, step by step.
    const exchanges = 2 * checkpoint.config.layerCount + 1;
    const own = (count - 3) * exchanges;
    assert.deepEqual(shown, [own, own, 0].slice(0, tp));
    const byHost = await withGroup(group, 'cuda', { weights, transport: 'shm' }, (ranks) =>
      generate(ranks, count),
    );
    assert.deepEqual(streamed, byHost);
  }
});

void test('a stream that waits for a killed peer is let go, and the rank serves the next group', async () => {
  const processes = await Promise.all([start('cuda', 'stalls'), start('cuda')]);
  const [survivor, victim] = processes;
  const own = { weights: 'fp16', transport: 'direct' } as const;
  await withGroup(processes, 'cuda', own, async (ranks) => {
    await generate(ranks, 6);
    assert.ok((await shownBy([survivor]))[0]! > 0);
    victim.child.kill('SIGSTOP');
    const step = ranks.forward({ ...noStep, decodeSlots: [0], decodeTokens: [9], number: 8 });
    const gone = once(victim.child, 'exit');
    victim.child.kill('SIGKILL');
    await assert.rejects(step, (e) => e instanceof CaravanError && e.code === 'rank_failed');
    await gone;
  });
  const next = [survivor, await start('cuda')];
  const { ids } = await withGroup(next, 'cuda', own, (ranks) => generate(ranks, 3));
  assert.equal(ids.length, 3);
});

void test('a stream that waits for a peer that hangs is let go at the deadline', async () => {
  const processes = await Promise.all([start('cuda', 'stalls'), start('cuda')]);
  const own = { weights: 'fp16', transport: 'direct' } as const;
  const stepTimeoutMs = 1_000;
  await withGroup(processes, 'cuda', { ...own, stepTimeoutMs }, async (ranks) => {
    await generate(ranks, 6);
    processes[1].child.kill('SIGSTOP');
    await assert.rejects(
      ranks.forward({ ...noStep, decodeSlots: [0], decodeTokens: [9], number: 8 }),
      /rank 1 .*no answer to step/,
    );
  });
  processes[1].child.kill('SIGKILL');
  const next = [processes[0], await start('cuda')];
  const { ids } = await withGroup(next, 'cuda', own, (ranks) => generate(ranks, 3));
  assert.equal(ids.length, 3);
});
