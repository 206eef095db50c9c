/** `caravan gateway`: the HTTP front, over a Redis that runs already. */
import path from 'node:path';
import type { Command } from 'commander';
import { linkSecurity } from '../../proto/link-security.js';
import { ApiKeys } from '../api-keys.js';
import { runGateway } from '../gateway.js';
import { HttpCertificate } from '../http-certificate.js';
import { drainTimeoutMs, listenForShutdown, openLog, reportReady } from '../process.js';
import { defaultStateFolder } from '../state-folder.js';
import { fileSettingNames, fileSettings } from '../file-settings.js';
import { intakeSettingNames, intakeSettings } from '../intake-settings.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('gateway')
    .description('Runs the HTTP front: an OpenAI-compatible API over the queue.');
  const settings = declareSettings(
    command,
    [
      'redis',
      'host',
      'port',
      'scalerPort',
      'grpcPort',
      'drainTimeout',
      'tlsCert',
      'tlsKey',
      'tlsCa',
      'httpsCert',
      'httpsKey',
      ...fileSettingNames,
      'queueBoard',
      'operators',
      'webhookSecret',
      'webhookAllow',
      ...intakeSettingNames,
      'apiKeys',
      'maxBodyBytes',
      'logLevel',
    ],
    { required: ['redis'] },
  );
  command.action(async () => {
    const s = settings();
    const { redis, host, port, scalerPort, grpcPort, logLevel } = s;
    const { queueBoard, webhookSecret, webhookAllow } = s;
    const folder = path.join(defaultStateFolder(process.env), 'files');
    const apiKeys = s.apiKeys === undefined ? null : ApiKeys.read(s.apiKeys);
    const intake = intakeSettings(s, apiKeys);
    const limits = await fileSettings(s, folder);
    const { maxBodyBytes } = s;
    const { draining, stopping } = listenForShutdown(drainTimeoutMs(s));
    const log = openLog('gateway', logLevel);
    apiKeys?.watch(log);
    await runGateway(
      {
        redisUrl: redis,
        host,
        port,
        scalerPort,
        grpcPort,
        queueBoard,
        operators: s.operators?.split(','),
        security: linkSecurity(s),
        certificate: HttpCertificate.open(s),
        webhookSecret,
        webhookAllow,
        ...limits,
        intake,
        maxBodyBytes,
        onReady: reportReady,
      },
      draining,
      stopping,
      log,
    );
    // Connections that wait for a dead Redis must not keep the process.
    process.exit(0);
  });
}
