/** What ranks on GPUs must get right before anything is measured: golden texts and logits, and the same text in every way. */
import { execFile } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { promisify } from 'node:util';
import { planGroup } from '../../coordinator/group-spec.js';
import { startLocalRank, stopLocalRank } from '../../coordinator/local-ranks.js';
import { cliEntry } from '../../coordinator/package-root.js';
import { Ranks } from '../../coordinator/ranks.js';
import { embeddedModelPath, openCheckpoint } from '../../model/checkpoint.js';
import { deviceOfRank } from '../../model/device-name.js';
import type { WeightsMode } from '../../model/weights.js';
import { SampledRows, type Step } from '../../proto/gen/cluster.js';
import { readTinyGolden, sharedGolden } from '../golden.js';

export interface GpuChecks {
  readonly device: string;
  readonly tps: readonly number[];
  /** Folder with models and golden texts, which need not be there. */
  readonly shared: string;
  /** Fewer of them. */
  readonly isShort: boolean;
  readonly scratch: string;
  readonly say: (line: string) => void;
  readonly save: (name: string, content: unknown) => void;
}

async function caravan(words: string[], graphs = 'auto'): Promise<Record<string, unknown>> {
  const run = promisify(execFile);
  const env = { ...process.env, CARAVAN_CUDA_GRAPHS: graphs };
  const options = { maxBuffer: 1 << 28, timeout: 180_000, env };
  const { stdout } = await run(process.execPath, [cliEntry, ...words, '--json'], options);
  return JSON.parse(stdout) as Record<string, unknown>;
}

/** What a weights mode may differ by from the float64 oracle, and in likeliest tokens. Attention has 16 bits on CUDA. */
const tolerances = {
  fp32: { logits: 0.03, tokens: 0 },
  fp16: { logits: 0.08, tokens: 0 },
  int8: { logits: 0.25, tokens: 2 },
  int4: { logits: 1, tokens: 6 },
} as const satisfies Partial<Record<WeightsMode, object>>;

interface Check {
  readonly name: string;
  readonly ok: boolean;
  readonly detail: string;
}

const noStep: Omit<Step, 'number'> = {
  ...{ joins: [], decodeSlots: [], decodeTokens: [], chunks: [] },
  topK: 1,
};

/**
 * Two ranks decode until one is killed in the middle; the group ends, and the one that is left does the same with another.
 *
 * @returns both texts, in tokens; they must be alike.
 */
async function surviveDeath(device: string): Promise<{ ids: number[][]; ways: string[] }> {
  const start = (rank: number) =>
    startLocalRank({ threads: 1, device: deviceOfRank(device, rank), logLevel: 'silent' });
  const ranks = await Promise.all([start(0), start(1)]);
  const limits = { maxSeqLen: 256, maxBatchSize: 1, maxStepRows: 32 };
  const terms = { weights: 'fp16', exact: false, device } as const;
  const { spec } = planGroup(openCheckpoint(embeddedModelPath()), 2, { ...limits, ...terms });
  const ids: number[][] = [];
  const ways: string[] = [];
  try {
    for (const isKilled of [true, false]) {
      const group = await Ranks.connect(
        ranks.map(({ address }) => address),
        spec,
      );
      ways.push(group.transport);
      const own: number[] = [];
      ids.push(own);
      const { SAMPLED_ROWS_LAST: sampledRows } = SampledRows;
      let next: Partial<Step> = {
        joins: [{ slot: 0, temperature: 0 }],
        chunks: [{ slot: 0, tokens: [1, 5, 6], targets: [], sampledRows }],
      };
      for (let number = 1; number <= 60; number += 1) {
        const step = group.forward({ ...noStep, ...next, number });
        if (isKilled && number === 41) {
          ranks[1].process.kill('SIGKILL');
          await step.catch(() => undefined);
          // It has either failed, or was over before.
          const fault = await group.forward({ ...noStep, ...next, number: 42 }).then(
            () => 'no failure at all',
            (error: unknown) => (error instanceof Error ? error.message : ''),
          );
          if (!/^rank [01] /.test(fault)) throw new Error(`a dead peer: ${fault}`);
          break;
        }
        const results = await step;
        const best = results.reduce((a, b) => (b.topLogits[0]! > a.topLogits[0]! ? b : a));
        own.push(best.topIds[0]!);
        next = { decodeSlots: [0], decodeTokens: [best.topIds[0]!] };
      }
      group.close();
      if (isKilled) ranks[1] = await start(1);
    }
  } finally {
    await Promise.all(ranks.map(stopLocalRank));
  }
  return { ids, ways };
}

export async function checkAll({
  device,
  tps,
  shared,
  isShort,
  scratch,
  say,
  save,
}: GpuChecks): Promise<void> {
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
  const modes = [
    'fp32',
    'fp16',
    ...(device === 'cuda' ? (['int8', 'int4'] as const) : []),
  ] as const;
  for (const tp of tps) {
    for (const weights of modes) {
      const common = ['--device', device, '--tp', String(tp), '--weights', weights];
      // Of several GPUs not in 32 bits: the exchange is the same.
      if (isShort && tp > 1 && weights === 'fp32') continue;
      for (const [index, golden] of readTinyGolden()
        .slice(0, isShort ? 1 : 2)
        .entries()) {
        const ids = [...golden.promptIds, ...golden.ids];
        const last = golden.promptIds.length - 1;
        await check(`caravan-tiny ${index}, ${weights}, tp ${tp}`, async () => {
          const file = path.join(scratch, 'tokens.json');
          fs.writeFileSync(file, JSON.stringify(ids));
          const tokens = ['--tokens', file, '--logits', String(last), '--chunk', '13'];
          const found = await caravan([
            'eval',
            '--model',
            embeddedModelPath(),
            ...common,
            ...tokens,
          ]);
          const argmax = (found['argmax'] as number[]).slice(last, -1);
          const same = argmax.filter((id, i) => id === golden.ids[i]).length;
          const logits = (found['logits'] as Record<string, number[]>)[String(last)]!;
          const most = distance(logits, golden.firstLogits);
          // A tie that is nearer than the tolerance may fall otherwise.
          const may = tolerances[weights];
          const ties = golden.leastMargin < may.logits ? 1 : 0;
          const isSame = same >= golden.ids.length - Math.max(ties, may.tokens);
          const isRight = isSame && most < may.logits;
          return [isRight, `${same} of ${golden.ids.length} tokens, logits within ${most}`];
        });
      }
      if (weights === 'int8' || weights === 'int4') continue;
      const model = path.join(shared, sharedGolden.model);
      const text = path.join(shared, sharedGolden.text);
      if (!fs.existsSync(text)) {
        say(`skip stories260K, ${weights}, tp ${tp}: ${text} is not here`);
        continue;
      }
      await check(`stories260K text, ${weights}, tp ${tp}`, async () => {
        const words = ['--temperature', '0', '--ignore-eos', '--max-tokens', '200'];
        const found = await caravan(['generate', '--model', model, ...common, ...words]);
        const golden = fs.readFileSync(text, 'utf8').trimEnd();
        const ours = String(found['text']).trimEnd();
        const rate = Number(found['decodeTokensPerSecond']).toFixed(0);
        let same = 0;
        while (same < golden.length && golden[same] === ours[same]) same += 1;
        const how = [found['transport'], ...(found['notes'] as string[])].join('; ');
        return [ours === golden, `${same} of ${golden.length} characters, ${rate} tokens/s ${how}`];
      });
    }
    // Whatever is captured, and whichever way partials go: the same text. (CUDA's products of fewer bits are chosen by the
    // clock when a rank starts: two starts may differ in last bits.)
    await check(`caravan-tiny as without graphs and direct exchange, fp16, tp ${tp}`, async () => {
      const words = ['--prompt', 'Once upon a time', '--temperature', '0', '--ignore-eos'];
      const all = ['generate', '--device', device, '--tp', String(tp), '--weights', 'fp16'];
      const most = ['--max-tokens', '160'];
      const found = await caravan([...all, ...words, ...most]);
      const plain = await caravan([...all, ...words, ...most, '--transport', 'shm'], 'off');
      const how = [found['transport'], ...(found['notes'] as string[])].join('; ');
      return [found['text'] === plain['text'], `${String(found['text']).length} characters ${how}`];
    });
  }
  if (tps.some((tp) => tp > 1)) {
    for (const where of device === 'cuda' ? ['cuda', 'cuda:0'] : [device]) {
      // The latter: two ranks on one GPU.
      await check(
        `a killed peer ends the group, and the next one has the same text, ${where}`,
        async () => {
          const { ids, ways } = await surviveDeath(where);
          const [before, after] = ids as [number[], number[]];
          const isSame = before.length === 40 && before.every((id, i) => id === after[i]);
          return [isSame && after.length === 60, `${after.length} tokens, ${ways.join(', ')}`];
        },
      );
    }
  }
}
