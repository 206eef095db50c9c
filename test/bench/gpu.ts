/**
 * Correctness, then figures, of ranks on GPUs. See gpu.sh for how it is called.
 *
 *   node dist/test/bench/gpu.js [--device cuda|webgpu] [--gpus N] [--only check,7b,70b] [--bandwidth TB/S]
 *     [--transports shm,grpc] [--batches 1,16,64] [--seconds N] [--out FOLDER]
 *
 * With --seconds what cannot end in that time is left out, from the least important on, and the checks are fewer.
 */
import { execFile, fork, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs, promisify } from 'node:util';
import { planGroup } from '../../coordinator/group-spec.js';
import { cliEntry } from '../../coordinator/package-root.js';
import { Ranks } from '../../coordinator/ranks.js';
import { embeddedModelPath, openCheckpoint } from '../../model/checkpoint.js';
import { deviceOfRank } from '../../model/device-name.js';
import { formBytes, type WeightsMode } from '../../model/weights.js';
import { SampledRows, type Step, type StepResult } from '../../proto/gen/cluster.js';
import { readTinyGolden, sharedGolden } from '../golden.js';
import { llama2Shapes, writeShapeCheckpoint } from './shape-checkpoint.js';

const { values: args } = parseArgs({
  options: {
    device: { type: 'string', default: 'cuda' },
    gpus: { type: 'string', default: '1' },
    only: { type: 'string', default: 'check,7b,70b' },
    bandwidth: { type: 'string', default: '3.35' },
    shared: { type: 'string', default: '../shared' },
    out: { type: 'string', default: '.' },
    transports: { type: 'string', default: 'shm' },
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

async function caravan(...words: string[]): Promise<Record<string, unknown>> {
  const run = promisify(execFile);
  const options = { maxBuffer: 1 << 28, timeout: 180_000 };
  const { stdout } = await run(process.execPath, [cliEntry, ...words, '--json'], options);
  return JSON.parse(stdout) as Record<string, unknown>;
}

/** What a weights mode may differ by from the float64 oracle. Attention has 16 bits on CUDA. */
const tolerances: Partial<Record<WeightsMode, number>> = { fp32: 0.03, fp16: 0.08 };

interface Check {
  readonly name: string;
  readonly ok: boolean;
  readonly detail: string;
}

async function checkAll(): Promise<void> {
  const checks: Check[] = [];
  const check = async (name: string, run: () => Promise<[boolean, string]>): Promise<void> => {
    let result: Check;
    try {
      const [ok, detail] = await run();
      result = { name, ok, detail };
    } catch (error) {
      const { stderr = '', message } = error as { stderr?: string; message: string };
      result = { name, ok: false, detail: (stderr === '' ? message : stderr).slice(-1500) };
    }
    checks.push(result);
    say(`${result.ok ? 'ok  ' : 'FAIL'} ${name}: ${result.detail}`);
    save('check', checks);
  };
  const distance = (a: readonly number[], b: readonly number[]): number =>
    b.reduce((most, x, i) => Math.max(most, Math.abs(x - a[i]!)), 0);
  const tps = [1, 2, 4, 8].filter((tp) => tp <= gpus);
  for (const tp of tps) {
    for (const weights of ['fp32', 'fp16'] as const) {
      const common = ['--device', device, '--tp', String(tp), '--weights', weights];
      // Of several GPUs with 16 bits alone: the exchange is the same.
      if (isShort && tp > 1 && weights !== 'fp16') continue;
      for (const [index, golden] of readTinyGolden()
        .slice(0, isShort ? 1 : 2)
        .entries()) {
        const ids = [...golden.promptIds, ...golden.ids];
        const last = golden.promptIds.length - 1;
        await check(`caravan-tiny ${index}, ${weights}, tp ${tp}`, async () => {
          const file = path.join(scratch, 'tokens.json');
          fs.writeFileSync(file, JSON.stringify(ids));
          const tokens = ['--tokens', file, '--logits', String(last), '--chunk', '13'];
          const found = await caravan('eval', '--model', embeddedModelPath(), ...common, ...tokens);
          const argmax = (found['argmax'] as number[]).slice(last, -1);
          const same = argmax.filter((id, i) => id === golden.ids[i]).length;
          const logits = (found['logits'] as Record<string, number[]>)[String(last)]!;
          const most = distance(logits, golden.firstLogits);
          // A tie that is nearer than the tolerance may fall otherwise.
          const isTie = golden.leastMargin < tolerances[weights]!;
          const isSame = same >= golden.ids.length - (isTie ? 1 : 0);
          const isRight = isSame && most < tolerances[weights]!;
          return [isRight, `${same} of ${golden.ids.length} tokens, logits within ${most}`];
        });
      }
      const model = path.join(args.shared, sharedGolden.model);
      const text = path.join(args.shared, sharedGolden.text);
      if (!fs.existsSync(text)) {
        say(`skip stories260K, ${weights}, tp ${tp}: ${text} is not here`);
        continue;
      }
      await check(`stories260K text, ${weights}, tp ${tp}`, async () => {
        const words = ['--temperature', '0', '--ignore-eos', '--max-tokens', '200'];
        const found = await caravan('generate', '--model', model, ...common, ...words);
        const golden = fs.readFileSync(text, 'utf8').trimEnd();
        const ours = String(found['text']).trimEnd();
        const rate = Number(found['decodeTokensPerSecond']).toFixed(0);
        let same = 0;
        while (same < golden.length && golden[same] === ours[same]) same += 1;
        return [ours === golden, `${same} of ${golden.length} characters, ${rate} tokens/s`];
      });
    }
  }
}

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

const startRank = (rank: number): Promise<{ address: string; child: ChildProcess }> =>
  new Promise((resolve, reject) => {
    const entry = fileURLToPath(new URL('random-rank.js', import.meta.url));
    const child = fork(entry, ['--device', deviceOfRank(device, rank)]);
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
  readonly transport: 'shm' | 'grpc';
  readonly batches: readonly number[];
}

const CONTEXT = 256;
const DECODE_STEPS = 24;
const PROMPT = 512;

/** Prompts into every slot, then decodes of all of them. */
async function bench({ model, tp, weights, transport, batches }: Scenario): Promise<object> {
  const folder = path.join(scratch, model);
  writeShapeCheckpoint(folder, llama2Shapes[model]);
  const checkpoint = openCheckpoint(folder);
  const ranks = await Promise.all(Array.from({ length: tp }, (_, rank) => startRank(rank)));
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
      ...{ model, tp, weights, transport, context: CONTEXT, loadSeconds, allReduces },
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

async function benchAll(name: string, scenarios: readonly Scenario[]): Promise<void> {
  const results: object[] = [];
  for (const scenario of scenarios) {
    const { model, tp, weights, transport } = scenario;
    if (leftMs() < SHORTEST_MS) {
      say(`skip Llama 2 ${model}, ${weights}, tp ${tp}, ${transport}: no time left`);
      continue;
    }
    say(`Llama 2 ${model}, ${weights}, tp ${tp}, ${transport}`);
    try {
      results.push(await within(Math.min(SCENARIO_MS, leftMs()), bench(scenario)));
    } catch (error) {
      const message = error instanceof Error ? error.message : String(error);
      say(`  FAIL ${message}`);
      results.push({ ...scenario, error: message });
    }
    save(name, { device, gpus, bandwidthTBs: Number(args.bandwidth), results });
  }
}

for (const signal of ['SIGTERM', 'SIGINT'] as const) {
  process.once(signal, () => {
    for (const child of children) child.kill('SIGKILL');
    process.exit(1);
  });
}
try {
  if (parts.includes('check')) await checkAll();
  const batches = args.batches.split(',').map(Number);
  if (parts.includes('7b')) {
    const tps = [1, 2].filter((tp) => tp <= gpus);
    const modes = ['fp16', 'int4'] as const;
    const all = tps.flatMap((tp) => modes.map((weights) => ({ tp, weights })));
    await benchAll(
      '7b',
      all.map((s) => ({ model: '7b', transport: 'shm', batches, ...s })),
    );
  }
  if (parts.includes('70b')) {
    const modes = gpus >= 4 ? (['int4', 'fp16'] as const) : (['int4'] as const);
    const all = modes.flatMap((weights) =>
      (args.transports.split(',') as ('shm' | 'grpc')[]).map((transport) => ({
        weights,
        transport,
      })),
    );
    const some = batches.filter((batch) => [1, 8, 16, 64].includes(batch));
    await benchAll(
      '70b',
      all.map((s) => ({ model: '70b', tp: gpus, batches: some, ...s })),
    );
  }
} finally {
  fs.rmSync(scratch, { recursive: true });
}
// Streams of a scenario that was given up must not keep the process.
process.exit(0);
