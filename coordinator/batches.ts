/** The batches that this gateway runs: takes those that nobody holds, and keeps its hold while it runs them. */
import { randomUUID } from 'node:crypto';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { isEnded, PARTS_PREFIX, type BatchOrder, type BatchState } from './batch.js';
import { BatchRun, type BatchRunNeeds } from './batch-run.js';
import { Bell } from './bell.js';
import { fileKey, type FileRecord } from './store-files.js';
import type { Hold } from './store-batches.js';

/** A dead gateway's batches move after this. */
const LEASE_MS = 5_000;
const RENEW_EVERY_MS = 1_000;
const LOOK_EVERY_MS = 1_000;
const EXPIRE_EVERY_MS = 60_000;
/** Listing a storage costs. */
const SWEEP_EVERY_MS = 3600 * 1000;
/** Parts without an open batch, this old, are those of a gateway that died while it cleaned up. */
const ORPHAN_AFTER_MS = 3600 * 1000;

export interface BatchLimits {
  /** Most requests of one batch. */
  readonly lines: number;
  /** Most batches that have not ended. */
  readonly open: number;
  /** Most lines of all batches that this gateway has in the queue at once. */
  readonly linesInFlight: number;
}

export interface BatchesLog {
  info(fields: object, message: string): void;
  warn(fields: object, message: string): void;
}

type Needs = Omit<BatchRunNeeds, 'mostLines' | 'share' | 'log'>;

export class Batches {
  readonly #needs: Needs;
  readonly #limits: BatchLimits;
  readonly #log: BatchesLog;
  readonly #holder = randomUUID();
  readonly #running = new Map<string, Promise<void>>();
  readonly #created = new Bell();
  #expiredMs = -Infinity;
  #sweptMs = -Infinity;

  constructor(needs: Needs, limits: BatchLimits, log: BatchesLog) {
    this.#needs = needs;
    this.#limits = limits;
    this.#log = log;
  }

  /**
   * Writes a batch down; some gateway will run it.
   *
   * @param isOwn whether a file is of who asks.
   * @throws CaravanError `invalid_request` without its input file, `queue_full`, `redis_unavailable`.
   */
  async create(
    order: BatchOrder,
    isOwn: (record: FileRecord) => boolean = () => true,
  ): Promise<BatchState> {
    const { files, records } = this.#needs;
    const param = 'input_file_id';
    const refuse = (reason: string): CaravanError =>
      new CaravanError('invalid_request', `${param}: ${reason}`, { param });
    try {
      const input = await files.records.get(order.inputFileId);
      const { purpose } = input;
      if (!isOwn(input)) throw refuse(`file ${order.inputFileId} does not exist`);
      if (purpose !== 'batch') throw refuse(`the file's purpose is ${purpose}, and must be batch`);
    } catch (error) {
      if (!(error instanceof CaravanError) || error.code !== 'not_found') throw error;
      throw refuse(`file ${order.inputFileId} does not exist`);
    }
    await records.create(order, this.#limits.open);
    this.#created.ring();
    return records.get(order.id);
  }

  /** Whether a batch that has not ended reads this file. */
  async isInput(fileId: string): Promise<boolean> {
    const { records } = this.#needs;
    for (const id of await records.open()) {
      const state = await records.get(id).catch(() => null);
      if (state !== null && !isEnded(state.status) && state.order.inputFileId === fileId) {
        return true;
      }
    }
    return false;
  }

  /** Runs batches until the signal aborts; what they came to by then is in Redis, for any gateway. */
  async run(stopping: AbortSignal): Promise<void> {
    const wake = (): void => {
      this.#created.ring();
    };
    stopping.addEventListener('abort', wake);
    try {
      while (!stopping.aborted) {
        await this.#look(stopping).catch(this.#complain);
        await this.#sweep().catch(this.#complain);
        await this.#created.wait(LOOK_EVERY_MS);
      }
      await Promise.all(this.#running.values());
    } finally {
      stopping.removeEventListener('abort', wake);
    }
  }

  async #look(stopping: AbortSignal): Promise<void> {
    for (const id of await this.#needs.records.open()) {
      if (stopping.aborted) return;
      if (this.#running.has(id) || !(await this.#isOurs(id))) continue;
      const hold = await this.#needs.records.take(id, this.#holder, LEASE_MS);
      if (hold === null) continue;
      this.#log.info({ batch: id, fence: hold.fence }, 'batch taken');
      const running = this.#hold(hold, stopping)
        .catch(this.#complain)
        .finally(() => {
          this.#running.delete(id);
        });
      this.#running.set(id, running);
    }
  }

  /** A gateway with another storage leaves a batch to those that have its input. */
  async #isOurs(id: string): Promise<boolean> {
    const { records, files } = this.#needs;
    const state = await records.get(id).catch(() => null);
    // Gone: the take finds that out, and the list forgets it.
    if (state === null) return true;
    const { inputFileId, expiresMs } = state.order;
    const hasInput = (await files.storage.size(fileKey(inputFileId))) !== null;
    // A batch whose input nobody has must end as well.
    return hasInput || Date.now() > expiresMs;
  }

  /** Runs a batch, and keeps the hold on it. */
  async #hold(hold: Hold, stopping: AbortSignal): Promise<void> {
    const { records } = this.#needs;
    const lost = new AbortController();
    const share = (): number =>
      Math.max(1, Math.floor(this.#limits.linesInFlight / this.#running.size));
    const needs = { ...this.#needs, mostLines: this.#limits.lines, share, log: this.#log };
    const run = new BatchRun(needs, hold, AbortSignal.any([stopping, lost.signal]));
    const renew = async (): Promise<void> => {
      const status = await records.renew(hold, LEASE_MS);
      if (status === null) lost.abort(new CaravanError('stale_take', 'another gateway has it'));
      else if (status === 'cancelling') run.cancel();
    };
    const timer = setInterval(() => void renew().catch(() => undefined), RENEW_EVERY_MS);
    try {
      await run.run();
      this.#log.info({ batch: hold.id }, 'batch left');
    } catch (error) {
      if (!stopping.aborted && !lost.signal.aborted) throw error;
      if (!lost.signal.aborted) await records.renew(hold, 0).catch(() => undefined);
      this.#log.info({ batch: hold.id }, 'batch given up');
    } finally {
      clearInterval(timer);
    }
  }

  /** Removes files that have expired, and what dead gateways left in the storage. */
  async #sweep(): Promise<void> {
    const { files, records } = this.#needs;
    const nowMs = performance.now();
    if (nowMs - this.#expiredMs > EXPIRE_EVERY_MS) {
      this.#expiredMs = nowMs;
      await files.removeExpired((id) => this.isInput(id));
    }
    if (nowMs - this.#sweptMs < SWEEP_EVERY_MS) return;
    this.#sweptMs = nowMs;
    await files.removeOrphans();
    const open = new Set(await records.open());
    for await (const { key, modifiedMs } of files.storage.list(PARTS_PREFIX)) {
      const id = key.split('/')[1]!;
      const isOld = Date.now() - modifiedMs > ORPHAN_AFTER_MS;
      if (isOld && !open.has(id)) await files.storage.remove(key);
    }
  }

  readonly #complain = (thrown: unknown): void => {
    const { code, message } = toCaravanError(thrown);
    this.#log.warn({ code }, `batches: ${message}`);
  };
}
