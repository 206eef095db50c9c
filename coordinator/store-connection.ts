/**
 * Connections to Redis, of two tempers.
 *
 * A patient one (engines) waits for Redis to come back, however long, and sends what was asked again. An
 * impatient one (gateways and commands) fails a call within seconds, so that a client hears of it.
 */
import { Redis } from 'ioredis';
import { CaravanError } from '../proto/errors.js';
import { redisAddress } from './store-address.js';

export type Patience = 'patient' | 'impatient';

/** How long an impatient call may take. */
export const CALL_TIMEOUT_MS = 2_500;
const MAX_RETRY_DELAY_MS = 500;

/** Options that BullMQ's connections share with ours. */
export const redisOptions = (patience: Patience) => ({
  retryStrategy: (attempt: number) => Math.min(50 * attempt, MAX_RETRY_DELAY_MS),
  ...(patience === 'patient'
    ? { maxRetriesPerRequest: null }
    : { maxRetriesPerRequest: 3, commandTimeout: CALL_TIMEOUT_MS }),
});

/**
 * Opens a connection and waits until Redis answers.
 *
 * @param onError hears of every connection error after that; ioredis reconnects by itself.
 * @throws CaravanError `redis_unavailable` within 3 seconds.
 */
export async function connectRedis(
  url: string,
  patience: Patience,
  onError: (error: Error) => void = () => undefined,
): Promise<Redis> {
  const redis = new Redis({ ...redisOptions(patience), ...redisAddress(url), lazyConnect: true });
  redis.on('error', onError);
  const errors: Error[] = [];
  const remember = (error: Error): void => {
    errors[0] = error;
  };
  redis.on('error', remember);
  let timer: NodeJS.Timeout | undefined;
  try {
    await Promise.race([
      refuseCluster(redis, url),
      new Promise((_, reject) => {
        timer = setTimeout(() => {
          reject(new Error(`no answer within ${CALL_TIMEOUT_MS} ms`));
        }, CALL_TIMEOUT_MS);
      }),
    ]);
    return redis;
  } catch (cause) {
    redis.disconnect();
    throw cause instanceof CaravanError ? cause : unavailable(url, errors[0] ?? cause);
  } finally {
    redis.removeListener('error', remember);
    clearTimeout(timer);
  }
}

/** Keys of a job stand beside those of its queue: a cluster would spread them. */
async function refuseCluster(redis: Redis, url: string): Promise<void> {
  const info = await redis.info('cluster');
  if (!/^cluster_enabled:1/m.test(info)) return;
  throw new CaravanError(
    'bad_usage',
    `Redis at ${withoutPassword(url)} is in Cluster mode, which is not supported: use one primary, or Sentinel (redis+sentinel://)`,
  );
}

const withoutPassword = (url: string): string => url.replace(/\/\/[^@/]*@/, '//');

/** @returns a CaravanError that names the address without its password. */
export function unavailable(url: string, cause: unknown): CaravanError {
  const message = cause instanceof Error ? cause.message : String(cause);
  // ioredis's own words are about its settings.
  const reason = message.startsWith('Reached the max retries') ? 'the connection is lost' : message;
  return new CaravanError(
    'redis_unavailable',
    `Redis at ${withoutPassword(url)} cannot be reached: ${reason}`,
    { cause },
  );
}

/** Runs one call of an impatient connection; connection errors become `redis_unavailable`. */
export async function asCall<T>(url: string, call: () => Promise<T>): Promise<T> {
  try {
    return await call();
  } catch (thrown) {
    if (thrown instanceof CaravanError) throw thrown;
    if (thrown instanceof Error && thrown.name === 'ReplyError') {
      throw new CaravanError('redis_unavailable', `Redis refused: ${thrown.message}`, {
        cause: thrown,
      });
    }
    throw unavailable(url, thrown);
  }
}

/** One connection for all records that a process keeps. */
export class StoreConnection {
  readonly redis: Redis;
  readonly #url: string;

  private constructor(url: string, redis: Redis) {
    this.#url = url;
    this.redis = redis;
  }

  /** @throws CaravanError `redis_unavailable` within 3 seconds. */
  static async open(
    url: string,
    patience: Patience,
    onError?: (error: Error) => void,
  ): Promise<StoreConnection> {
    return new StoreConnection(url, await connectRedis(url, patience, onError));
  }

  /** Runs one call. @throws CaravanError `redis_unavailable`. */
  call<T>(call: () => Promise<T>): Promise<T> {
    return asCall(this.#url, call);
  }

  close(): void {
    this.redis.disconnect();
  }
}
