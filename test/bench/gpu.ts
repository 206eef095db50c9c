/**
 * Correctness, then figures, of ranks on GPUs. See gpu.sh for how it is called.
 *
 *   node dist/test/bench/gpu.js [--device cuda|webgpu] [--gpus N] [--only check,7b,70b] [--bandwidth TB/S]
 *     [--transports auto,shm,grpc] [--graphs auto,off] [--tps 1,2] [--weights fp16,int8,int4] [--batches 1,16,64] [--seconds N]
 *     [--out FOLDER]
 *
 * With --seconds what cannot end in that time is left out, from the least important on, and the checks are fewer.
 */
import { fork, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import type { Config } from '../../coordinator/config.js';
import { planGroup } from '../../coordinator/group-spec.js';
import { Ranks } from '../../coordinator/ranks.js';
import { openCheckpoint } from '../../model/checkpoint.js';
import { deviceOfRank } from '../../model/device-name.js';
import { formBytes, type WeightsMode } from '../../model/weights.js';
import { SampledRows, type Step, type StepResult } from '../../proto/gen/cluster.js';
import { checkAll } from './gpu-check.js';
import { llama2Shapes, writeShapeCheckpoint } from './shape-checkpoint.js';

const { values: args } = parseArgs({
  options: {
    device: { type: 'string', default: 'cuda' },
    gpus: { type: 'string', default: '1' },
    only: { type: 'string', default: 'check,7b,70b' },
    bandwidth: { type: 'string', default: '3.35' },
    shared: { type: 'string', default: '../shared' },
    out: { type: 'string', default: '.' },
    transports: { type: 'string', default: 'auto' },
    graphs: { type: 'string', default: 'auto' },
    tps: { type: 'string' },
    weights: { type: 'string', default: 'fp16,int8,int4' },
    batches: { type: 'string', default: '1,2,4,8,16,32,64' },
    seconds: { type: 'string' },
  },
});
const { device, out } = args;
const gpus = Number(args.gpus);
const bytesPerSecond = Number(args.bandwidth) * 1e12;
const parts = args.only.split(',');
const isShort = args.seconds !== undefined;
const leftMs = (): number => 1000 * Number(args.seconds ?? 1e6) - performance.now();
/** Starting ranks and loading takes about this long. */
const SHORTEST_MS = 15_000;
fs.mkdirSync(out, { recursive: true });
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-gpu-'));

const say = (line: string): void => {
  process.stdout.write(`${line}\n`);
};
const save = (name: string, content: unknown): void => {
  fs.writeFileSync(path.join(out, `gpu-${name}.json`), `${JSON.stringify(content, null, 1)}\n`);
};

const tps =
  args.tps === undefined
    ? [1, 2, 4, 8].filter((tp) => tp <= gpus)
    : args.tps.split(',').map(Number);

const noStep: Omit<Step, 'number'> = {
  joins: [],
  decodeSlots: [],
  decodeTokens: [],
  chunks: [],
  topK: 8,
};

function percentile(values: readonly number[], p: number): number {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(p * sorted.length))]!;
}

const children: ChildProcess[] = [];

const startRank = (
  rank: number,
  graphs: string,
): Promise<{ address: string; child: ChildProcess }> =>
  new Promise((resolve, reject) => {
    const entry = fileURLToPath(new URL('random-rank.js', import.meta.url));
    const child = fork(entry, ['--device', deviceOfRank(device, rank)], {
      env: { ...process.env, CARAVAN_CUDA_GRAPHS: graphs },
    });
    children.push(child);
    child.once('message', (message: { address: string }) => {
      resolve({ address: message.address, child });
    });
    child.once('exit', (code) => {
      reject(new Error(`a rank ended with code ${code ?? '?'}`));
    });
  });

interface Scenario {
  readonly model: keyof typeof llama2Shapes;
  readonly tp: number;
  readonly weights: WeightsMode;
  readonly transport: Config['transport'];
  readonly graphs: string;
  readonly batches: readonly number[];
}

const CONTEXT = 256;
const DECODE_STEPS = 24;
const PROMPT = 512;

/** Prompts into every slot, then decodes of all of them. */
async function bench({
  model,
  tp,
  weights,
  transport,
  graphs,
  batches,
}: Scenario): Promise<object> {
  const folder = path.join(scratch, model);
  writeShapeCheckpoint(folder, llama2Shapes[model]);
  const checkpoint = openCheckpoint(folder);
  const ranks = await Promise.all(Array.from({ length: tp }, (_, rank) => startRank(rank, graphs)));
  const most = Math.max(...batches);
  const planned = planGroup(checkpoint, tp, {
    ...{ weights, transport, device, exact: false },
    ...{ maxSeqLen: 1024, maxBatchSize: most, maxStepRows: PROMPT },
  });
  const startMs = performance.now();
  const group = await Ranks.connect(
    ranks.map(({ address }) => address),
    planned.spec,
  );
  const loadSeconds = (performance.now() - startMs) / 1000;
  const { weightBytes, plan } = planned.ranks[0]!;
  // Few of its rows are read.
  const embeddingBytes = formBytes(
    planned.forms.embedding,
    plan.vocab.count,
    checkpoint.config.hiddenSize,
  );
  let number = 0;
  const forward = async (step: Omit<Step, 'number'>) => {
    number += 1;
    const beganMs = performance.now();
    const results = await group.forward({ ...noStep, ...step, number });
    return { ms: performance.now() - beganMs, results };
  };
  const tokens = (count: number) =>
    Array.from({ length: count }, (_, i) => 1 + ((i * 37) % 31_000));
  const chunk = (slot: number, count: number) => ({
    ...{ slot, tokens: tokens(count), targets: [] },
    sampledRows: SampledRows.SAMPLED_ROWS_LAST,
  });
  const runs = [];
  try {
    for (let slot = 0; slot < most; slot += 1) {
      const joins = [{ slot, temperature: 0 }];
      await forward({ ...noStep, joins, chunks: [chunk(slot, CONTEXT)] });
    }
    const prefills = [];
    for (let i = 0; i < 4; i += 1) {
      const joins = [{ slot: 0, temperature: 0 }];
      const { ms } = await forward({ ...noStep, joins, chunks: [chunk(0, PROMPT)] });
      prefills.push(ms);
    }
    const prefillTokensPerSecond = (1000 * PROMPT) / percentile(prefills.slice(1), 0.5);
    const hasGraphs = group.loaded.every(({ captureFault }) => captureFault === '');
    const { transport: used, notes } = group;
    say(`  ${[used, hasGraphs ? 'graphs' : '', ...notes].join('; ')}`);
    say(`  loaded in ${loadSeconds.toFixed(1)} s`);
    say(`  prefill of ${PROMPT}: ${prefillTokensPerSecond.toFixed(0)} tokens/s`);
    for (const batch of batches) {
      const decodeSlots = Array.from({ length: batch }, (_, slot) => slot);
      const decodeTokens = decodeSlots.map((slot) => 5 + slot);
      const steps: { ms: number; results: StepResult[] }[] = [];
      for (let i = 0; i < DECODE_STEPS; i += 1) {
        steps.push(await forward({ ...noStep, decodeSlots, decodeTokens }));
      }
      const measured = steps.slice(4);
      const ms = percentile(
        measured.map((step) => step.ms),
        0.5,
      );
      const part = (of: (result: StepResult) => number): number =>
        percentile(
          measured.flatMap(({ results }) => results.map(of)),
          0.5,
        );
      const floorMs = (1000 * (weightBytes - embeddingBytes)) / bytesPerSecond;
      const run = {
        batch,
        stepMs: ms,
        tokensPerSecond: (1000 * batch) / ms,
        rooflinePercent: (100 * floorMs) / ms,
        computeMs: part((r) => r.computeUs / 1000),
        copyMs: part((r) => r.copyUs / 1000),
        allReduceWaitMs: part((r) => r.waitUs / 1000),
        bytesToDevice: part((r) => r.bytesToDevice),
        bytesToHost: part((r) => r.bytesToHost),
      };
      runs.push(run);
      say(
        `  batch ${batch}: ${ms.toFixed(2)} ms, ${run.tokensPerSecond.toFixed(1)} tokens/s, ` +
          `${run.rooflinePercent.toFixed(0)} % of roofline; compute ${run.computeMs.toFixed(2)}, ` +
          `copies ${run.copyMs.toFixed(2)}, all-reduce ${run.allReduceWaitMs.toFixed(2)} ms`,
      );
    }
    const { layerCount } = checkpoint.config;
    const allReduces = tp === 1 ? 0 : 2 * layerCount + 1;
    return {
      ...{ model, tp, weights, transport: used, hasGraphs, context: CONTEXT, loadSeconds },
      allReduces,
      ...{ weightBytesPerRank: weightBytes, prefillTokensPerSecond, decode: runs },
    };
  } finally {
    group.close();
    for (const { child } of ranks) child.disconnect();
  }
}

/** Ranks that hang end with us. */
const SCENARIO_MS = 150_000;

const within = async <T>(ms: number, work: Promise<T>): Promise<T> => {
  let timer: NodeJS.Timeout | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => {
      reject(new Error(`not done within ${ms / 1000} s`));
    }, ms);
  });
  try {
    return await Promise.race([work, late]);
  } finally {
    clearTimeout(timer);
    for (const child of children.splice(0)) child.kill('SIGKILL');
  }
};

async function benchAll(part: string, scenarios: readonly Scenario[]): Promise<void> {
  const results: object[] = [];
  for (const scenario of scenarios) {
    const { model, tp, weights, transport, graphs } = scenario;
    const name = `Llama 2 ${model}, ${weights}, tp ${tp}, ${transport}, graphs ${graphs}`;
    if (leftMs() < SHORTEST_MS) {
      say(`skip ${name}: no time left`);
      continue;
    }
    say(name);
    try {
      results.push(await within(Math.min(SCENARIO_MS, leftMs()), bench(scenario)));
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      say(`  FAIL ${message}`);
      results.push({ ...scenario, error: message });
    }
    save(part, { device, gpus, bandwidthTBs: Number(args.bandwidth), results });
  }
}

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  process.once(signal, () => {
    for (const child of children) child.kill('SIGKILL');
    process.exit(1);
  });
}
try {
  if (parts.includes('check'))
    await checkAll({ device, tps, shared: args.shared, isShort, scratch, say, save });
  const batches = args.batches.split(',').map(Number);
  const modes = args.weights.split(',') as WeightsMode[];
  const transports = args.transports.split(',') as Config['transport'][];
  const scenarios = (model: Scenario['model'], own: readonly number[], some: readonly number[]) =>
    own.flatMap((tp) =>
      modes.flatMap((weights) =>
        (tp === 1 ? transports.slice(0, 1) : transports).flatMap((transport) =>
          args.graphs.split(',').map((graphs): Scenario => ({
            ...{ model, tp, weights, transport, graphs },
            batches: some,
          })),
        ),
      ),
    );
  if (parts.includes('7b')) {
    await benchAll(
      '7b',
      scenarios(
        '7b',
        tps.filter((tp) => tp <= 2),
        batches,
      ),
    );
  }
  if (parts.includes('70b')) {
    const some = batches.filter((batch) => [1, 8, 16, 64].includes(batch));
    const all = scenarios('70b', args.tps === undefined ? [gpus] : tps, some);
    // 16 bits want four GPUs of 80 GB.
    const isAsked = args.tps !== undefined;
    await benchAll(
      '70b',
      all.filter(({ weights, tp }) => isAsked || tp >= 4 || weights !== 'fp16'),
    );
  }
} finally {
  fs.rmSync(scratch, { recursive: true });
}
// Streams of a scenario that was given up must not keep the process.
process.exit(0);
