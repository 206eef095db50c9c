/**
 * `caravan coordinator`: one engine. Forms the group of ranks, publishes the model card, and runs jobs until
 * it is told to drain or to stop; forms the group anew when a rank is lost.
 */
import { randomUUID } from 'node:crypto';
import os from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from 'pino';
import { checkpointName, type Checkpoint } from '../model/checkpoint.js';
import { readGenerationDefaults } from '../model/generation-config.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import type { LoadProgress, WeightCache } from '../proto/gen/cluster.js';
import type { LinkSecurity } from '../proto/link-security.js';
import type { Config } from './config.js';
import { EngineHealth } from './engine-health.js';
import { RankEngine } from './engine.js';
import type { StepFigures } from './step-figures.js';
import { EnginePace } from './engine-pace.js';
import { EngineSpeed } from './engine-speed.js';
import { Heartbeat } from './heartbeat.js';
import { serveEngineFace } from './http-engine.js';
import { JobRunner } from './job-runner.js';
import { Journal } from './journal.js';
import { LoadingSign } from './loading-sign.js';
import { EngineMetrics } from './metrics-engine.js';
import { DEFAULT_MAX_STEP_ROWS, planGroup, type GroupSpec } from './group-spec.js';
import { openChecked } from './local-group.js';
import { PodDeletionCost, type PodIdentity } from './pod-deletion-cost.js';
import { JobTaker } from './queue-taker.js';
import { Ranks } from './ranks.js';
import type { ModelCard } from './request.js';
import { draftTokensOf } from './speculation.js';
import { Store, type EngineBeat } from './store.js';
import { RedisWatch } from './store-watch.js';
import { takeDelayMs } from './take-order.js';

export interface CoordinatorOptions {
  /** HOST:PORT of every rank, in rank order. */
  readonly ranks: readonly string[];
  readonly redisUrl: string;
  readonly model: string;
  readonly servedModelName: string | undefined;
  readonly maxSeqLen: number | undefined;
  readonly maxBatchSize: number;
  /** A job that has waited this long gets its turn whatever else there is. */
  readonly agedAfterMs: number;
  /** A job whose engine has said nothing for so long goes to another. */
  readonly lockMs: number;
  readonly isExact: boolean;
  /** What all ranks compute on. */
  readonly device: string;
  readonly weights: Config['weights'];
  readonly kv: Config['kv'];
  readonly transport: Config['transport'];
  readonly speculation: Config['speculation'];
  /** Address and port of probes and metrics; 0 takes a free one, left out serves none. */
  readonly host: string;
  readonly metricsPort?: number | undefined;
  /** A step or a loading that has not moved on for this long makes the engine unhealthy. */
  readonly stallTimeoutMs: number;
  /** Ranks that have not come up by then are not coming; once they have served, they are waited for. */
  readonly ranksTimeoutMs: number;
  /** Of the links to ranks; plain if left out. */
  readonly security?: LinkSecurity | null;
  /** Engines of low ordinals take jobs first. */
  readonly ordinal?: number | undefined;
  /** The Pod whose deletion cost is kept up to date. */
  readonly pod?: PodIdentity | null;
  /** Called once, when probes and metrics are served. */
  readonly onFace?: (url: string) => void;
  readonly keptWeights?: WeightCache | undefined;
  /** Hears how far ranks have loaded, also when a group is formed anew. */
  readonly onProgress?: (rank: number, progress: LoadProgress) => void;
  /** Called once, when the first group serves. */
  readonly onReady: (card: ModelCard) => void;
  readonly onStep?: (figures: StepFigures) => void;
}

const FIRST_RETRY_MS = 200;
const MAX_RETRY_MS = 5_000;

/**
 * Runs until `draining` aborts and the running jobs have ended, or until `stopping` aborts.
 *
 * @throws CaravanError for what trying again cannot mend: a damaged checkpoint, an illegal tp, ranks that
 *   refuse what they are told.
 */
export async function runCoordinator(
  options: CoordinatorOptions,
  draining: AbortSignal,
  stopping: AbortSignal,
  log: Logger,
): Promise<void> {
  const checkpoint = openChecked(options.model, options.ranks.length);
  const { spec, weights } = planGroup(checkpoint, options.ranks.length, {
    ...options,
    exact: options.isExact,
    maxStepRows: DEFAULT_MAX_STEP_ROWS,
  });
  const files = checkpoint.readTokenizerFiles();
  const tokenizer = openTokenizer(files);
  checkVocabulary(checkpoint, tokenizer);
  const card = cardOf(checkpoint, spec, tokenizer, files, options);
  const onRedisError = (error: Error): void => {
    log.warn({ redis: error.message }, 'Redis');
  };
  const store = await Store.open(options.redisUrl, 'patient', onRedisError);
  const journal = await Journal.open(options.redisUrl, 'patient', onRedisError);
  let heartbeat: Heartbeat | null = null;
  const rank = { model: card.name, ordinal: options.ordinal };
  const taker = new JobTaker(options.redisUrl, card.name, onRedisError, options, () =>
    takeDelayMs(rank, heartbeat?.engines ?? []),
  );
  const health = new EngineHealth(
    {
      tp: options.ranks.length,
      slots: spec.maxBatchSize,
      kvPositions: spec.maxBatchSize * spec.maxSeqLen,
    },
    options.stallTimeoutMs,
  );
  const metrics = new EngineMetrics(card.name);
  const redis = new RedisWatch(store);
  const onDrain = (): void => {
    health.drain();
    heartbeat?.beat();
    void cost?.look();
  };
  draining.addEventListener('abort', onDrain);
  let face: { close: () => Promise<void> } | null = null;
  const engineId = `${os.hostname()}-${randomUUID().slice(0, 8)}`;
  const speed = new EngineSpeed();
  const pace = new EnginePace(card.maxBatchSize);
  const cost =
    options.pod == null
      ? null
      : new PodDeletionCost(options.pod, health, (message) => {
          log.warn({ pod: options.pod?.pod }, `pod-deletion-cost: ${message}`);
        });
  const loading = new LoadingSign(store, card.name, engineId, health);
  let isReady = false;
  const startMs = performance.now();
  try {
    if (options.metricsPort !== undefined) {
      const tokensPerSecond = (): number | null => speed.tokensPerSecond;
      const parts = { health, metrics, redis, tokensPerSecond };
      const served = await serveEngineFace(parts, options.host, options.metricsPort);
      face = served;
      options.onFace?.(served.url);
      log.info({ url: served.url }, 'probes and metrics');
    }
    const over = AbortSignal.any([draining, stopping]);
    const isOver = (): boolean => over.aborted;
    for (let retryMs = FIRST_RETRY_MS; !isOver();) {
      try {
        health.wait();
        const ranks = await Ranks.connect(options.ranks, spec, {
          signal: over,
          security: options.security ?? null,
          onReached: (rank) => {
            health.rankReached(rank);
          },
          onProgress: (rank, progress) => {
            health.rankLoading(rank, progress.bytesRead, progress.bytesTotal);
            log.debug({ rank, ...progress }, 'loading');
            options.onProgress?.(rank, progress);
          },
        });
        for (const warning of ranks.warnings) log.warn(warning);
        retryMs = FIRST_RETRY_MS;
        try {
          await orAborted(store.publishCard(card), over);
        } catch (error) {
          // Ranks that are held serve nobody else, the next attempt included.
          ranks.close();
          throw error;
        }
        if (!isReady) options.onReady(card);
        isReady = true;
        log.info(
          {
            ...{ model: card.name, weights, tp: options.ranks.length, engine: engineId },
            ...(ranks.transport === '' ? {} : { transport: ranks.transport }),
          },
          'serving',
        );
        for (const note of ranks.notes) log.info(note);
        const engine = new RankEngine(ranks, tokenizer, {
          ...spec,
          isExact: options.isExact,
          draftTokens: draftTokensOf(options.speculation),
          onStep: (figures) => {
            speed.add(figures.rows, figures.sequences, figures.totalMs);
            pace.addStep(figures, performance.now(), engine.freeSlotCount);
            metrics.step(figures.rows, figures.totalMs);
            metrics.drafts(figures.draftTokens, figures.acceptedTokens);
            options.onStep?.(figures);
          },
        });
        health.serve(() => engine.load);
        const runner = new JobRunner(engine, journal, taker, engineId, log, (outcome, job) => {
          metrics.jobLeft(outcome);
          if (outcome === 'completed') pace.addJob(job, Date.now());
        });
        const beat = (): EngineBeat => ({
          ...{ model: card.name, engineId, active: engine.sequenceCount, slots: card.maxBatchSize },
          ...{ tp: options.ranks.length, speeds: speed.speeds, isDraining: draining.aborted },
          ...pace.beat,
          ...(options.ordinal === undefined ? {} : { ordinal: options.ordinal }),
        });
        heartbeat = new Heartbeat(store, beat);
        try {
          await serve(engine, runner, draining, stopping);
        } finally {
          await heartbeat.close();
        }
      } catch (thrown) {
        if (isOver()) return;
        const error = toCaravanError(thrown);
        const isTooLate = !isReady && performance.now() - startMs > options.ranksTimeoutMs;
        if (isFinal(error) || isTooLate) throw error;
        log.warn({ code: error.code, retryMs }, error.message);
        await orAborted(delay(retryMs), over).catch(() => undefined);
        retryMs = Math.min(2 * retryMs, MAX_RETRY_MS);
      }
    }
  } finally {
    draining.removeEventListener('abort', onDrain);
    loading.close();
    redis.close();
    await cost?.close();
    await taker.close();
    journal.close();
    store.close();
    await face?.close();
  }
}

/** Waits, but not once the signal aborts: Redis may be away for long. @throws the signal's reason. */
function orAborted<T>(waiting: Promise<T>, signal: AbortSignal): Promise<T> {
  return new Promise((resolve, reject) => {
    const onAbort = (): void => {
      reject(toCaravanError(signal.reason, 'cancelled'));
    };
    if (signal.aborted) onAbort();
    signal.addEventListener('abort', onAbort);
    waiting.then(resolve, reject).finally(() => {
      signal.removeEventListener('abort', onAbort);
    });
  });
}

/** One group, until it drains, stops or loses a rank. */
async function serve(
  engine: RankEngine,
  runner: JobRunner,
  draining: AbortSignal,
  stopping: AbortSignal,
): Promise<void> {
  const engineDone = new AbortController();
  const engineLost = new AbortController();
  const running = engine.run(engineDone.signal).catch((error: unknown) => {
    engineLost.abort(error);
  });
  try {
    await runner.run(AbortSignal.any([draining, engineLost.signal]), stopping);
  } finally {
    engineDone.abort();
    await running;
  }
  engineLost.signal.throwIfAborted();
}

/** What no other attempt can mend. */
const isFinal = ({ code }: CaravanError): boolean =>
  [
    'bad_usage',
    'illegal_tp',
    'invalid_checkpoint',
    'unsupported_model',
    'invalid_request',
  ].includes(code) || ['protocol_mismatch', 'out_of_memory'].includes(code);

function checkVocabulary(checkpoint: Checkpoint, tokenizer: Tokenizer): void {
  const { vocabSize } = checkpoint.config;
  if (tokenizer.vocabSize > vocabSize) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${checkpoint.path}: the tokenizer has ${tokenizer.vocabSize} tokens, the model's vocabulary ${vocabSize}`,
    );
  }
}

function cardOf(
  checkpoint: Checkpoint,
  spec: GroupSpec,
  tokenizer: Tokenizer,
  files: ReadonlyMap<string, Uint8Array>,
  options: CoordinatorOptions,
): ModelCard {
  return {
    version: 1,
    name: options.servedModelName ?? checkpointName(checkpoint.path),
    digest: checkpoint.digest,
    createdS: Math.floor(Date.now() / 1000),
    vocabSize: checkpoint.config.vocabSize,
    maxSeqLen: spec.maxSeqLen,
    maxBatchSize: spec.maxBatchSize,
    bosTokenId: tokenizer.bosTokenId,
    eosTokenIds: tokenizer.eosTokenIds,
    tokenizerFiles: Object.fromEntries(
      [...files].map(([name, bytes]) => [name, Buffer.from(bytes).toString('base64')]),
    ),
    defaults: readGenerationDefaults(files),
    isExact: options.isExact,
  };
}
