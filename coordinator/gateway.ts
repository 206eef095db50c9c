/** `caravan gateway`: the HTTP front. Holds no state: jobs, journals and cards are in Redis. */
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import type { LinkSecurity } from '../proto/link-security.js';
import { Answers } from './answers.js';
import { Batches, type BatchLimits } from './batches.js';
import type { FileStorage } from './file-storage.js';
import { Files, type FileLimits } from './files.js';
import { createHttpServer } from './http.js';
import type { HttpCertificate } from './http-certificate.js';
import { listenHttp } from './http-listen.js';
import { BOARD_PATH } from './http-queues.js';
import { Intake, type IntakeRules } from './intake.js';
import { Journal } from './journal.js';
import { GatewayMetrics } from './metrics.js';
import { Models } from './models.js';
import { Backlog } from './queue-backlog.js';
import { QueueBoard, type BoardMode } from './queue-board.js';
import { JobsServer } from './rpc.js';
import { ScalerServer } from './scaler.js';
import { Store } from './store.js';
import { StoreConnection } from './store-connection.js';
import { WebhookRecords } from './store-webhooks.js';
import { WebhookIntake } from './webhook-intake.js';
import { WebhookPolicy } from './webhook-target.js';
import { Webhooks } from './webhooks.js';
import { endOverdueJobs } from './unheld-jobs.js';
import { RedisWatch } from './store-watch.js';
import { ResponseRecords } from './store-responses.js';
import { BatchRecords } from './store-batches.js';
import { FileRecords } from './store-files.js';
import type { Tenants } from './tenants.js';
import { WorkMeter } from './work.js';

export interface GatewayOptions {
  readonly redisUrl: string;
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  /** Where KEDA asks for the work there is; 0 takes a free one, left out serves none. */
  readonly scalerPort?: number | undefined;
  /** Where jobs are served over gRPC; 0 takes a free one, left out serves none. */
  readonly grpcPort?: number | undefined;
  /** Of the gRPC links of KEDA and of callers of jobs; plain if left out. */
  readonly security?: LinkSecurity | null;
  /** Of HTTPS; plain HTTP if left out. */
  readonly certificate?: HttpCertificate | null;
  /** Of uploaded files and of batch results; gateways of one Redis should share it. */
  readonly storage: FileStorage;
  readonly fileLimits: FileLimits;
  readonly batchLimits: BatchLimits;
  /** What Bull Board, under /queues, lets people do; `read` if left out. */
  readonly queueBoard?: BoardMode | undefined;
  /** Tenants who may look at it where tenants are kept apart: none if left out. */
  readonly operators?: readonly string[] | undefined;
  /** Signs webhooks; left out, there are none. */
  readonly webhookSecret?: string | undefined;
  /** Hosts, addresses and ranges that webhooks may call beside the public internet. */
  readonly webhookAllow?: readonly string[] | undefined;
  /** Of a request, but for uploaded files. */
  readonly maxBodyBytes: number;
  /** Who may put jobs into the queue, and how many. */
  readonly intake: { readonly tenants: Tenants; readonly rules: IntakeRules };
  /** Called once. */
  readonly onReady: (served: ServedAddresses) => void;
}

export interface ServedAddresses {
  readonly url: string;
  readonly scalerPort: number | null;
  readonly grpcPort: number | null;
}

/** Batches take what nobody else wants: the least urgent of JobTerms. */
const BATCH_PRIORITY = 1000;

/**
 * Serves until `draining` aborts and the open answers have ended, or until `stopping` aborts: answers are
 * cut then, and their jobs go on.
 *
 * @throws CaravanError `bad_usage` when the port is taken, `redis_unavailable`.
 */
export async function runGateway(
  options: GatewayOptions,
  draining: AbortSignal,
  stopping: AbortSignal,
  log: Logger,
): Promise<void> {
  const { redisUrl, host, port, scalerPort, grpcPort, onReady } = options;
  const { storage, fileLimits, batchLimits } = options;
  const onRedisError = (error: Error): void => {
    log.warn({ redis: error.message }, 'Redis');
  };
  const connection = await StoreConnection.open(redisUrl, 'impatient', onRedisError);
  const store = new Store(connection);
  const journal = await Journal.open(redisUrl, 'impatient', onRedisError);
  const metrics = new GatewayMetrics();
  const webhookRecords = new WebhookRecords(connection);
  const { webhookSecret: secret } = options;
  const policy = secret === undefined ? null : new WebhookPolicy(options.webhookAllow ?? []);
  const webhooks = new WebhookIntake(webhookRecords, policy);
  const intake = new Intake(store, options.intake.rules);
  const answers = new Answers(redisUrl, journal, metrics, onRedisError, { webhooks, intake });
  const models = new Models(store);
  const fileRecords = new FileRecords(connection);
  const batchRecords = new BatchRecords(connection);
  const responses = new ResponseRecords(connection);
  const backlog = new Backlog(connection);
  const work = new WorkMeter(backlog, store);
  const redis = new RedisWatch(store);
  const files = new Files(storage, fileRecords, fileLimits);
  const batchNeeds = { records: batchRecords, files, models, journal, answers };
  const batches = new Batches({ ...batchNeeds, priority: BATCH_PRIORITY }, batchLimits, log);
  const { tenants, rules } = options.intake;
  const routes = { store, journal, answers, models, metrics, work, redis, stopping, tenants };
  const kept = { responses, files, batches, batchRecords, retentionS: rules.retentionS };
  const boardMode = options.queueBoard ?? 'read';
  const board =
    boardMode === 'off' ? undefined : new QueueBoard(redisUrl, BOARD_PATH, boardMode, onRedisError);
  const { maxBodyBytes, certificate } = options;
  const operators = new Set(options.operators);
  const served = { ...routes, ...kept, webhooks, board, operators };
  const app = createHttpServer(served, maxBodyBytes, log, certificate);
  const over = AbortSignal.any([draining, stopping]);
  let runningBatches: Promise<void> | null = null;
  let runningWebhooks: Promise<void> | null = null;
  let endingOverdue: Promise<void> | null = null;
  const sending = { records: webhookRecords, journal, batchRecords, log };
  const sender =
    secret === undefined || policy === null ? null : new Webhooks({ ...sending, secret, policy });
  const scaler = scalerPort === undefined ? null : new ScalerServer(work, options.security);
  const jobs =
    grpcPort === undefined
      ? null
      : new JobsServer({ models, journal, answers, tenants }, options.security);
  try {
    const boundScalerPort = (await scaler?.listen(host, scalerPort!)) ?? null;
    const boundGrpcPort = (await jobs?.listen(host, grpcPort!)) ?? null;
    const url = await listenHttp(app, host, port);
    log.info({ url }, 'serving');
    onReady({ url, scalerPort: boundScalerPort, grpcPort: boundGrpcPort });
    runningBatches = batches.run(over);
    runningWebhooks = sender?.run(over) ?? null;
    endingOverdue = endOverdueJobs(
      journal,
      () => store.modelNames(),
      (model) => answers.queueOf(model),
      over,
    );
    await aborted(over);
    await app.close();
  } finally {
    await runningBatches;
    await runningWebhooks;
    await endingOverdue;
    scaler?.close();
    await jobs?.close();
    redis.close();
    await answers.close();
    await Promise.race([board?.close().catch(() => undefined), delay(1000)]);
    journal.close();
    connection.close();
  }
}

const aborted = (signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    if (signal.aborted) resolve();
    signal.addEventListener('abort', () => {
      resolve();
    });
  });
