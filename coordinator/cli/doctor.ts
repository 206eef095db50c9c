/** `caravan doctor`: looks for what would keep Caravan from running here, and says how to mend it. */
import { execFileSync } from 'node:child_process';
import net from 'node:net';
import os from 'node:os';
import type { Command } from 'commander';
import { toCaravanError } from '../../proto/errors.js';
import type { Config } from '../config.js';
import {
  devicesOfRanks,
  possibleDevices,
  probeDevice,
  unreadablePair,
  type DeviceReport,
} from '../devices.js';
import { DEFAULT_MAX_STEP_ROWS, fitting, fullestBytes, planGroup } from '../group-spec.js';
import { openChecked } from '../local-group.js';

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
      'kv',
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
    const devices = await probeAll(s.device, s.tp);
    const findings = [
      checkNode(),
      s.redis === undefined ? checkRedisServer() : await checkRedis(s.redis),
      await checkPort(s.host, s.port),
      ...checkDevices(s.device, s.tp, devices),
      ...checkExchange(s.device, s.tp, devices),
      ...checkModel(s, devices),
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

/** A rank process that comes up has loaded ONNX Runtime and opened its device. */
const probeAll = (device: string, tp: number): Promise<DeviceReport[]> =>
  Promise.all([...new Set([...devicesOfRanks(device, tp), ...possibleDevices()])].map(probeDevice));

/** Devices that were not asked for may be missing. */
function checkDevices(device: string, tp: number, devices: readonly DeviceReport[]): Finding[] {
  const asked = devicesOfRanks(device, tp);
  return devices.map(({ device: name, fault, memory }) => {
    if (fault === null) {
      const free = memory === null ? '' : `, ${gigabytes(memory.freeBytes)} free`;
      const cores = name === 'cpu' ? `, ${os.availableParallelism()} cores` : '';
      return ok('device', `${name}: a rank starts${cores}${free}`);
    }
    return asked.includes(name)
      ? finding('failure', 'device', fault, 'see docs/devices.md')
      : finding('warning', 'device', fault, 'only --device ' + name + ' needs it');
  });
}

/** Whether partials can stay on the GPUs. */
function checkExchange(device: string, tp: number, devices: readonly DeviceReport[]): Finding[] {
  const asked = devicesOfRanks(device, tp);
  const isWell = asked.every((name) => devices.find((d) => d.device === name)?.fault === null);
  if (tp === 1 || !device.startsWith('cuda') || !isWell) return [];
  const pair = unreadablePair(asked, devices);
  if (pair === null) return [ok('exchange', "direct: the ranks' GPUs read each other's memory")];
  const [reader, owner] = pair;
  return [
    finding(
      'warning',
      'exchange',
      `partials go through the host's memory: ${reader} cannot read ${owner}'s`,
      'peer access needs NVLink, or PCI Express below one root; see nvidia-smi topo -p2p r',
    ),
  ];
}

const gigabytes = (bytes: number): string => `${(bytes / 1e9).toFixed(2)} GB`;

function checkModel(
  s: Pick<Config, 'model' | 'tp' | 'device' | 'weights' | 'kv' | 'maxSeqLen' | 'maxBatchSize'>,
  devices: readonly DeviceReport[],
): Finding[] {
  try {
    const checkpoint = openChecked(s.model, s.tp);
    const { config } = checkpoint;
    const limits = { ...s, exact: false, maxStepRows: DEFAULT_MAX_STEP_ROWS };
    const planned = planGroup(checkpoint, s.tp, limits);
    const tokenizer = openModelTokenizer(s.model);
    const own = devicesOfRanks(s.device, s.tp).flatMap(
      (name) => devices.find(({ device }) => device === name)?.memory ?? [],
    );
    const isOnGpus = s.device !== 'cpu';
    const free = isOnGpus ? Math.min(...own.map(({ freeBytes }) => freeBytes)) : os.freemem();
    const group = isOnGpus ? fitting(planned, free) : planned;
    const asked = isOnGpus ? fullestBytes(group) : group.neededBytes;
    const who = isOnGpus ? `in ${group.weights} each rank needs` : `${s.tp} ranks need`;
    const known = Number.isFinite(free)
      ? `${gigabytes(free)} are free`
      : 'what is free is not known';
    const memory = `${who} ${gigabytes(asked)}, ${known}`;
    return [
      ok('model', `${checkpoint.path}: ${config.layerCount} layers, ${tokenizer.vocabSize} tokens`),
      asked <= free
        ? ok('memory', memory)
        : finding('failure', 'memory', memory, 'lower --max-seq-len or --max-batch-size'),
    ];
  } catch (error) {
    return [
      finding('failure', 'model', toCaravanError(error).message, 'give another --model or --tp'),
    ];
  }
}
