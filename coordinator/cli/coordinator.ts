/** `caravan coordinator`: one engine, over ranks that run already. */
import type { Command } from 'commander';
import { weightCacheSettingNames, weightCacheTerms } from '../group-spec.js';
import { runCoordinator } from '../main.js';
import { linkSecurity } from '../../proto/link-security.js';
import { podIdentity } from '../pod-deletion-cost.js';
import {
  drainTimeoutMs,
  listenForShutdown,
  openLog,
  reportLoading,
  reportReady,
} from '../process.js';
import { declareSettings } from './options.js';

export function register(program: Command): void {
  const command = program
    .command('coordinator')
    .description('Runs one engine: takes jobs from Redis and drives a group of ranks.');
  const settings = declareSettings(
    command,
    [
      'ranks',
      'redis',
      'model',
      'servedModelName',
      'device',
      'weights',
      'exact',
      'kv',
      'transport',
      ...weightCacheSettingNames,
      'speculation',
      'maxSeqLen',
      'maxBatchSize',
      'aging',
      'jobLock',
      'host',
      'metricsPort',
      'stallTimeout',
      'ranksTimeout',
      'drainTimeout',
      'tlsCert',
      'tlsKey',
      'tlsCa',
      'tlsServerName',
      'ordinal',
      'podDeletionCost',
      'logLevel',
    ],
    { required: ['ranks', 'redis'] },
  );
  command.action(async () => {
    const s = settings();
    const { draining, stopping } = listenForShutdown(drainTimeoutMs(s));
    let metricsUrl: string | null = null;
    await runCoordinator(
      {
        ranks: s.ranks,
        redisUrl: s.redis,
        model: s.model,
        servedModelName: s.servedModelName,
        maxSeqLen: s.maxSeqLen,
        maxBatchSize: s.maxBatchSize,
        agedAfterMs: 1000 * s.aging,
        lockMs: 1000 * s.jobLock,
        isExact: s.exact,
        weights: s.weights,
        kv: s.kv,
        device: s.device,
        transport: s.transport,
        keptWeights: weightCacheTerms(s),
        onProgress: reportLoading,
        speculation: s.speculation,
        host: s.host,
        metricsPort: s.metricsPort,
        security: linkSecurity(s),
        ordinal: s.ordinal,
        pod: s.podDeletionCost ? podIdentity(process.env) : null,
        stallTimeoutMs: 1000 * s.stallTimeout,
        ranksTimeoutMs: 1000 * s.ranksTimeout,
        onFace: (url) => {
          metricsUrl = url;
        },
        onReady: (card) => {
          reportReady({ model: card.name, metricsUrl });
        },
      },
      draining,
      stopping,
      openLog('coordinator', s.logLevel),
    );
    // Connections that wait for a dead Redis must not keep the process.
    process.exit(0);
  });
}
