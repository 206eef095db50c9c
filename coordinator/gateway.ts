/** `caravan gateway`: the HTTP front. Holds no state: jobs, journals and cards are in Redis. */
import type { Logger } from 'pino';
import { CaravanError } from '../proto/errors.js';
import { Answers } from './answers.js';
import { createHttpServer } from './http.js';
import { Journal } from './journal.js';
import { GatewayMetrics } from './metrics.js';
import { Models } from './models.js';
import { Store } from './store.js';

export interface GatewayOptions {
  readonly redisUrl: string;
  readonly host: string;
  /** 0 takes a free one. */
  readonly port: number;
  /** Called once, with the address that is served. */
  readonly onReady: (url: string) => void;
}

/**
 * Serves until `draining` aborts and the open answers have ended, or until `stopping` aborts: answers are
 * cut then, and their jobs go on.
 *
 * @throws CaravanError `bad_usage` when the port is taken, `redis_unavailable`.
 */
export async function runGateway(
  { redisUrl, host, port, onReady }: GatewayOptions,
  draining: AbortSignal,
  stopping: AbortSignal,
  log: Logger,
): Promise<void> {
  const onRedisError = (error: Error): void => {
    log.warn({ redis: error.message }, 'Redis');
  };
  const store = await Store.open(redisUrl, 'impatient', onRedisError);
  const journal = await Journal.open(redisUrl, 'impatient', onRedisError);
  const metrics = new GatewayMetrics();
  const answers = new Answers(redisUrl, journal, metrics, onRedisError);
  const models = new Models(store);
  const app = createHttpServer({ store, journal, answers, models, metrics, stopping }, log);
  try {
    const url = await listen(() => app.listen({ host, port }), host, port);
    log.info({ url }, 'serving');
    onReady(url);
    await aborted(AbortSignal.any([draining, stopping]));
    await app.close();
  } finally {
    await answers.close();
    journal.close();
    store.close();
  }
}

async function listen(start: () => Promise<string>, host: string, port: number): Promise<string> {
  try {
    return await start();
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const reason = code === 'EADDRINUSE' ? 'another program listens there' : message;
    throw new CaravanError('bad_usage', `--host ${host} --port ${port}: ${reason}`, { cause });
  }
}

const aborted = (signal: AbortSignal): Promise<void> =>
  new Promise((resolve) => {
    if (signal.aborted) resolve();
    signal.addEventListener('abort', () => {
      resolve();
    });
  });
