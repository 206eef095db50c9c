/** The state of batches in Redis: the truth that any gateway can go on from. See store-batch-scripts. */
import { randomBytes } from 'node:crypto';
import type { Redis } from 'ioredis';
import { CaravanError } from '../proto/errors.js';
import type {
  BatchFault,
  BatchMoment,
  BatchOrder,
  BatchState,
  BatchStatus,
  BatchTally,
  LinePlace,
  ResultPart,
  StartedLine,
} from './batch.js';
import { isEnded } from './batch.js';
import {
  cancelScript,
  createScript,
  moveScript,
  recordScript,
  renewScript,
  startScript,
  takeScript,
} from './store-batch-scripts.js';
import type { StoreConnection } from './store-connection.js';
import type { Script } from './store-script.js';
import type { Page } from './store-files.js';

/** How long a batch that has ended can be looked at. */
const RETENTION_S = 30 * 24 * 3600;
const LIST_STEP = 100;

/** A new name for a batch: 128 random bits. */
export const newBatchId = (): string => `batch_${randomBytes(16).toString('hex')}`;

const CREATED = 'caravan:{batches}:created';
const OPEN = 'caravan:{batches}:open';
const batchKey = (id: string): string => `caravan:{batches}:batch:${id}`;
const startedKey = (id: string): string => `caravan:{batches}:started:${id}`;
const partsKey = (id: string): string => `caravan:{batches}:parts:${id}`;

/** A gateway's hold on a batch. */
export interface Hold {
  readonly id: string;
  readonly fence: string;
}

/**
 * What a holder's write came to: another gateway holds the batch, Redis has another state than the holder
 * believes, the batch has another status (somebody cancelled it), or it is written.
 */
export type BatchWritten = 'stale' | 'diverged' | 'closing' | 'written';

/** What a change of status brings with it. */
export interface BatchNews {
  readonly moment: BatchMoment;
  readonly total?: number;
  readonly model?: string | null;
  readonly faults?: readonly BatchFault[];
  readonly outcome?: 'completed' | 'expired';
  readonly outputFileId?: string | null;
  readonly errorFileId?: string | null;
}

export class BatchRecords {
  readonly #connection: StoreConnection;
  readonly #redis: Redis;

  constructor(connection: StoreConnection) {
    this.#connection = connection;
    this.#redis = connection.redis;
  }

  /** @throws CaravanError `queue_full` when as many as `mostOpen` have not ended. */
  async create(order: BatchOrder, mostOpen: number): Promise<void> {
    const keys = [batchKey(order.id), CREATED, OPEN];
    const args = [order.id, order.createdMs, mostOpen, JSON.stringify(order)];
    const outcome = await this.#call(() => createScript.run(this.#redis, keys, args));
    if (outcome === 'full') {
      throw new CaravanError(
        'queue_full',
        `${mostOpen} batches have not ended, the most there may be; try again when one has`,
      );
    }
  }

  /** @throws CaravanError `not_found`. */
  async get(id: string): Promise<BatchState> {
    const fields = await this.#call(() => this.#redis.hgetall(batchKey(id)));
    if (fields['order'] === undefined) {
      throw new CaravanError('not_found', `batch ${id} does not exist`);
    }
    return stateOf(fields);
  }

  /**
   * Batches, the latest first.
   *
   * @param isShown which batches there are for who asks.
   * @throws CaravanError `not_found` for an unknown `after`.
   */
  async list(
    after: string | null,
    limit: number,
    isShown: (order: BatchOrder) => boolean = () => true,
  ): Promise<Page<BatchState>> {
    const items: BatchState[] = [];
    for (let at = await this.#rankAfter(after); ;) {
      const ids = await this.#call(() => this.#redis.zrevrange(CREATED, at, at + LIST_STEP - 1));
      if (ids.length === 0) return { items, hasMore: false };
      for (const id of ids) {
        const fields = await this.#call(() => this.#redis.hgetall(batchKey(id)));
        at += 1;
        if (fields['order'] === undefined) {
          // Its time ran out: the list is where that is noticed.
          await this.#call(() => this.#redis.zrem(CREATED, id));
          at -= 1;
          continue;
        }
        const state = stateOf(fields);
        if (!isShown(state.order)) continue;
        if (items.length === limit) return { items, hasMore: true };
        items.push(state);
      }
    }
  }

  /** Asks for the end of a batch. @returns its status then. @throws CaravanError `not_found`. */
  async cancel(id: string): Promise<BatchStatus> {
    const nowS = Math.floor(Date.now() / 1000);
    const outcome = (await this.#call(() =>
      cancelScript.run(this.#redis, [batchKey(id)], [nowS]),
    )) as BatchStatus | 'missing';
    if (outcome === 'missing') throw new CaravanError('not_found', `batch ${id} does not exist`);
    return outcome;
  }

  /** Ids of batches that have not ended. */
  async open(): Promise<string[]> {
    return this.#call(() => this.#redis.smembers(OPEN));
  }

  /** Holds a batch that nobody holds. @returns null when somebody does, or it is gone. */
  async take(id: string, holder: string, leaseMs: number): Promise<Hold | null> {
    const [kind, fence] = (await this.#call(() =>
      takeScript.run(this.#redis, [batchKey(id)], [holder, leaseMs]),
    )) as ['missing' | 'held' | 'taken', string];
    if (kind === 'taken') return { id, fence };
    if (kind === 'missing') await this.#call(() => this.#redis.srem(OPEN, id));
    return null;
  }

  /** @param leaseMs 0 gives the batch up. @returns its status, or null when another gateway has it. */
  async renew({ id, fence }: Hold, leaseMs: number): Promise<BatchStatus | null> {
    const [kind, status] = (await this.#call(() =>
      renewScript.run(this.#redis, [batchKey(id)], [fence, leaseMs]),
    )) as ['stale' | 'held', BatchStatus];
    return kind === 'held' ? status : null;
  }

  /** Lines that have a job and no recorded result. */
  async started(id: string): Promise<StartedLine[]> {
    const lines = await this.#call(() => this.#redis.hvals(startedKey(id)));
    return lines.map((line) => JSON.parse(line) as StartedLine);
  }

  /** Stored parts of the results, in the order of their recording. */
  async parts(id: string): Promise<ResultPart[]> {
    const parts = await this.#call(() => this.#redis.lrange(partsKey(id), 0, -1));
    return parts.map((part) => JSON.parse(part) as ResultPart);
  }

  /** Writes down that lines get jobs, before they do. @param next the line after them. */
  async start(
    { id, fence }: Hold,
    version: number,
    next: LinePlace,
    lines: readonly StartedLine[],
  ): Promise<BatchWritten> {
    const pairs = lines.flatMap((line) => [line.line, JSON.stringify(line)]);
    const args = [fence, version, next.offset, next.line, ...pairs];
    return this.#write(startScript, [batchKey(id), startedKey(id)], args);
  }

  /**
   * Writes down results that are stored. From then on their jobs are not needed any more.
   *
   * @param next the line after them where they never had jobs; null where they had.
   */
  async record(
    { id, fence }: Hold,
    version: number,
    part: ResultPart,
    tally: BatchTally,
    next: LinePlace | null,
    lines: readonly number[],
  ): Promise<BatchWritten> {
    const { completed, failed, inputTokens, outputTokens } = tally;
    const counts = [completed, failed, inputTokens, outputTokens];
    const cursor = next === null ? ['', ''] : [next.offset, next.line];
    const args = [fence, version, JSON.stringify(part), ...counts, ...cursor, ...lines];
    return this.#write(recordScript, [batchKey(id), startedKey(id), partsKey(id)], args);
  }

  /** Changes the status. */
  async move(
    { id, fence }: Hold,
    version: number,
    from: BatchStatus,
    to: BatchStatus,
    { moment, total, model, faults, outcome, outputFileId, errorFileId }: BatchNews,
  ): Promise<BatchWritten> {
    const fields: (string | number)[] = [`at:${moment}`, Math.floor(Date.now() / 1000)];
    if (total !== undefined) fields.push('total', total);
    if (model != null) fields.push('model', model);
    if (faults !== undefined) fields.push('faults', JSON.stringify(faults));
    if (outcome !== undefined) fields.push('outcome', outcome);
    if (outputFileId != null) fields.push('outputFileId', outputFileId);
    if (errorFileId != null) fields.push('errorFileId', errorFileId);
    const retention = isEnded(to) ? RETENTION_S : '';
    const args = [fence, version, id, from, to, retention, ...fields];
    const keys = [batchKey(id), OPEN, startedKey(id), partsKey(id)];
    return this.#write(moveScript, keys, args);
  }

  /** Forgets what only the run of a batch needed. */
  async forgetRun(id: string): Promise<void> {
    await this.#call(() => this.#redis.del(startedKey(id), partsKey(id)));
  }

  async #write(
    script: Script,
    keys: readonly string[],
    args: readonly (string | number)[],
  ): Promise<BatchWritten> {
    const [outcome] = (await this.#call(() => script.run(this.#redis, keys, args))) as [
      BatchWritten,
    ];
    return outcome;
  }

  async #rankAfter(after: string | null): Promise<number> {
    if (after === null) return 0;
    const rank = await this.#call(() => this.#redis.zrevrank(CREATED, after));
    if (rank === null) {
      throw new CaravanError('not_found', `after: batch ${after} does not exist`, {
        param: 'after',
      });
    }
    return rank + 1;
  }

  #call<T>(call: () => Promise<T>): Promise<T> {
    return this.#connection.call(call);
  }
}

const moments: readonly BatchMoment[] = [
  'inProgress',
  'finalizing',
  'completed',
  'failed',
  'expired',
  'cancelling',
  'cancelled',
];

function stateOf(fields: Readonly<Record<string, string>>): BatchState {
  const count = (name: string): number => Number(fields[name] ?? 0);
  return {
    order: JSON.parse(fields['order']!) as BatchOrder,
    status: fields['status'] as BatchStatus,
    moments: Object.fromEntries(
      moments.flatMap((moment) => {
        const at = fields[`at:${moment}`];
        return at === undefined ? [] : [[moment, Number(at)]];
      }),
    ),
    total: count('total'),
    completed: count('completed'),
    failed: count('failed'),
    inputTokens: count('inputTokens'),
    outputTokens: count('outputTokens'),
    model: fields['model'] ?? null,
    faults: fields['faults'] === undefined ? [] : (JSON.parse(fields['faults']) as BatchFault[]),
    outcome: fields['outcome'] === 'expired' ? 'expired' : 'completed',
    outputFileId: fields['outputFileId'] ?? null,
    errorFileId: fields['errorFileId'] ?? null,
    cursor: { offset: count('offset'), line: Number(fields['line'] ?? 1) },
    version: count('version'),
  };
}
