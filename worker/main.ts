/**
 * `caravan worker`: one rank, bound to one device. It is told everything else by the coordinator.
 */
import { Command, InvalidArgumentError } from 'commander';
import pino from 'pino';
import { toCaravanError } from '../proto/errors.js';
import { Ort } from './ort.js';
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

const device = (text: string): string => {
  if (text !== 'cpu') throw new InvalidArgumentError('only cpu is there yet.');
  return text;
};

const program = new Command('caravan worker')
  .description('Runs one rank.')
  .requiredOption('--listen <host:port>', 'address to serve on; port 0 picks a free one', address)
  .option('--device <device>', 'device of this rank', device, 'cpu')
  .option('--threads <count>', 'threads that compute', threadCount, 1)
  .option('--log-level <level>', 'trace, debug, info, warn, error or silent', 'info')
  .exitOverride((error) => process.exit(error.exitCode === 0 ? 0 : 2));

const options = program.parse().opts<{ listen: string; threads: number; logLevel: string }>();
const log = pino(
  { name: 'rank', level: options.logLevel, base: { pid: process.pid } },
  pino.destination(2),
);

try {
  SharedSegment.removeOrphans();
  const server = new RankServer(new Ort(options.threads), log);
  const port = await server.listen(options.listen);
  const bound = options.listen.replace(/:\d+$/, `:${port}`);
  log.info({ address: bound }, 'listening');
  const stop = (): void => {
    server.stop();
    process.exit(0);
  };
  process.on('SIGTERM', stop);
  process.on('SIGINT', stop);
  if (process.send !== undefined) {
    process.on('disconnect', stop);
    process.send({ type: 'ready', address: bound });
  }
} catch (thrown) {
  const error = toCaravanError(thrown);
  process.stderr.write(`caravan: ${error.message}\n`);
  process.exit(error.code === 'bad_usage' ? 2 : 1);
}
