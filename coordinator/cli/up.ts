/** `caravan up`: everything on one machine. */
import path from 'node:path';
import fs from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import type { Command } from 'commander';
import type { Logger } from 'pino';
import { CaravanError } from '../../proto/errors.js';
import { linkSecurity } from '../../proto/link-security.js';
import { deviceOfRank } from '../../model/device-name.js';
import type { LoadProgress } from '../../proto/gen/cluster.js';
import { DEFAULT_MAX_STEP_ROWS, planGroup, weightCacheSettingNames } from '../group-spec.js';
import { ApiKeys } from '../api-keys.js';
import type { ServedAddresses } from '../gateway.js';
import { LoadBars } from '../load-bars.js';
import { openChecked } from '../local-group.js';
import { stepExecArgv, threadsPerRank } from '../local-ranks.js';
import { cliEntry, workerEntry } from '../package-root.js';
import { fileSettingNames } from '../file-settings.js';
import { intakeSettingNames, intakeSettings } from '../intake-settings.js';
import { openLog } from '../process.js';
import { defaultStateFolder, freePort, holdStateFolder } from '../state-folder.js';
import { Store } from '../store.js';
import { guardedChild, nodeChild, SupervisedChild, type ChildSpec } from '../supervisor.js';
import { askOnce } from '../ask.js';
import { flagOf } from '../config.js';
import { declareSettings } from './options.js';

const settingNames = [
  'model',
  'servedModelName',
  'tp',
  'device',
  'weights',
  'exact',
  'kv',
  'transport',
  ...weightCacheSettingNames,
  'speculation',
  'maxSeqLen',
  'maxBatchSize',
  'host',
  'port',
  'redis',
  'stateDir',
  ...fileSettingNames,
  'grpcPort',
  'tlsCert',
  'tlsKey',
  'tlsCa',
  'webhookSecret',
  'webhookAllow',
  ...intakeSettingNames,
  'apiKeys',
  'operators',
  'apiKey',
  'maxBodyBytes',
  'aging',
  'logLevel',
] as const;

/** Those that are the gateway's alone, and handed on as they are. */
const gatewaySettingNames = [
  ...intakeSettingNames,
  'grpcPort',
  'tlsCert',
  'tlsKey',
  'tlsCa',
  'apiKeys',
  'operators',
  'maxBodyBytes',
] as const;

export function register(program: Command): void {
  const command = program
    .command('up')
    .description('Runs everything on this machine: Redis, ranks, coordinator and gateway.')
    .option('--ask <text>', 'ask this in a chat once all is up, and print the answer')
    .option('--once', 'with --ask: stop after the answer');
  const settings = declareSettings(command, settingNames, {
    defaults: { tp: 2, logLevel: 'warn' },
  });
  command.action(async () => {
    const s = settings();
    const own = command.opts<{ ask?: string; once?: true }>();
    if (own.once === true && own.ask === undefined) {
      throw new CaravanError('bad_usage', '--once needs --ask TEXT');
    }
    await new Caravan(s, openLog('up', s.logLevel)).run(own.ask ?? null, own.once === true);
  });
}

type Settings = ReturnType<ReturnType<typeof declareSettings<(typeof settingNames)[number]>>>;

/** The processes, in the order in which they start; they stop in the opposite order. */
class Caravan {
  readonly #settings: Settings;
  readonly #log: Logger;
  readonly #children: SupervisedChild[] = [];
  #gateway: SupervisedChild | null = null;
  #coordinator: SupervisedChild | null = null;
  #signalCount = 0;
  #onSignal: () => void = () => undefined;

  constructor(settings: Settings, log: Logger) {
    this.#settings = settings;
    this.#log = log;
  }

  async run(question: string | null, isOnce: boolean): Promise<void> {
    const interrupted = new Promise<void>((resolve) => (this.#onSignal = resolve));
    const onSignal = (): void => {
      this.#signalCount += 1;
      this.#onSignal();
      const isForked = process.send !== undefined;
      if (this.#signalCount === 1) {
        if (!isForked) process.stderr.write('caravan: draining; Ctrl-C again stops\n');
      } else void this.#stopNow();
    };
    process.on('SIGINT', onSignal);
    process.on('SIGTERM', onSignal);
    // A parent that forked us is gone.
    if (process.send !== undefined) {
      process.on('disconnect', () => void this.#stopNow().finally(() => process.exit(1)));
    }
    try {
      const started = this.#start();
      const served = await Promise.race([started, interrupted]);
      if (served !== undefined) {
        const { url, grpcPort } = served;
        const { host, apiKey } = this.#settings;
        const rpc = grpcPort === null ? '' : `jobs over gRPC at ${host}:${grpcPort}\n`;
        process.stdout.write(`caravan serves ${url}\n${rpc}`);
        if (question !== null) {
          await Promise.race([askOnce(url, apiKey, question, process.stdout), interrupted]);
        }
        if (!isOnce) await interrupted;
      }
      await this.#drain();
    } catch (error) {
      await this.#stopNow();
      throw error;
    }
    // Timers of children that were being started again must not keep the process.
    process.exit(0);
  }

  async #start(): Promise<Pick<ServedAddresses, 'url' | 'grpcPort'>> {
    const s = this.#settings;
    // What is wrong with the model, or with files that the gateway reads, is said before any process starts.
    intakeSettings(s, s.apiKeys === undefined ? null : ApiKeys.read(s.apiKeys));
    linkSecurity(s);
    const checkpoint = openChecked(s.model, s.tp);
    const { tp } = s;
    const { weights } = planGroup(checkpoint, tp, { ...s, maxStepRows: DEFAULT_MAX_STEP_ROWS });
    const note = s.weights === 'auto' ? ' (auto)' : '';
    process.stderr.write(
      `caravan: ${path.basename(checkpoint.path)} on ${tp} ranks, weights ${weights}${note}\n`,
    );
    const redisUrl = s.redis ?? (await this.#startRedis());
    const addresses = await Promise.all(
      Array.from({ length: tp }, (_, rank) => this.#startRank(tp, rank)),
    );
    const shared = ['--redis', redisUrl, '--log-level', s.logLevel];
    const coordinatorArgs = [
      'coordinator',
      ...shared,
      ...['--ranks', addresses.join(',')],
      ...['--model', s.model, '--max-batch-size', String(s.maxBatchSize)],
      ...[
        '--transport',
        s.transport,
        '--speculation',
        s.speculation,
        '--weights',
        s.weights,
        '--device',
        s.device,
        '--kv',
        s.kv,
      ],
      ...['--weight-cache-max', String(s.weightCacheMax), '--aging', String(s.aging)],
      ...(s.exact ? ['--exact'] : []),
      ...optional('maxSeqLen', s.maxSeqLen),
      ...optional('servedModelName', s.servedModelName),
      ...optional('weightCache', s.weightCache),
    ];
    const bars = new LoadBars(tp, process.stderr);
    const onMessage = (message: Readonly<Record<string, unknown>>): void => {
      if (message['type'] !== 'loading') return;
      bars.progress(message['rank'] as number, message['progress'] as LoadProgress);
    };
    this.#coordinator = this.#supervise(
      nodeChild('coordinator', cliEntry, coordinatorArgs, onMessage, stepExecArgv),
    );
    const gatewayArgs = ['gateway', ...shared, '--host', s.host, '--port', String(s.port)];
    const folder = path.join(s.stateDir ?? defaultStateFolder(process.env), 'files');
    for (const name of fileSettingNames) {
      gatewayArgs.push(flagOf(name), String(name === 'files' ? (s.files ?? folder) : s[name]));
    }
    gatewayArgs.push(...optional('webhookSecret', s.webhookSecret));
    if (s.webhookAllow.length > 0) gatewayArgs.push('--webhook-allow', s.webhookAllow.join(','));
    for (const name of gatewaySettingNames) {
      if (s[name] !== undefined) gatewayArgs.push(flagOf(name), String(s[name]));
    }
    this.#gateway = this.#supervise(nodeChild('gateway', cliEntry, gatewayArgs));
    const serving = this.#coordinator.start().finally(() => {
      bars.end();
    });
    const [, gateway] = await Promise.all([serving, this.#gateway.start()]);
    return { url: String(gateway['url']), grpcPort: gateway['grpcPort'] as number | null };
  }

  async #startRedis(): Promise<string> {
    const folder = this.#settings.stateDir ?? defaultStateFolder(process.env);
    await holdStateFolder(folder);
    const data = path.join(folder, 'redis');
    fs.mkdirSync(data, { recursive: true });
    const port = await freePort();
    const url = `redis://127.0.0.1:${port}`;
    const args = ['--port', String(port), '--bind', '127.0.0.1', '--dir', data, '--save', ''];
    args.push('--appendonly', 'yes', '--maxmemory-policy', 'noeviction');
    const isServing = async (): Promise<boolean> => {
      try {
        (await Store.open(url, 'impatient')).close();
        return true;
      } catch {
        return false;
      }
    };
    await this.#supervise(guardedChild('redis', ['redis-server', ...args], isServing)).start();
    return url;
  }

  /** A rank keeps its port when it is started again: its coordinator knows it by that. */
  async #startRank(tp: number, rank: number): Promise<string> {
    const { device, logLevel } = this.#settings;
    const address = `127.0.0.1:${await freePort()}`;
    const args = ['--listen', address, '--device', deviceOfRank(device, rank)];
    args.push('--log-level', logLevel);
    args.push('--threads', String(threadsPerRank(tp)));
    await this.#supervise(nodeChild('rank', workerEntry, args, undefined, stepExecArgv)).start();
    return address;
  }

  #supervise(spec: ChildSpec): SupervisedChild {
    const child = new SupervisedChild(spec, this.#log);
    this.#children.push(child);
    return child;
  }

  /** New work is refused, running jobs end, then everything stops. */
  async #drain(): Promise<void> {
    const gatewayGone = this.#gateway?.stop('SIGTERM');
    await this.#coordinator?.stop('SIGTERM');
    // Streams of jobs that wait are cut; the jobs stay in the queue.
    await Promise.race([gatewayGone, delay(500)]);
    await this.#stopNow();
  }

  async #stopNow(): Promise<void> {
    for (const child of [...this.#children].reverse()) {
      const gone = child.stop('SIGTERM');
      await Promise.race([gone, delay(1_500).then(() => child.stop('SIGKILL'))]);
    }
  }
}

const optional = (
  name: 'maxSeqLen' | 'servedModelName' | 'weightCache' | 'webhookSecret',
  value: string | number | undefined,
): string[] => (value === undefined ? [] : [flagOf(name), String(value)]);
