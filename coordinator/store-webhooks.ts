/**
 * Events that are to be delivered, and when they are looked at next.
 *
 *   caravan:{webhooks}:deliveries   hash: id of the job or batch → delivery, as JSON
 *   caravan:{webhooks}:due          sorted set: id by the time of the next look, in milliseconds
 *
 * A gateway that takes a delivery moves its next look beyond the time that it may need: should it die, another gateway
 * looks then.
 */
import type { Redis } from 'ioredis';
import type { StoreConnection } from './store-connection.js';
import { Script } from './store-script.js';

export interface Delivery {
  readonly version: 1;
  /** A job or a batch: what the event will be about. */
  readonly id: string;
  readonly url: string;
  readonly createdMs: number;
  /** Posts that were not answered with 2xx. */
  readonly failures: number;
}

const DELIVERIES = 'caravan:{webhooks}:deliveries';
const DUE = 'caravan:{webhooks}:due';

/** KEYS deliveries, due; ARGV id, delivery, time of the next look. The first of one id counts. @returns 1 for that one. */
const addScript = new Script(`
if redis.call('HSETNX', KEYS[1], ARGV[1], ARGV[2]) == 0 then return 0 end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
return 1`);

/** KEYS deliveries, due; ARGV now, time until which they are ours, most. @returns deliveries. */
const claimScript = new Script(`
local found = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], 0, ARGV[1], 'LIMIT', 0, ARGV[3])) do
  local delivery = redis.call('HGET', KEYS[1], id)
  if delivery then
    redis.call('ZADD', KEYS[2], ARGV[2], id)
    table.insert(found, delivery)
  else
    redis.call('ZREM', KEYS[2], id)
  end
end
return found`);

/** KEYS deliveries, due; ARGV id, delivery, time of the next look. One that is there no more stays away. */
const postponeScript = new Script(`
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])`);

export class WebhookRecords {
  readonly #connection: StoreConnection;
  readonly #redis: Redis;

  constructor(connection: StoreConnection) {
    this.#connection = connection;
    this.#redis = connection.redis;
  }

  /** Before the job or batch itself: it cannot end unheard. Can be repeated. @returns whether it is the first. */
  async add(id: string, url: string, lookMs: number): Promise<boolean> {
    const delivery: Delivery = { version: 1, id, url, createdMs: Date.now(), failures: 0 };
    return (await this.#run(addScript, [id, JSON.stringify(delivery), lookMs])) === 1;
  }

  /** Deliveries that are due; they are the caller's until `untilMs`. */
  async claim(nowMs: number, untilMs: number, most: number): Promise<Delivery[]> {
    const texts = (await this.#run(claimScript, [nowMs, untilMs, most])) as string[];
    return texts.map((text) => JSON.parse(text) as Delivery);
  }

  async postpone(delivery: Delivery, lookMs: number): Promise<void> {
    await this.#run(postponeScript, [delivery.id, JSON.stringify(delivery), lookMs]);
  }

  /** What it is about has ended: it is looked at now. */
  async hurry(id: string): Promise<void> {
    await this.#call(() => this.#redis.zadd(DUE, 'XX', 'LT', Date.now(), id));
  }

  async remove(id: string): Promise<void> {
    await this.#call(() => this.#redis.multi().hdel(DELIVERIES, id).zrem(DUE, id).exec());
  }

  /** Deliveries that are not done. */
  async count(): Promise<number> {
    return this.#call(() => this.#redis.zcard(DUE));
  }

  #run(script: Script, args: readonly (string | number)[]): Promise<unknown> {
    return this.#call(() => script.run(this.#redis, [DELIVERIES, DUE], args));
  }

  #call<T>(call: () => Promise<T>): Promise<T> {
    return this.#connection.call(call);
  }
}
