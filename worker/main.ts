/**
 * `caravan worker`: one rank, bound to one device. It is told everything else by the coordinator.
 */
import { Command, InvalidArgumentError, Option } from 'commander';
import pino from 'pino';
import { isDeviceName, parseDevice } from '../model/device-name.js';
import { toCaravanError } from '../proto/errors.js';
import { BoundDevice } from './bound-device.js';
import type { Device } from './device.js';
import { HostDevice } from './host-device.js';
import { Ort } from './ort.js';
import { serveHealth } from './health-port.js';
import { linkSecurity, withLinkVariables } from '../proto/link-security.js';
import { RankServer } from './service.js';
import { SharedSegment } from './shared-memory.js';

const address = (text: string): string => {
  const port = Number(/^.+:(\d+)$/.exec(text)?.[1]);
  if (!(port <= 65535)) throw new InvalidArgumentError('must be HOST:PORT.');
  return text;
};

const threadCount = (text: string): number => {
  const count = Number(text);
  if (!Number.isInteger(count) || count < 1) throw new InvalidArgumentError('must be at least 1.');
  return count;
};

const port = (text: string): number => {
  const value = Number(text);
  if (!/^\d+$/.test(text) || value > 65_535) {
    throw new InvalidArgumentError('must be a whole number from 0 to 65535.');
  }
  return value;
};

const seconds = (text: string): number => {
  const value = Number(text);
  if (!(value >= 0 && value <= 31_536_000)) {
    throw new InvalidArgumentError('must be a number of seconds from 0 to 31536000.');
  }
  return value;
};

/** A rank that was started by hand, or by Kubernetes, outlives the coordinator that holds it. */
const DRAIN_TIMEOUT_S = 300;

const deviceName = (text: string): string => {
  if (!isDeviceName(text)) throw new InvalidArgumentError('must be cpu, webgpu, cuda or cuda:N.');
  return text;
};

const gigabytes = (text: string): number => {
  if (!(Number(text) > 0)) throw new InvalidArgumentError('must be a number above 0.');
  return Number(text);
};

const program = new Command('caravan worker')
  .description('Runs one rank.')
  .requiredOption('--listen <host:port>', 'address to serve on; port 0 picks a free one', address)
  .option('--device <device>', 'device of this rank', deviceName, 'cpu')
  .option('--device-memory <gigabytes>', "most of the device's memory that is used", gigabytes)
  .option(
    '--ort-library <file>',
    'libonnxruntime of another place, for CUDA (default: CARAVAN_ORT_LIBRARY, or that of onnxruntime-node)',
  )
  .addOption(
    new Option('--cuda-graphs <when>', 'repeat steps of one shape as one launch: auto, or off')
      .choices(['auto', 'off'])
      .env('CARAVAN_CUDA_GRAPHS')
      .default('auto'),
  )
  .option('--threads <count>', 'threads that compute', threadCount, 1)
  .option('--health-port <port>', 'port of /livez; 0 picks a free one (default: none)', port)
  .option('--health-host <host>', "address that /livez is served on (default: --listen's)")
  .option(
    '--stall-timeout <seconds>',
    '/livez fails when nothing moved for this long',
    seconds,
    120,
  )
  .option(
    '--drain-timeout <seconds>',
    `SIGTERM waits this long for the coordinator to let go (default: ${DRAIN_TIMEOUT_S}, or 0 under a parent of ours)`,
    seconds,
  )
  .option(
    '--tls-cert <file>',
    'PEM certificate of this rank, for mutual TLS (default: CARAVAN_TLS_CERT, or plain links)',
  )
  .option('--tls-key <file>', 'PEM key of --tls-cert (default: CARAVAN_TLS_KEY)')
  .option(
    '--tls-ca <file>',
    'PEM certificate of the authority of all peers (default: CARAVAN_TLS_CA)',
  )
  .option(
    '--tls-server-name <name>',
    'name that certificates of peers must have (default: CARAVAN_TLS_SERVER_NAME, or their address)',
  )
  .option('--log-level <level>', 'trace, debug, info, warn, error or silent', 'info')
  .exitOverride((error) => process.exit(error.exitCode === 0 ? 0 : 2));

const options = program.parse().opts<{
  listen: string;
  device: string;
  deviceMemory?: number;
  ortLibrary?: string;
  cudaGraphs: 'auto' | 'off';
  threads: number;
  healthPort?: number;
  healthHost?: string;
  stallTimeout: number;
  drainTimeout?: number;
  tlsCert?: string;
  tlsKey?: string;
  tlsCa?: string;
  tlsServerName?: string;
  logLevel: string;
}>();

/** A library of another place; a variable that is set to nothing names none. */
const libraryOf = ({ CARAVAN_ORT_LIBRARY: file }: NodeJS.ProcessEnv): string | undefined =>
  file === '' ? undefined : file;

/** @throws CaravanError `bad_usage` when it is not there, saying what is missing. */
function openDevice({
  device: text,
  deviceMemory,
  ortLibrary,
  cudaGraphs,
  threads,
}: typeof options): Device {
  const name = parseDevice(text);
  const ort = new Ort(threads, ortLibrary ?? libraryOf(process.env));
  if (name.kind === 'cpu') return new HostDevice(ort);
  return new BoundDevice(ort, name, {
    memoryLimit: deviceMemory === undefined ? null : deviceMemory * 1e9,
    captures: cudaGraphs === 'auto',
  });
}

const log = pino(
  { name: 'rank', level: options.logLevel, base: { pid: process.pid } },
  pino.destination(2),
);

try {
  SharedSegment.removeOrphans();
  const device = openDevice(options);
  const server = new RankServer(device, log, linkSecurity(withLinkVariables(options, process.env)));
  const port = await server.listen(options.listen);
  const bound = options.listen.replace(/:\d+$/, `:${port}`);
  log.info({ address: bound }, 'listening');
  let healthPort: number | null = null;
  if (options.healthPort !== undefined) {
    const { hostname } = new URL(`http://${options.listen}`);
    const host = options.healthHost ?? hostname.replace(/^\[|\]$/g, '');
    const stallMs = 1000 * options.stallTimeout;
    const at = { host, port: options.healthPort };
    healthPort = await serveHealth(() => server.progress, stallMs, at);
    log.info({ healthPort }, 'probes');
  }
  const stop = (): void => {
    server.stop();
    process.exit(0);
  };
  const drainTimeoutS = options.drainTimeout ?? (process.send === undefined ? DRAIN_TIMEOUT_S : 0);
  let isDraining = false;
  // All containers of a Pod are told to end at once: jobs need their ranks until the coordinator has let go.
  const drain = (): void => {
    if (isDraining || !server.isHeld || drainTimeoutS === 0) {
      stop();
      return;
    }
    isDraining = true;
    log.info({ drainTimeoutS }, 'held by a coordinator: waiting for it; a second signal stops');
    void server.released().then(stop);
    setTimeout(stop, 1000 * drainTimeoutS);
  };
  process.on('SIGTERM', drain);
  process.on('SIGINT', drain);
  if (process.send !== undefined) {
    process.on('disconnect', stop);
    process.send({
      type: 'ready',
      address: bound,
      healthPort,
      memory: device.memory(),
      readablePeers: device.readablePeers(),
    });
  }
} catch (thrown) {
  const error = toCaravanError(thrown);
  const end = (): void => {
    process.exit(error.code === 'bad_usage' ? 2 : 1);
  };
  if (process.send === undefined) {
    process.stderr.write(`caravan: ${error.message}\n`);
    end();
  } else {
    // Whoever started us says it.
    process.send({ type: 'failed', message: error.message }, end);
  }
}
