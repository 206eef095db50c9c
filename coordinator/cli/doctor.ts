/** `caravan doctor`: looks for what would keep Caravan from running here, and says how to mend it. */
import { execFileSync } from 'node:child_process';
import net from 'node:net';
import os from 'node:os';
import type { Command } from 'commander';
import { toCaravanError } from '../../proto/errors.js';
import type { Config } from '../config.js';
import { DEFAULT_MAX_STEP_ROWS, planGroup } from '../group-spec.js';
import { openChecked } from '../local-group.js';
import { startLocalRank, stopLocalRank } from '../local-ranks.js';
import { openModelTokenizer } from '../model-tokenizer.js';
import { Store } from '../store.js';
import { declareSettings } from './options.js';

interface Finding {
  readonly check: string;
  readonly verdict: 'ok' | 'warning' | 'failure';
  readonly detail: string;
  /** What to do about it; null when nothing needs doing. */
  readonly mend: string | null;
}

const ok = (check: string, detail: string): Finding => ({
  check,
  verdict: 'ok',
  detail,
  mend: null,
});
const finding = (
  verdict: 'warning' | 'failure',
  check: string,
  detail: string,
  mend: string,
): Finding => ({ check, verdict, detail, mend });

const MAX_CLOCK_SKEW_MS = 1000;

export function register(program: Command): void {
  const command = program
    .command('doctor')
    .description(
      'Checks Node, Redis, ports, devices, memory and model, and says how to mend each.',
    );
  const settings = declareSettings(
    command,
    [
      'model',
      'tp',
      'device',
      'weights',
      'maxSeqLen',
      'maxBatchSize',
      'host',
      'port',
      'redis',
      'json',
    ],
    { defaults: { tp: 2 } },
  );
  command.action(async () => {
    const s = settings();
    const findings = [
      checkNode(),
      s.redis === undefined ? checkRedisServer() : await checkRedis(s.redis),
      await checkPort(s.host, s.port),
      await checkDevice(s.device),
      ...checkModel(s),
    ].flat();
    const isWell = findings.every(({ verdict }) => verdict !== 'failure');
    if (s.json) process.stdout.write(`${JSON.stringify({ ok: isWell, findings })}\n`);
    else for (const each of findings) process.stdout.write(`${lineOf(each)}\n`);
    if (!isWell) process.exitCode = 1;
  });
}

const marks = { ok: 'ok   ', warning: 'warn ', failure: 'FAIL ' } as const;

const lineOf = ({ check, verdict, detail, mend }: Finding): string =>
  `${marks[verdict]} ${check}: ${detail}${mend === null ? '' : ` — ${mend}`}`;

function checkNode(): Finding {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  return major > 20 || (major === 20 && minor >= 11)
    ? ok('node', `version ${process.versions.node}`)
    : finding(
        'failure',
        'node',
        `version ${process.versions.node}`,
        'install Node.js 20.11 or later',
      );
}

/** Without --redis, `up` starts one of its own. */
function checkRedisServer(): Finding {
  try {
    const text = execFileSync('redis-server', ['--version'], { encoding: 'utf8' });
    return ok('redis', `redis-server ${/v=(\S+)/.exec(text)?.[1] ?? '?'} is installed`);
  } catch {
    const mend = 'apt-get install -y --no-install-recommends redis-server, or give --redis URL';
    return finding('failure', 'redis', 'redis-server is not on the PATH', mend);
  }
}

async function checkRedis(url: string): Promise<Finding[]> {
  let store: Store;
  try {
    store = await Store.open(url, 'impatient');
  } catch (error) {
    const mend = 'start it, or give another --redis URL';
    return [finding('failure', 'redis', toCaravanError(error).message, mend)];
  }
  try {
    const { version, maxmemoryPolicy, isAppendOnly, clockSkewMs } = await store.health();
    const skew = `${clockSkewMs.toFixed(0)} ms from this machine's`;
    return [
      isAtLeast(version, 6, 2)
        ? ok('redis version', version)
        : finding('failure', 'redis version', version, 'use Redis 6.2 or later'),
      maxmemoryPolicy === 'noeviction'
        ? ok('redis eviction', 'noeviction')
        : finding(
            'failure',
            'redis eviction',
            `maxmemory-policy is ${maxmemoryPolicy}: jobs could be evicted`,
            'CONFIG SET maxmemory-policy noeviction',
          ),
      isAppendOnly
        ? ok('redis durability', 'append-only file is on')
        : finding(
            'warning',
            'redis durability',
            'append-only file is off: jobs do not survive a restart',
            'CONFIG SET appendonly yes',
          ),
      Math.abs(clockSkewMs) <= MAX_CLOCK_SKEW_MS
        ? ok('clock', `Redis's is ${skew}`)
        : finding(
            'warning',
            'clock',
            `Redis's is ${skew}`,
            'synchronise the clocks (NTP): deadlines depend on them',
          ),
    ];
  } finally {
    store.close();
  }
}

function isAtLeast(version: string, major: number, minor: number): boolean {
  const [a = 0, b = 0] = version.split('.').map(Number);
  return a > major || (a === major && b >= minor);
}

async function checkPort(host: string, port: number): Promise<Finding> {
  const server = net.createServer();
  return new Promise((resolve) => {
    server.once('error', (error) => {
      resolve(
        finding('failure', 'port', `${host}:${port}: ${error.message}`, 'give another --port'),
      );
    });
    server.listen(port, host, () => {
      server.close(() => {
        resolve(ok('port', `${host}:${port} is free`));
      });
    });
  });
}

/** A rank process that comes up has loaded ONNX Runtime. */
async function checkDevice(device: string): Promise<Finding> {
  try {
    await stopLocalRank(await startLocalRank({ threads: 1, device, logLevel: 'silent' }));
    return ok('device', `${device}: a rank starts; ${os.availableParallelism()} cores`);
  } catch (error) {
    const mend = 'run npm ci again; the library comes with onnxruntime-node';
    return finding('failure', 'device', toCaravanError(error).message, mend);
  }
}

function checkModel(
  s: Pick<Config, 'model' | 'tp' | 'weights' | 'maxSeqLen' | 'maxBatchSize'>,
): Finding[] {
  try {
    const checkpoint = openChecked(s.model, s.tp);
    const { config } = checkpoint;
    const limits = { ...s, exact: false, maxStepRows: DEFAULT_MAX_STEP_ROWS };
    const { neededBytes } = planGroup(checkpoint, s.tp, limits);
    const tokenizer = openModelTokenizer(s.model);
    const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`;
    const memory = `${s.tp} ranks need ${gigabytes(neededBytes)}, ${gigabytes(os.freemem())} are free`;
    return [
      ok('model', `${checkpoint.path}: ${config.layerCount} layers, ${tokenizer.vocabSize} tokens`),
      neededBytes <= os.freemem()
        ? ok('memory', memory)
        : finding('failure', 'memory', memory, 'lower --max-seq-len or --max-batch-size'),
    ];
  } catch (error) {
    return [
      finding('failure', 'model', toCaravanError(error).message, 'give another --model or --tp'),
    ];
  }
}
