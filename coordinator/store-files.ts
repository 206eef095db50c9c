/**
 * What is known of files beside their bytes (which are in a FileStorage).
 *
 *   caravan:{files}:record:ID    the record, as JSON
 *   caravan:{files}:created      sorted set: id by the time of creation, in milliseconds
 *   caravan:{files}:expiring     sorted set: id by the time of expiry, in seconds
 *   caravan:{files}:bytes        bytes of all files together
 */
import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { CaravanError } from '../proto/errors.js';
import type { StoreConnection } from './store-connection.js';
import { Script } from './store-script.js';

export type FilePurpose = 'batch' | 'batch_output';

export interface FileRecord {
  readonly id: string;
  readonly bytes: number;
  readonly createdMs: number;
  /** Unix time in seconds after which the file is removed; null keeps it. */
  readonly expiresS: number | null;
  readonly filename: string;
  readonly purpose: FilePurpose;
  /** Whose it is; left out where tenants were not kept apart. */
  readonly tenant?: string;
}

/** A page of a list, and whether more follows. */
export interface Page<T> {
  readonly items: readonly T[];
  readonly hasMore: boolean;
}

/** A new name for a file: 128 random bits. */
export const newFileId = (): string => `file-${randomBytes(16).toString('hex')}`;

/** The key of a file's bytes in the storage. */
export const fileKey = (id: string): string => `files/${id}`;

const CREATED = 'caravan:{files}:created';
const EXPIRING = 'caravan:{files}:expiring';
const BYTES = 'caravan:{files}:bytes';
const recordKey = (id: string): string => `caravan:{files}:record:${id}`;

const LIST_STEP = 500;

/** KEYS record, created, expiring, bytes; ARGV id, record, createdMs, expiresS or '', bytes, most bytes. */
const addScript = new Script(`
if redis.call('EXISTS', KEYS[1]) == 1 then return 'known' end
local sum = tonumber(redis.call('GET', KEYS[4]) or '0') + tonumber(ARGV[5])
if sum > tonumber(ARGV[6]) then return 'full' end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[1])
if ARGV[4] ~= '' then redis.call('ZADD', KEYS[3], ARGV[4], ARGV[1]) end
redis.call('INCRBY', KEYS[4], ARGV[5])
return 'added'`);

/** KEYS record, created, expiring, bytes; ARGV id. @returns 1 when it was there. */
const removeScript = new Script(`
local record = redis.call('GET', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('ZREM', KEYS[3], ARGV[1])
if not record then return 0 end
redis.call('DECRBY', KEYS[4], cjson.decode(record).bytes)
redis.call('DEL', KEYS[1])
return 1`);

export class FileRecords {
  readonly #connection: StoreConnection;
  readonly #redis: Redis;

  constructor(connection: StoreConnection) {
    this.#connection = connection;
    this.#redis = connection.redis;
  }

  /**
   * Writes a file down, whose bytes are in the storage already; one that is known stays as it is.
   *
   * @param mostBytes of all files together.
   * @throws CaravanError `quota_exceeded`, `redis_unavailable`.
   */
  async add(record: FileRecord, mostBytes = Number.MAX_SAFE_INTEGER): Promise<void> {
    const outcome = await this.#call(() =>
      addScript.run(
        this.#redis,
        [recordKey(record.id), CREATED, EXPIRING, BYTES],
        [
          ...[record.id, JSON.stringify(record), record.createdMs, record.expiresS ?? ''],
          ...[record.bytes, mostBytes],
        ],
      ),
    );
    if (outcome === 'full') {
      throw new CaravanError(
        'quota_exceeded',
        `file: with its ${record.bytes} bytes all files would pass the limit of ${mostBytes}; delete some`,
        { param: 'file' },
      );
    }
  }

  /** @throws CaravanError `not_found`. */
  async get(id: string): Promise<FileRecord> {
    const text = await this.#call(() => this.#redis.get(recordKey(id)));
    if (text === null) throw new CaravanError('not_found', `file ${id} does not exist`);
    return JSON.parse(text) as FileRecord;
  }

  /** @returns false when it was not there. */
  async remove(id: string): Promise<boolean> {
    const keys = [recordKey(id), CREATED, EXPIRING, BYTES];
    return (await this.#call(() => removeScript.run(this.#redis, keys, [id]))) === 1;
  }

  /**
   * Files by the time of their creation.
   *
   * @param after id of the last file of the page before, or null.
   * @param isShown which files there are for who asks.
   * @throws CaravanError `not_found` for an unknown `after`.
   */
  async list(
    {
      purpose,
      order,
      after,
      limit,
    }: {
      readonly purpose: string | null;
      readonly order: 'asc' | 'desc';
      readonly after: string | null;
      readonly limit: number;
    },
    isShown: (record: FileRecord) => boolean = () => true,
  ): Promise<Page<FileRecord>> {
    const items: FileRecord[] = [];
    for (let at = await this.#rankAfter(after, order); ;) {
      const last = at + LIST_STEP - 1;
      const ids = await this.#call(() =>
        order === 'asc'
          ? this.#redis.zrange(CREATED, at, String(last))
          : this.#redis.zrevrange(CREATED, at, last),
      );
      if (ids.length === 0) return { items, hasMore: false };
      const texts = await this.#call(() => this.#redis.mget(ids.map(recordKey)));
      for (const text of texts) {
        if (text === null) continue;
        const record = JSON.parse(text) as FileRecord;
        if ((purpose !== null && record.purpose !== purpose) || !isShown(record)) continue;
        if (items.length === limit) return { items, hasMore: true };
        items.push(record);
      }
      at += ids.length;
    }
  }

  /** Ids of files whose time has come. */
  async expired(nowS: number): Promise<string[]> {
    return this.#call(() => this.#redis.zrangebyscore(EXPIRING, 0, nowS));
  }

  /** Which of these ids are known. */
  async known(ids: readonly string[]): Promise<ReadonlySet<string>> {
    if (ids.length === 0) return new Set();
    const texts = await this.#call(() => this.#redis.mget(ids.map(recordKey)));
    return new Set(ids.filter((_, i) => texts[i] != null));
  }

  async #rankAfter(after: string | null, order: 'asc' | 'desc'): Promise<number> {
    if (after === null) return 0;
    const rank = await this.#call(() =>
      order === 'asc' ? this.#redis.zrank(CREATED, after) : this.#redis.zrevrank(CREATED, after),
    );
    if (rank === null) {
      throw new CaravanError('not_found', `after: file ${after} does not exist`, {
        param: 'after',
      });
    }
    return rank + 1;
  }

  #call<T>(call: () => Promise<T>): Promise<T> {
    return this.#connection.call(call);
  }
}
