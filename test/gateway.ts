/**
 * A gateway in the test's own process, over a real Redis, with the card of caravan-tiny and no engine: the test
 * itself takes the jobs and writes their journals.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { pino } from 'pino';
import { FileFolder } from '../coordinator/file-folder.js';
import type { FileStorage } from '../coordinator/file-storage.js';
import { runGateway, type GatewayOptions, type ServedAddresses } from '../coordinator/gateway.js';
import type { IntakeRules } from '../coordinator/intake.js';
import { Journal, type Take } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import type { ModelCard } from '../coordinator/request.js';
import { Store } from '../coordinator/store.js';
import { Tenants } from '../coordinator/tenants.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { readFolderTokenizer } from '../model/tokenizer-files.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { startRedis, type RedisServer } from './redis-server.js';

/** Lets in whatever comes. */
export const openRules: IntakeRules = {
  admission: 'estimate',
  maxQueuedJobs: 1_000_000,
  maxQueuedTokens: 1e12,
  retentionS: 86_400,
};

export interface TestGateway {
  readonly url: string;
  /** Where KEDA would ask. */
  readonly scalerPort: number;
  /** Where jobs are served over gRPC. */
  readonly grpcPort: number;
  readonly redis: RedisServer;
  readonly store: Store;
  readonly journal: Journal;
  readonly card: ModelCard;
  readonly tokenizer: Tokenizer;
  /** POSTs a body as JSON. */
  post(route: string, body: unknown, signal?: AbortSignal): Promise<Response>;
  /** Takes the job as an engine does. */
  take(jobId: string): Promise<Take>;
  /** Jobs in the queue. */
  jobIds(): Promise<string[]>;
  /** A job that is in the queue and was not among these. */
  nextJob(before: ReadonlySet<string>): Promise<string>;
  /** Lets open answers end, as SIGTERM does. */
  drain(): Promise<void>;
  stop(): Promise<void>;
}

/** @param storage of files; a folder of its own unless told otherwise. @param more options of the gateway. */
export async function startGateway(
  storage?: FileStorage,
  more: Partial<GatewayOptions> = {},
): Promise<TestGateway> {
  const redis = await startRedis();
  const store = await Store.open(redis.url, 'patient');
  const journal = await Journal.open(redis.url, 'patient');
  const files = readFolderTokenizer(embeddedModelPath());
  const tokenizer = openTokenizer(files);
  const card: ModelCard = {
    version: 1,
    name: 'caravan-tiny',
    digest: '0'.repeat(64),
    createdS: 1_700_000_000,
    vocabSize: tokenizer.vocabSize,
    maxSeqLen: 512,
    maxBatchSize: 4,
    bosTokenId: tokenizer.bosTokenId,
    eosTokenIds: tokenizer.eosTokenIds,
    tokenizerFiles: Object.fromEntries(
      [...files].map(([name, bytes]) => [name, Buffer.from(bytes).toString('base64')]),
    ),
    defaults: { temperature: 0.6, topP: 0.9 },
    isExact: true,
  };
  await store.publishCard(card);

  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-files-'));
  const draining = new AbortController();
  const stopping = new AbortController();
  let ended: Promise<void> = Promise.resolve();
  let scalerPort = 0;
  let grpcPort = 0;
  const url = await new Promise<string>((resolve, reject) => {
    const onReady = (served: ServedAddresses): void => {
      scalerPort = served.scalerPort ?? 0;
      grpcPort = served.grpcPort ?? 0;
      resolve(served.url);
    };
    const options = {
      ...{ redisUrl: redis.url, host: '127.0.0.1', port: 0, scalerPort: 0, grpcPort: 0, onReady },
      storage: storage ?? new FileFolder(folder),
      fileLimits: { fileBytes: 1_000_000, storedBytes: 10_000_000 },
      batchLimits: { lines: 1000, open: 10, linesInFlight: 16 },
      intake: { tenants: Tenants.open(), rules: openRules },
      maxBodyBytes: 16 * 1024 * 1024,
      ...more,
    };
    const log = pino({ level: 'silent' }, pino.destination(fs.openSync('/dev/null', 'w')));
    ended = runGateway(options, draining.signal, stopping.signal, log);
    ended.catch(reject);
  });
  const queue = new JobQueue(redis.url, card.name);
  const jobIds = (): Promise<string[]> => queue.ids(1000);
  const drain = async (): Promise<void> => {
    draining.abort();
    await ended;
  };
  return {
    url,
    scalerPort,
    grpcPort,
    redis,
    store,
    journal,
    card,
    tokenizer,
    post: (route, body, signal) =>
      fetch(`${url}${route}`, {
        method: 'POST',
        headers: { 'content-type': 'application/json' },
        body: JSON.stringify(body),
        ...(signal === undefined ? {} : { signal }),
      }),
    take: async (jobId) => {
      const take = await journal.take(jobId, 'engine of the test');
      if (take.kind !== 'taken') throw new Error(`${jobId} is ${take.kind}`);
      return take;
    },
    jobIds,
    nextJob: async (before) => {
      const giveUpMs = performance.now() + 30_000;
      for (;;) {
        const id = (await jobIds()).find((each) => !before.has(each));
        if (id !== undefined) return id;
        if (performance.now() > giveUpMs) throw new Error('no job came');
      }
    },
    drain,
    stop: async () => {
      stopping.abort();
      await drain();
      await queue.close();
      journal.close();
      store.close();
      fs.rmSync(folder, { recursive: true, force: true });
      await redis.stop();
    },
  };
}

export interface SseEvent {
  readonly id: string | null;
  readonly data: string;
}

/** The events of a stream, as they come; comments are left out. */
export async function* sseEvents(response: Response): AsyncGenerator<SseEvent> {
  let pending = '';
  for await (const text of response.body!.pipeThrough(
    new TextDecoderStream('utf-8', { fatal: true }),
  )) {
    const events = `${pending}${text}`.split('\n\n');
    pending = events.pop()!;
    for (const event of events) {
      const data = /^data: (.*)$/m.exec(event)?.[1];
      if (data !== undefined) yield { id: /^id: (.*)$/m.exec(event)?.[1] ?? null, data };
    }
  }
}
