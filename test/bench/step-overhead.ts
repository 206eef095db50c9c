/**
 * Where the time of a step goes, beside computing.
 *
 *   node dist/test/bench/step-overhead.js
 *
 * First two processes exchange partials over the ranks' own gRPC path, with 0.7 ms of work before each exchange.
 * Then engines run whole steps on real ranks: what the coordinator and its stream to the ranks add, and what comes
 * out. Figures are of this machine, and of whatever else runs on it.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { RankEngine } from '../../coordinator/engine.js';
import type { StepFigures } from '../../coordinator/step-figures.js';
import type { Request } from '../../coordinator/request.js';
import { embeddedModelPath, openCheckpoint } from '../../model/checkpoint.js';
import { fakeTokenizer } from '../fake-tokenizer.js';
import { largeConfig } from '../large-config.js';
import { writeRandomCheckpoint } from '../random-checkpoint.js';
import { RankPool } from '../rank-pool.js';
import type { PeerResult, PeerTask } from './all-reduce-peer.js';

const KB = 1024;
const byteCounts = [2, 8, 16, 32, 64, 128, 256, 512, 2048].map((kilobytes) => kilobytes * KB);

const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

function percentile(values: readonly number[], p: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(p * sorted.length))]!;
}

const p50p99 = (values: readonly number[], digits: number): string =>
  `${percentile(values, 0.5).toFixed(digits).padStart(8)} ${percentile(values, 0.99).toFixed(digits).padStart(8)}`;

/** Both ranks' waits of each tenth of the time: other processes do not disturb all of them alike. */
const tenths = (waits: readonly (readonly number[])[]): number[][] =>
  Array.from({ length: 10 }, (_, i) =>
    waits.flatMap((own) => own.slice((i * own.length) / 10, ((i + 1) * own.length) / 10)),
  );

const answerOf = <T>(child: ChildProcess): Promise<T> =>
  new Promise((resolve, reject) => {
    child.once('message', (message) => {
      resolve(message as T);
    });
    child.once('exit', () => {
      reject(new Error('a peer ended early'));
    });
  });

async function benchAllReduce(
  transport: PeerTask['transport'],
  workMs: number,
  rounds: number,
): Promise<void> {
  const entry = fileURLToPath(new URL('all-reduce-peer.js', import.meta.url));
  const children = [fork(entry), fork(entry)];
  try {
    const addresses = await Promise.all(children.map((child) => answerOf<string>(child)));
    const group = randomUUID();
    const results = await Promise.all(
      children.map((child, rank) => {
        const task: PeerTask = { rank, addresses, byteCounts, rounds, workMs, group, transport };
        child.send(task);
        return answerOf<PeerResult>(child);
      }),
    );
    print(
      `\nall-reduce between two ranks over ${transport}, ${workMs} ms of work before each: µs until the peer's partial is whole`,
    );
    print('     KB      p50      p99   p50 of the quietest tenth');
    byteCounts.forEach((byteCount, i) => {
      const waitsUs = results.map(({ waitsMs }) => waitsMs[i]!.map((ms) => 1000 * ms));
      const quietest = Math.min(...tenths(waitsUs).map((tenth) => percentile(tenth, 0.5)));
      print(
        `${String(byteCount / KB).padStart(7)} ${p50p99(waitsUs.flat(), 0)} ${quietest.toFixed(0).padStart(8)}`,
      );
    });
  } finally {
    for (const child of children) child.disconnect();
  }
}

interface Scenario {
  readonly name: string;
  readonly folder: string;
  readonly tp: number;
  readonly sequences: number;
  readonly temperature: number;
  readonly tokens: number;
}

async function benchEngine(pool: RankPool, scenario: Scenario): Promise<void> {
  const { name, folder, tp, sequences, temperature, tokens } = scenario;
  const { vocabSize } = openCheckpoint(folder).config;
  const limits = { maxSeqLen: 512, maxBatchSize: 16, maxStepRows: 128 };
  await pool.withGroup(folder, { tp, ...limits }, async ({ ranks }) => {
    // What the ranks say of a step, beside what the engine does.
    let rankMs = 0;
    const forward = ranks.forward.bind(ranks);
    ranks.forward = async (step) => {
      const results = await forward(step);
      rankMs = Math.max(...results.map(({ computeUs, waitUs }) => computeUs + waitUs)) / 1000;
      return results;
    };
    const steps: { figures: StepFigures; rankMs: number }[] = [];
    const engine = new RankEngine(ranks, fakeTokenizer(vocabSize), {
      ...limits,
      isExact: true,
      onStep: (figures) => steps.push({ figures, rankMs }),
    });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const generateAll = (count: number) =>
      Promise.all(
        Array.from({ length: sequences }, (_, i) => {
          const promptTokenIds = Array.from({ length: 8 }, (__, j) => (i * 31 + j) % vocabSize);
          const sampling = { temperature, topP: 0.95, topK: 0, seed: i };
          return generate(engine, { ...greedyRequest, promptTokenIds, sampling, maxTokens: count });
        }),
      );
    await generateAll(16);
    steps.length = 0;
    const startMs = performance.now();
    await generateAll(tokens);
    const seconds = (performance.now() - startMs) / 1000;
    stop.abort();
    await running;
    // Steps of the full batch, without prompts.
    const full = steps.filter(({ figures }) => figures.rows === sequences);
    const { layerCount } = openCheckpoint(folder).config;
    const of = (figure: (step: (typeof full)[number]) => number) => full.map(figure);
    print(
      [
        `${name}, tp ${tp}, batch ${sequences}, ${temperature === 0 ? 'greedy' : 'sampled'}`.padEnd(
          46,
        ),
        p50p99(
          of(({ figures }) => figures.totalMs),
          2,
        ),
        p50p99(
          of(({ figures }) => figures.totalMs - figures.ranksMs),
          2,
        ),
        p50p99(
          of((step) => step.figures.ranksMs - step.rankMs),
          2,
        ),
        p50p99(
          of(({ figures }) => (1000 * figures.waitMs) / (2 * layerCount + 1)),
          0,
        ),
        ((sequences * tokens) / seconds).toFixed(1).padStart(8),
      ].join(' |'),
    );
  });
}

/** Prompts of many tokens: how long a rank is deaf, and how soon it answers a ping meanwhile. */
async function benchPrefill(pool: RankPool, folder: string, tp: number): Promise<void> {
  const limits = { maxSeqLen: 512, maxBatchSize: 8, maxStepRows: 512 };
  const promptTokens = 400;
  await pool.withGroup(folder, { tp, ...limits }, async ({ checkpoint, ranks }) => {
    const stretchesMs: number[] = [];
    const engine = new RankEngine(ranks, fakeTokenizer(checkpoint.config.vocabSize), {
      ...limits,
      isExact: true,
      onStep: ({ stretchMs }) => stretchesMs.push(stretchMs),
    });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const pingsMs: number[] = [];
    const done = new AbortController();
    const pinging = (async () => {
      while (!done.signal.aborted) pingsMs.push(Math.max(...(await ranks.ping())));
    })();
    const startMs = performance.now();
    await Promise.all(
      Array.from({ length: limits.maxBatchSize }, (_, i) => {
        const promptTokenIds = Array.from({ length: promptTokens }, (__, j) => (i * 77 + j) % 4096);
        return generate(engine, { ...greedyRequest, promptTokenIds, maxTokens: 1 });
      }),
    );
    const seconds = (performance.now() - startMs) / 1000;
    done.abort();
    await pinging;
    stop.abort();
    await running;
    print(
      [
        `hidden 4096, 4 layers, tp ${tp}`.padEnd(46),
        p50p99(stretchesMs, 1),
        Math.max(...stretchesMs)
          .toFixed(1)
          .padStart(8),
        p50p99(pingsMs, 1),
        ((limits.maxBatchSize * promptTokens) / seconds).toFixed(0).padStart(8),
      ].join(' |'),
    );
  });
}

const greedyRequest = {
  version: 1,
  model: 'random',
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
  stop: [],
  ignoreEos: true,
  isTextStart: false,
} as const;

const generate = (engine: RankEngine, request: Request): Promise<string> =>
  new Promise((resolve, reject) => {
    engine.add(
      { id: 'bench', request, index: 0, resumeTokenIds: [] },
      { token: () => undefined, end: resolve, fail: reject },
    );
  });

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-bench-'));
const pool = new RankPool();
try {
  print(
    `${os.cpus()[0]?.model ?? 'unknown CPU'}, ${os.availableParallelism()} threads, node ${process.version}, load ${os.loadavg()[0]!.toFixed(1)} before`,
  );
  for (const transport of ['shm', 'grpc'] as const) {
    await benchAllReduce(transport, 0.7, 1000);
    await benchAllReduce(transport, 0, 1000);
  }
  const tiny = embeddedModelPath();
  // Partials of 16 KB a row.
  const wide = path.join(scratch, 'wide');
  const config = {
    ...largeConfig(0.2),
    hiddenSize: 4096,
    ffnSize: 2048,
    layerCount: 4,
    vocabSize: 4096,
  };
  writeRandomCheckpoint(wide, { config, seed: 1, format: 'BF16', shardCount: 1 });
  print('\nsteps of a full batch, p50 and p99; the wait is the mean all-reduce of a step');
  print(
    `${''.padEnd(46)} |   step ms         | coordinator ms    | gRPC ms           | wait µs           | tokens/s`,
  );
  for (const scenario of [
    { name: 'caravan-tiny', folder: tiny, tp: 1, sequences: 1, temperature: 0, tokens: 256 },
    { name: 'caravan-tiny', folder: tiny, tp: 2, sequences: 1, temperature: 0, tokens: 256 },
    { name: 'caravan-tiny', folder: tiny, tp: 2, sequences: 1, temperature: 0.8, tokens: 256 },
    { name: 'caravan-tiny', folder: tiny, tp: 2, sequences: 16, temperature: 0, tokens: 128 },
    { name: 'caravan-tiny', folder: tiny, tp: 2, sequences: 16, temperature: 0.8, tokens: 128 },
    {
      name: 'hidden 4096, 4 layers',
      folder: wide,
      tp: 1,
      sequences: 1,
      temperature: 0,
      tokens: 64,
    },
    {
      name: 'hidden 4096, 4 layers',
      folder: wide,
      tp: 2,
      sequences: 1,
      temperature: 0,
      tokens: 64,
    },
    {
      name: 'hidden 4096, 4 layers',
      folder: wide,
      tp: 2,
      sequences: 16,
      temperature: 0,
      tokens: 64,
    },
  ]) {
    await benchEngine(pool, scenario);
  }
  print(
    '\nprompts of 400 tokens, 8 at once: ms without serving the network (p50, p99, most), ms of a ping',
  );
  print(`${''.padEnd(46)} |   stretch p50 p99 |    most |   ping p50 p99    | tokens/s`);
  for (const tp of [1, 2]) await benchPrefill(pool, wide, tp);
} finally {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
}
