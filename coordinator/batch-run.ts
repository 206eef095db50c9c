/**
 * Runs one batch for as long as this gateway holds it, from whatever state Redis has it in.
 *
 * One loop does all writing: it starts lines when there is room, writes results down when they are due, and
 * moves the batch on. Lines wait for their jobs beside it. Whatever is lost with this process is found again:
 * a started line in Redis, its answer in its job's journal.
 */
import { createHash } from 'node:crypto';
import { setMaxListeners } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import {
  isEnded,
  partsPrefix,
  type BatchFault,
  type BatchState,
  type BatchStatus,
  type LinePlace,
  type StartedLine,
} from './batch.js';
import { LineRun, unstartedResult, type Closing, type LineRunNeeds } from './batch-line-run.js';
import { LineReader, type RawLine } from './batch-lines.js';
import { joined, ResultBuffer } from './batch-results.js';
import { validateInput } from './batch-validation.js';
import { Bell } from './bell.js';
import { removeBelow } from './file-storage.js';
import type { Files } from './files.js';
import { newJobId } from './journal.js';
import type { BatchNews, BatchRecords, BatchWritten, Hold } from './store-batches.js';
import { fileKey } from './store-files.js';

const FIRST_PAUSE_MS = 500;
const MAX_PAUSE_MS = 15_000;
/** How often the loop looks at the clock when nothing happens. */
const LOOK_EVERY_MS = 500;
/** Lines that are started in one write. */
const START_STEP = 64;
/** Parts are kept until Redis, killed at any moment, will not bring the batch back to before its end. */
const FORGET_AFTER_MS = 5_000;

export interface BatchRunNeeds extends LineRunNeeds {
  readonly records: BatchRecords;
  readonly files: Files;
  readonly mostLines: number;
  /** Lines that this batch may have in flight now. */
  readonly share: () => number;
  readonly log: { warn(fields: object, message: string): void };
}

/** The hold is gone, or Redis knows something else than we do: everything is read anew. */
class Upset extends Error {
  readonly outcome: BatchWritten;

  constructor(outcome: BatchWritten) {
    super(outcome);
    this.outcome = outcome;
  }
}

export class BatchRun {
  readonly #needs: BatchRunNeeds;
  readonly #hold: Hold;
  readonly #stopping: AbortSignal;
  readonly #bell = new Bell();
  #closing: Closing | null = null;

  constructor(needs: BatchRunNeeds, hold: Hold, stopping: AbortSignal) {
    this.#needs = needs;
    this.#hold = hold;
    this.#stopping = stopping;
  }

  /** Somebody asked for the end. */
  cancel(): void {
    this.#closing ??= 'cancelled';
    this.#bell.ring();
  }

  /** Returns when the batch has ended or is another gateway's. @throws the signal's reason. */
  async run(): Promise<void> {
    for (let pauseMs = FIRST_PAUSE_MS; ;) {
      this.#stopping.throwIfAborted();
      try {
        const state = await this.#needs.records.get(this.#hold.id);
        if (isEnded(state.status)) {
          await this.#forgetRun();
          return;
        }
        await this.#step(state);
        pauseMs = FIRST_PAUSE_MS;
      } catch (thrown) {
        this.#stopping.throwIfAborted();
        if (thrown instanceof Upset) {
          if (thrown.outcome === 'stale') return;
          continue;
        }
        const error = toCaravanError(thrown);
        const isGone = error.code === 'not_found';
        if (isGone && (await this.#fail(error).catch(() => false))) continue;
        this.#needs.log.warn({ batch: this.#hold.id, code: error.code }, error.message);
        await delay(pauseMs, undefined, { signal: this.#stopping });
        pauseMs = Math.min(2 * pauseMs, MAX_PAUSE_MS);
      }
    }
  }

  /** From one status to the next. */
  async #step(state: BatchState): Promise<void> {
    switch (state.status) {
      case 'validating':
        return this.#validate(state);
      case 'in_progress': {
        const closing = await this.#answerLines(state);
        if (closing === 'cancelled') return;
        const news = { moment: 'finalizing', outcome: closing ?? 'completed' } as const;
        return this.#move(await this.#versionNow(), 'in_progress', 'finalizing', news);
      }
      case 'cancelling':
        this.#closing = 'cancelled';
        if (state.total > 0) await this.#answerLines(state);
        return this.#finish(await this.#versionNow(), 'cancelling', 'cancelled');
      case 'finalizing':
        return this.#finish(state.version, 'finalizing', state.outcome);
      default:
        throw new CaravanError('internal', `batch ${state.order.id} has ended`);
    }
  }

  async #validate({ order, version }: BatchState): Promise<void> {
    const { files, models, mostLines } = this.#needs;
    const names = new Set((await models.cards()).map(({ name }) => name));
    const rules = { mostLines, models: names };
    const { total, model, faults } = await validateInput(
      files.storage,
      order,
      rules,
      this.#stopping,
    );
    if (faults.length > 0) {
      await this.#move(version, 'validating', 'failed', { moment: 'failed', faults });
      return;
    }
    const news: BatchNews = { moment: 'inProgress', total, model };
    await this.#move(version, 'validating', 'in_progress', news);
  }

  /** The input file is not there any more. @returns false when that was not it. */
  async #fail(error: CaravanError): Promise<boolean> {
    const { order, version, status } = await this.#needs.records.get(this.#hold.id);
    if ((await this.#needs.files.storage.size(fileKey(order.inputFileId))) !== null) return false;
    const { message } = error;
    const fault: BatchFault = { code: 'input_file_lost', message, param: null, line: null };
    await this.#finish(version, status, 'failed', [fault]);
    return true;
  }

  /**
   * Answers every line that has no recorded result.
   *
   * @returns why not all of them were answered, or null.
   */
  async #answerLines(state: BatchState): Promise<Closing | null> {
    const lines = new AbortController();
    try {
      const signal = AbortSignal.any([this.#stopping, lines.signal]);
      // Every line listens to it.
      setMaxListeners(0, signal);
      const flight = new Flight(this.#needs, this.#hold, state, this.#bell, signal);
      for (let isResumed = false; ;) {
        this.#stopping.throwIfAborted();
        if (Date.now() >= state.order.expiresMs) this.#closing ??= 'expired';
        if (!isResumed) await flight.resume(this.#closing);
        isResumed = true;
        await flight.writeDue();
        if (flight.isOver) {
          await flight.write();
          return null;
        }
        if (this.#closing !== null) {
          await flight.close(this.#closing);
          return this.#closing;
        }
        if (await flight.start(this.#needs.share())) continue;
        await this.#bell.wait(Math.min(flight.dueInMs, LOOK_EVERY_MS));
      }
    } catch (error) {
      // Cancelled meanwhile: the new status is read, and the lines are closed.
      if (error instanceof Upset && error.outcome === 'closing') this.#closing ??= 'cancelled';
      throw error;
    } finally {
      lines.abort(new CaravanError('cancelled', 'the batch is read anew'));
    }
  }

  /** Joins the parts into the files of results, and ends the batch. */
  async #finish(
    version: number,
    from: BatchStatus,
    to: 'completed' | 'expired' | 'cancelled' | 'failed',
    faults: readonly BatchFault[] = [],
  ): Promise<void> {
    const { records, files } = this.#needs;
    const { order } = await records.get(this.#hold.id);
    const parts = await records.parts(order.id);
    const join = async (kind: 'output' | 'error'): Promise<string | null> => {
      const keys = parts.flatMap((part) => part[kind] ?? []);
      if (keys.length === 0) return null;
      // The same each time, so that a second holder writes the same file.
      const digest = createHash('sha256').update(`${order.id} ${kind}`).digest('hex');
      const id = `file-${digest.slice(0, 32)}`;
      const filename = `${order.id}_${kind}.jsonl`;
      const { tenant, resultsKeptS: keptS } = order;
      const owned = tenant === undefined ? {} : { tenant };
      const about = { filename, purpose: 'batch_output', keptS, ...owned } as const;
      await files.put(id, joined(files.storage, keys), about, this.#stopping);
      return id;
    };
    const outputFileId = await join('output');
    const errorFileId = await join('error');
    await this.#move(version, from, to, { moment: to, faults, outputFileId, errorFileId });
  }

  async #move(version: number, from: BatchStatus, to: BatchStatus, news: BatchNews): Promise<void> {
    const outcome = await this.#needs.records.move(this.#hold, version, from, to, news);
    if (outcome !== 'written') throw new Upset(outcome);
  }

  async #versionNow(): Promise<number> {
    return (await this.#needs.records.get(this.#hold.id)).version;
  }

  async #forgetRun(): Promise<void> {
    await delay(FORGET_AFTER_MS, undefined, { signal: this.#stopping });
    const { records, files } = this.#needs;
    await removeBelow(files.storage, partsPrefix(this.#hold.id));
    await records.forgetRun(this.#hold.id);
  }
}

/** The lines of a batch that are being answered, and the results that are not recorded. */
class Flight {
  readonly #needs: BatchRunNeeds;
  readonly #hold: Hold;
  readonly #state: BatchState;
  readonly #bell: Bell;
  readonly #signal: AbortSignal;
  readonly #reader: LineReader;
  readonly #results: ResultBuffer;
  readonly #runs = new Map<number, LineRun>();
  #version: number;
  #isAtEnd = false;
  #fault: unknown = null;

  constructor(
    needs: BatchRunNeeds,
    hold: Hold,
    state: BatchState,
    bell: Bell,
    signal: AbortSignal,
  ) {
    const { storage } = needs.files;
    this.#needs = needs;
    this.#hold = hold;
    this.#state = state;
    this.#bell = bell;
    this.#signal = signal;
    this.#version = state.version;
    this.#reader = new LineReader(storage, fileKey(state.order.inputFileId), state.cursor);
    this.#results = new ResultBuffer(storage, state.order.id, state.order.createdMs);
  }

  /** All lines of the file have results. */
  get isOver(): boolean {
    return this.#isAtEnd && this.#runs.size === 0;
  }

  get dueInMs(): number {
    return this.#results.dueInMs;
  }

  /** Goes on with lines that an earlier holder, or we, had started. */
  async resume(closing: Closing | null): Promise<void> {
    const { storage } = this.#needs.files;
    for (const started of await this.#needs.records.started(this.#state.order.id)) {
      const { offset, line, bytes } = started;
      const key = fileKey(this.#state.order.inputFileId);
      const text = await storage.read(key, offset, offset + bytes);
      this.#run(started, { offset, line, bytes: text, next: this.#reader.place }, closing);
    }
  }

  /** Starts lines up to `share` in flight. @returns false when nothing changed. */
  async start(share: number): Promise<boolean> {
    this.#throwFault();
    // Results that the storage does not take must not pile up.
    if (this.#results.isFull || this.#isAtEnd) return false;
    const started: [StartedLine, RawLine][] = [];
    const most = Math.min(share - this.#runs.size, START_STEP);
    while (started.length < most) {
      const raw = await this.#reader.next();
      if (raw === null) {
        this.#isAtEnd = true;
        break;
      }
      const { offset, line } = raw;
      started.push([{ offset, line, bytes: raw.bytes?.length ?? 0, jobId: newJobId() }, raw]);
    }
    if (started.length === 0) return this.#isAtEnd;
    const lines = started.map(([line]) => line);
    const next = this.#reader.place;
    this.#wrote(await this.#needs.records.start(this.#hold, this.#version, next, lines));
    for (const [line, raw] of started) this.#run(line, raw, 'new');
    return true;
  }

  async writeDue(): Promise<void> {
    this.#throwFault();
    if (this.#results.dueInMs === 0) await this.write();
  }

  /** Stores and records all results that there are. @param next see BatchRecords.record. */
  async write(next: LinePlace | null = null): Promise<void> {
    if (this.#results.isEmpty) return;
    const stored = await this.#results.store(this.#signal);
    const { part, tally, results } = stored;
    const withJobs = results.filter(({ jobId }) => jobId !== null);
    const lines = withJobs.map(({ line }) => line);
    const { records, journal } = this.#needs;
    this.#wrote(await records.record(this.#hold, this.#version, part, tally, next, lines));
    this.#results.drop(stored);
    // Should this be missed, they leave when their time is over.
    for (const { jobId, sequences } of withJobs) {
      journal.forget(jobId!, sequences).catch(() => undefined);
    }
  }

  /** Withdraws what is in flight, and says of all other lines that they were not answered. */
  async close(closing: Closing): Promise<void> {
    let closedMs = -Infinity;
    while (this.#runs.size > 0) {
      this.#signal.throwIfAborted();
      this.#throwFault();
      // Redis may have been away.
      if (performance.now() - closedMs > 2 * LOOK_EVERY_MS) {
        closedMs = performance.now();
        for (const run of this.#runs.values()) run.close(closing).catch(() => undefined);
      }
      await this.#bell.wait(LOOK_EVERY_MS);
    }
    await this.write();
    for (let raw = await this.#reader.next(); raw !== null; raw = await this.#reader.next()) {
      this.#signal.throwIfAborted();
      this.#results.add(unstartedResult(this.#state.order, raw, closing));
      if (this.#results.isFull) await this.write(raw.next);
    }
    await this.write(this.#reader.place);
  }

  /** @param closing of a line that was started before, and may not be any more; `new` for others. */
  #run(line: StartedLine, raw: RawLine, closing: Closing | null | 'new'): void {
    const run = new LineRun(this.#needs, this.#state.order, line, this.#signal);
    if (closing === 'cancelled' || closing === 'expired') void run.close(closing);
    this.#runs.set(line.line, run);
    const take = async (): Promise<void> => {
      const result = await run.result(raw, closing !== 'new');
      this.#runs.delete(line.line);
      this.#results.add(result);
    };
    void take()
      .catch((error: unknown) => {
        // Not a line's error, which would be its result: our own fault.
        this.#fault ??= error;
      })
      .finally(() => {
        this.#bell.ring();
      });
  }

  #wrote(outcome: BatchWritten): void {
    if (outcome !== 'written') throw new Upset(outcome);
    this.#version += 1;
  }

  #throwFault(): void {
    if (this.#fault !== null) throw toCaravanError(this.#fault);
  }
}
