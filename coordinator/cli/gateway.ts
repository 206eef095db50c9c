/** `caravan gateway`: the HTTP front, over a Redis that runs already. */
import type { Command } from 'commander';
import { runGateway } from '../gateway.js';
import { listenForShutdown, openLog, reportReady } from '../process.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('gateway')
    .description('Runs the HTTP front: an OpenAI-compatible API over the queue.');
  const settings = declareSettings(command, ['redis', 'host', 'port', 'logLevel'], {
    required: ['redis'],
  });
  command.action(async () => {
    const { redis, host, port, logLevel } = settings();
    const { draining, stopping } = listenForShutdown();
    const onReady = (url: string): void => {
      reportReady({ url });
    };
    const log = openLog('gateway', logLevel);
    await runGateway({ redisUrl: redis, host, port, onReady }, draining, stopping, log);
    // Connections that wait for a dead Redis must not keep the process.
    process.exit(0);
  });
}
