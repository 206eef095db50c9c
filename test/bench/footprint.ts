/**
 * What ranks hold in memory beside their weights and positions, and how much garbage a step makes.
 *
 *   node dist/test/bench/footprint.js MODEL [--weights MODE] [--tp 2] [--steps 500] [--prompt 400]
 *
 * The engine is in this process: `node --min-semi-space-size=32 --max-semi-space-size=32 ...` gives it what coordinators have.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import { PerformanceObserver, constants } from 'node:perf_hooks';
import { parseArgs } from 'node:util';
import type { Config } from '../../coordinator/config.js';
import { RankEngine } from '../../coordinator/engine.js';
import { stepExecArgv } from '../../coordinator/local-ranks.js';
import { planGroup } from '../../coordinator/group-spec.js';
import { workerEntry } from '../../coordinator/package-root.js';
import { Ranks } from '../../coordinator/ranks.js';
import { openCheckpoint } from '../../model/checkpoint.js';
import { kvBytes } from '../../model/plan.js';
import { fakeTokenizer } from '../fake-tokenizer.js';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    weights: { type: 'string', default: 'int4+int8' },
    tp: { type: 'string', default: '2' },
    steps: { type: 'string', default: '500' },
    prompt: { type: 'string', default: '400' },
  },
});
const [model] = positionals;
if (model === undefined) throw new Error('usage: footprint MODEL');
const tp = Number(values.tp);
const stepCount = Number(values.steps);
const promptLength = Number(values.prompt);

/** A rank that tells its collections on stdout. */
interface TracedRank {
  readonly child: ChildProcess;
  readonly address: string;
  scavenges: number;
  markings: number;
}

async function startRank(): Promise<TracedRank> {
  const args = ['--listen', '127.0.0.1:0', '--threads', '1', '--log-level', 'silent'];
  const child = fork(workerEntry, args, {
    execArgv: [...stepExecArgv, '--trace-gc'],
    stdio: ['ignore', 'pipe', 'inherit', 'ipc'],
  });
  const [{ address }] = (await once(child, 'message')) as [{ address: string }];
  const rank = { child, address, scavenges: 0, markings: 0 };
  child.stdout!.setEncoding('utf8').on('data', (lines: string) => {
    rank.scavenges += lines.split('Scavenge').length - 1;
    rank.markings += lines.split('Mark-Compact').length - 1;
  });
  return rank;
}

/** Bytes of a process that nobody else holds, and its share of what others hold too. */
const pssOf = ({ child }: TracedRank): number =>
  1024 *
  Number(
    /^Pss:\s+(\d+) kB$/m.exec(fs.readFileSync(`/proc/${child.pid!}/smaps_rollup`, 'utf8'))![1],
  );
const sum = (numbers: readonly number[]): number => numbers.reduce((a, b) => a + b, 0);
const megabytes = (bytes: number): string => `${(bytes / 1e6).toFixed(0)} MB`;
const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

const ranks = await Promise.all(Array.from({ length: tp }, startRank));
try {
  const idle = sum(ranks.map(pssOf));
  const checkpoint = openCheckpoint(model);
  const limits = { maxSeqLen: promptLength + stepCount + 64, maxBatchSize: 4, maxStepRows: 256 };
  const weights = values.weights as Config['weights'];
  const { spec, ranks: planned } = planGroup(checkpoint, tp, { weights, exact: false, ...limits });
  const group = await Ranks.connect(
    ranks.map(({ address }) => address),
    spec,
  );
  let ownScavenges = 0;
  const observer = new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) {
      const { kind } = (entry as unknown as { detail: { kind: number } }).detail;
      if (kind === constants.NODE_PERFORMANCE_GC_MINOR) ownScavenges += 1;
    }
  });
  observer.observe({ entryTypes: ['gc'] });
  let steps = 0;
  const begin = { own: 0, ranks: ranks.map(() => 0), markings: ranks.map(() => 0) };
  const engine = new RankEngine(group, fakeTokenizer(checkpoint.config.vocabSize), {
    ...limits,
    isExact: false,
    draftTokens: 0,
    onStep: ({ rows }) => {
      steps = rows === 1 ? steps + 1 : 0;
      if (steps !== 20) return;
      begin.own = ownScavenges;
      ranks.forEach(({ scavenges, markings }, i) => {
        begin.ranks[i] = scavenges;
        begin.markings[i] = markings;
      });
    },
  });
  const stop = new AbortController();
  const running = engine.run(stop.signal);
  await new Promise<void>((resolve, reject) => {
    const promptTokenIds = Array.from({ length: promptLength }, (_, i) => 3 + ((i * 37) % 250));
    const request = {
      ...{
        version: 1 as const,
        model: 'bench',
        promptTokenIds,
        maxTokens: stepCount + 21,
        stop: [],
      },
      ...{ ignoreEos: true, isTextStart: false },
      sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    };
    engine.add(
      { id: 'bench', request, index: 0, resumeTokenIds: [] },
      {
        token: () => undefined,
        end: () => {
          resolve();
        },
        fail: reject,
      },
    );
  });
  const loaded = sum(ranks.map(pssOf));
  const weightBytes = sum(group.loaded.map((rank) => rank.weightBytes));
  const positions = promptLength + stepCount + 20;
  const kvInUse = sum(planned.map(({ plan }) => kvBytes(checkpoint.config, plan, positions, 1)));
  const ratio = (loaded - idle) / (weightBytes + kvInUse);
  print(
    `weights ${values.weights}, tp ${tp}: ${megabytes(weightBytes)}, positions in use ${megabytes(kvInUse)}`,
  );
  print(
    `Σ PSS of ranks ${megabytes(loaded)}, idle ${megabytes(idle)}: ${ratio.toFixed(3)} of weights and positions`,
  );
  print(
    `${stepCount} decode steps: scavenges of ranks ${ranks.map(({ scavenges }, i) => scavenges - begin.ranks[i]!).join(', ')}, ` +
      `whole collections ${ranks.map(({ markings }, i) => markings - begin.markings[i]!).join(', ')}; of the engine ${ownScavenges - begin.own}`,
  );
  stop.abort();
  await running;
} finally {
  for (const { child } of ranks) child.kill('SIGKILL');
}
