/**
 * What is known of models and engines beside the jobs: model cards, which stay at zero engines, and the
 * heartbeats of the engines that are there.
 *
 *   caravan:cards                     hash: name → card
 *   caravan:engine:{MODEL}:ENGINE     a key that an engine renews; gone soon after the engine is
 *   caravan:engines                   sorted set: those keys → until when they hold, by Redis's clock
 *   caravan:loading:{MODEL}           sorted set: engines that read their weights → until when that holds, by Redis's clock
 *   caravan:speeds:{MODEL}            hash: sequences of a step → tokens a second, as told last; stays as cards do
 *   caravan:paces                     hash: name → what a step of the engine costs that beat last
 */
import type { Redis } from 'ioredis';
import type { Speed } from './engine-speed.js';
import type { Pace } from './pace.js';
import type { ModelCard } from './request.js';
import { StoreConnection, type Patience } from './store-connection.js';
import { Script } from './store-script.js';

const CARDS = 'caravan:cards';
const PACES = 'caravan:paces';
const ENGINES = 'caravan:engines';
/** An engine that has not beaten for this long is gone. */
const HEARTBEAT_TTL_MS = 6_000;
export const HEARTBEAT_EVERY_MS = 2_000;

export interface EngineBeat {
  readonly model: string;
  readonly engineId: string;
  /** Sequences that it runs, of slots that it has. */
  readonly active: number;
  readonly slots: number;
  readonly tp: number;
  /** As measured; left out before. */
  readonly speeds?: readonly Speed[];
  /** Engines of low ordinals take jobs first; left out where engines have none. */
  readonly ordinal?: number;
  /** It takes no more jobs. */
  readonly isDraining?: boolean;
  /** What its steps cost; left out before its first step. */
  readonly pace?: Pace;
  /** How much longer promised jobs ran than was reckoned; 1 if left out. */
  readonly slowness?: number;
  /** How much more of its time work took than was reckoned; 1 if left out. */
  readonly overhead?: number;
  /** Rows that its steps have at most, as it has learned. */
  readonly stepRows?: number;
}

export interface RedisHealth {
  readonly version: string;
  readonly maxmemoryPolicy: string;
  readonly isAppendOnly: boolean;
  /** Whether the last write of the append-only file went well. */
  readonly isAofWritten: boolean;
  /** Whether it is still reading its files after a start. */
  readonly isLoading: boolean;
  /** Redis's clock minus ours, in milliseconds. */
  readonly clockSkewMs: number;
}

export class Store {
  readonly #connection: StoreConnection;
  readonly #redis: Redis;
  /** Keys of engines that came before there was a set of them, and that still renew theirs; null before the first look. */
  #unlisted: string[] | null = null;

  constructor(connection: StoreConnection) {
    this.#connection = connection;
    this.#redis = connection.redis;
  }

  /** @throws CaravanError `redis_unavailable` within 3 seconds. */
  static async open(
    url: string,
    patience: Patience,
    onError?: (error: Error) => void,
  ): Promise<Store> {
    return new Store(await StoreConnection.open(url, patience, onError));
  }

  async publishCard(card: ModelCard): Promise<void> {
    await this.#call(() => this.#redis.hset(CARDS, card.name, JSON.stringify(card)));
  }

  async card(name: string): Promise<ModelCard | null> {
    const text = await this.#call(() => this.#redis.hget(CARDS, name));
    return text === null ? null : (JSON.parse(text) as ModelCard);
  }

  /** All cards, by name. */
  async cards(): Promise<ModelCard[]> {
    const texts = await this.#call(() => this.#redis.hvals(CARDS));
    const cards = texts.map((text) => JSON.parse(text) as ModelCard);
    return cards.sort((a, b) => (a.name < b.name ? -1 : 1));
  }

  /** Names of the models that have a card. */
  async modelNames(): Promise<string[]> {
    return this.#call(() => this.#redis.hkeys(CARDS));
  }

  async beat(beat: EngineBeat): Promise<void> {
    const key = engineKey(beat.model, beat.engineId);
    const args = [JSON.stringify(beat), HEARTBEAT_TTL_MS];
    await this.#call(() => beatScript.run(this.#redis, [key, ENGINES], args));
    const { pace, speeds = [] } = beat;
    if (pace !== undefined) {
      await this.#call(() => this.#redis.hset(PACES, beat.model, JSON.stringify(pace)));
    }
    if (speeds.length === 0) return;
    const fields = speeds.flatMap((speed) => [String(speed.sequences), speed.tokensPerSecond]);
    await this.#call(() => this.#redis.hset(speedsKey(beat.model), fields));
  }

  /** The speeds that engines of the model told last, kind by kind; they stay at zero engines. */
  async rememberedSpeeds(model: string): Promise<Speed[]> {
    const fields = await this.#call(() => this.#redis.hgetall(speedsKey(model)));
    return Object.entries(fields).map(([sequences, rate]) => ({
      sequences: Number(sequences),
      tokensPerSecond: Number(rate),
    }));
  }

  /** What steps of the model's engine cost that beat last; null when none was ever measured. */
  async lastPace(model: string): Promise<Pace | null> {
    const text = await this.#call(() => this.#redis.hget(PACES, model));
    return text === null ? null : (JSON.parse(text) as Pace);
  }

  /** An engine that ends says so. */
  async retire(model: string, engineId: string): Promise<void> {
    const key = engineKey(model, engineId);
    await this.#call(() => this.#redis.multi().del(key).zrem(ENGINES, key).exec());
  }

  /** A group of ranks reads its weights, and will serve. */
  async beatLoading(model: string, engineId: string): Promise<void> {
    const args = [engineId, HEARTBEAT_TTL_MS];
    await this.#call(() => loadingScript.run(this.#redis, [loadingKey(model)], args));
  }

  async endLoading(model: string, engineId: string): Promise<void> {
    await this.#call(() => this.#redis.zrem(loadingKey(model), engineId));
  }

  /** Ids of engines that read their weights and do not serve yet. */
  async loadingEngines(model: string): Promise<string[]> {
    const ids = await this.#call(() => loadingScript.run(this.#redis, [loadingKey(model)], ['']));
    return ids as string[];
  }

  /** Engines that are alive. */
  async engines(): Promise<EngineBeat[]> {
    const unlisted = this.#unlisted ?? (await this.#scanEngines());
    const [keys, texts] = (await this.#call(() =>
      livingScript.run(this.#redis, [ENGINES], unlisted),
    )) as [string[], (string | null)[]];
    this.#unlisted = unlisted.filter((key) => (texts[keys.indexOf(key)] ?? null) !== null);
    return texts.flatMap((text) => (text === null ? [] : [JSON.parse(text) as EngineBeat]));
  }

  /** Goes through all keys of Redis, for engines of a release that keeps no set of them. */
  async #scanEngines(): Promise<string[]> {
    const found: string[] = [];
    for (let cursor = '0'; ;) {
      const [next, keys] = await this.#call(() =>
        this.#redis.scan(cursor, 'MATCH', 'caravan:engine:*', 'COUNT', 1000),
      );
      found.push(...keys);
      if (next === '0') return found;
      cursor = next;
    }
  }

  /** Round trip in milliseconds. */
  async ping(): Promise<number> {
    const startMs = performance.now();
    await this.#call(() => this.#redis.ping());
    return performance.now() - startMs;
  }

  /** What `doctor` wants to know. */
  async health(): Promise<RedisHealth> {
    const info = await this.#call(() => this.#redis.info());
    const beforeMs = Date.now();
    const [seconds, microseconds] = await this.#call(() => this.#redis.time());
    const halfwayMs = (beforeMs + Date.now()) / 2;
    const line = (name: string): string => new RegExp(`^${name}:(.*)$`, 'm').exec(info)?.[1] ?? '';
    return {
      version: line('redis_version').trim(),
      maxmemoryPolicy: line('maxmemory_policy').trim(),
      isAppendOnly: line('aof_enabled').trim() === '1',
      isAofWritten: line('aof_last_write_status').trim() === 'ok',
      isLoading: line('loading').trim() === '1',
      clockSkewMs: Number(seconds) * 1000 + Number(microseconds) / 1000 - halfwayMs,
    };
  }

  close(): void {
    this.#connection.close();
  }

  #call<T>(call: () => Promise<T>): Promise<T> {
    return this.#connection.call(call);
  }
}

/** KEYS of the engine, set of engines; ARGV beat, how long it holds in milliseconds. */
const beatScript = new Script(`
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
local time = redis.call('TIME')
local nowMs = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', nowMs)
redis.call('ZADD', KEYS[2], nowMs + ARGV[2], KEYS[1])`);

/** KEYS set of engines; ARGV keys of engines that may not be in it. @returns {keys, their beats or nothing}. */
const livingScript = new Script(`
local keys = redis.call('ZRANGE', KEYS[1], 0, -1)
for _, key in ipairs(ARGV) do
  if not redis.call('ZSCORE', KEYS[1], key) then table.insert(keys, key) end
end
if #keys == 0 then return {{}, {}} end
return {keys, redis.call('MGET', unpack(keys))}`);

/** Forgets what is over, adds an engine unless its id is empty, and says who is left. */
const loadingScript = new Script(`
local time = redis.call('TIME')
local nowMs = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', nowMs)
if ARGV[1] ~= '' then redis.call('ZADD', KEYS[1], nowMs + ARGV[2], ARGV[1]) end
return redis.call('ZRANGE', KEYS[1], 0, -1)
`);

const loadingKey = (model: string): string => `caravan:loading:{${model}}`;
const speedsKey = (model: string): string => `caravan:speeds:{${model}}`;
const engineKey = (model: string, engineId: string): string =>
  `caravan:engine:{${model}}:${engineId}`;
