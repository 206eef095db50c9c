/** `caravan bench`: puts a load on a gateway, or on a whole Caravan that it starts for it, and says how fast it was. */
import type { Command } from 'commander';
import { z } from 'zod';
import { CaravanError } from '../../proto/errors.js';
import {
  runBench,
  scenarios,
  type BenchReport,
  type Percentiles,
  type Scenario,
} from '../bench.js';
import { flagOf, type Config } from '../config.js';
import { withCaravan } from '../own-caravan.js';
import { checked, declareSettings } from './options.js';

const count = (least: number, most: number) =>
  checked(z.coerce.number().int().min(least).max(most), `a whole number from ${least} to ${most}`);

/** What a Caravan of its own is started with. */
const upSettings = [
  'model',
  'tp',
  'device',
  'weights',
  'exact',
  'kv',
  'transport',
  'speculation',
  'maxSeqLen',
] as const;
const settingNames = [...upSettings, 'maxBatchSize', 'servedModelName', 'apiKey', 'json'] as const;

interface OwnOptions {
  readonly url?: string;
  readonly scenario: Scenario;
  readonly concurrency: number;
  readonly promptTokens?: number;
  readonly prefixTokens: number;
  readonly maxTokens?: number;
  readonly temperature: number;
  readonly seed: number;
  readonly duration: number;
  readonly warmUp: boolean;
}

/** Tokens of prompt and answer, where they are not told. */
const sizes = {
  decode: { promptTokens: 16, maxTokens: 128 },
  prefill: { promptTokens: 512, maxTokens: 1 },
  serve: { promptTokens: 128, maxTokens: 64 },
} as const;

export function register(program: Command): void {
  const command = program
    .command('bench')
    .description('Puts a load on a gateway, or on a Caravan of its own, and says how fast it was.')
    .option('--url <url>', 'gateway to put it on (default: a Caravan that is started for it)')
    .option(
      '--scenario <name>',
      'decode (all begin together), prefill (one token each) or serve (ask again and again)',
      checked(z.enum(scenarios), `one of ${scenarios.join(', ')}`),
      'decode',
    )
    .option('--concurrency <n>', 'requests at once', count(1, 10_000), 1)
    .option('--prompt-tokens <n>', 'tokens of a prompt (default: by scenario)', count(1, 1_048_576))
    .option('--prefix-tokens <n>', 'of these, how many all share', count(0, 1_048_576), 0)
    .option('--max-tokens <n>', 'tokens of an answer (default: by scenario)', count(1, 1_048_576))
    .option(
      '--temperature <t>',
      'of all requests',
      checked(z.coerce.number().min(0).max(2), 'a number from 0 to 2'),
      0,
    )
    .option('--seed <n>', 'draws the prompts', count(0, 2 ** 32 - 2), 1)
    .option(
      '--duration <seconds>',
      'begin requests for this long, but one round at least',
      checked(z.coerce.number().min(0).max(86_400), 'a number from 0 to 86400'),
      10,
    )
    .option('--no-warm-up', 'measure from the first request on');
  const settings = declareSettings(command, settingNames, { defaults: { tp: 2 } });
  command.action(async () => {
    const s = settings();
    const own = command.opts<OwnOptions>();
    if (own.url !== undefined) {
      refuseStarting(command);
      if (!/^https?:\/\/[^\s/]+\/?$/.test(own.url)) {
        throw new CaravanError(
          'bad_usage',
          `--url must be an http:// or https:// URL, got ${own.url}`,
        );
      }
    }
    const load = {
      ...own,
      promptTokens: own.promptTokens ?? sizes[own.scenario].promptTokens,
      maxTokens: own.maxTokens ?? sizes[own.scenario].maxTokens,
      durationMs: 1000 * own.duration,
    };
    if (load.prefixTokens > load.promptTokens) {
      throw new CaravanError(
        'bad_usage',
        `--prefix-tokens ${load.prefixTokens} is more than --prompt-tokens ${load.promptTokens}`,
      );
    }
    const interrupted = new AbortController();
    const interrupt = (): void => {
      interrupted.abort(new CaravanError('cancelled', 'interrupted'));
    };
    process.once('SIGINT', interrupt);
    process.once('SIGTERM', interrupt);
    const measure = async (url: string): Promise<BenchReport> => {
      const target = {
        url,
        apiKey: s.apiKey,
        model: s.servedModelName,
        temperature: own.temperature,
      };
      // Prompts of another seed: nothing of the warm-up is in a cache.
      const warmUp = { ...load, seed: load.seed + 1, durationMs: 0 };
      if (own.warmUp) await runBench(target, warmUp, interrupted.signal);
      return runBench(target, load, interrupted.signal);
    };
    const args = own.url === undefined ? upArguments(s, load.concurrency) : null;
    const report = await (args === null
      ? measure(own.url!)
      : withCaravan(args, interrupted.signal, measure));
    process.removeListener('SIGINT', interrupt);
    process.removeListener('SIGTERM', interrupt);
    process.stdout.write(s.json ? `${JSON.stringify(report)}\n` : told(report));
  });
}

/** @throws CaravanError `bad_usage` for flags that a gateway which runs already cannot obey. */
function refuseStarting(command: Command): void {
  for (const name of [...upSettings, 'maxBatchSize']) {
    if (command.getOptionValueSource(name) === 'cli') {
      const flag = flagOf(name);
      throw new CaravanError('bad_usage', `${flag} is for a Caravan of its own, not for --url`);
    }
  }
}

function upArguments(
  s: Pick<Config, (typeof upSettings)[number] | 'maxBatchSize'>,
  concurrency: number,
): string[] {
  const args = ['--port', '0', '--log-level', 'error'];
  args.push('--max-batch-size', String(Math.max(s.maxBatchSize, Math.min(concurrency, 1024))));
  for (const name of upSettings) {
    const value = s[name];
    if (value === true) args.push(flagOf(name));
    else if (value !== undefined && value !== false) args.push(flagOf(name), String(value));
  }
  return args;
}

function told(report: BenchReport): string {
  const rate = (value: number | null): string => (value === null ? '-' : value.toFixed(1));
  const times = (value: Percentiles | null): string =>
    value === null
      ? '-'
      : `p50 ${value.p50.toFixed(1)}  p90 ${value.p90.toFixed(1)}  p99 ${value.p99.toFixed(1)}`;
  const { scenario, concurrency, requests, errors, durationS } = report;
  const lines = [
    `${scenario}, ${concurrency} at once: ${requests} requests in ${durationS.toFixed(1)} s, ${errors} errors`,
    `output tokens/s    ${rate(report.outputTokensPerSecond)}`,
    `decode tokens/s    ${rate(report.decodeTokensPerSecond)}`,
    `prefill tokens/s   ${rate(report.prefillTokensPerSecond)}`,
    `prompt tokens      ${report.promptTokens}, ${report.cachedTokens} of them cached`,
    `TTFT ms            ${times(report.ttftMs)}`,
    `ITL ms             ${times(report.itlMs)}`,
  ];
  if (report.firstError !== null) lines.push(`first error        ${report.firstError}`);
  return `${lines.join('\n')}\n`;
}
