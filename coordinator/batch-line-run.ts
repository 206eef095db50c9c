/** One line of a batch on its way from the input file to its result. */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import type { Answers } from './answers.js';
import type { BatchOrder, StartedLine } from './batch.js';
import { LineFault, parseLine, type RawLine } from './batch-lines.js';
import type { LineResult } from './batch-results.js';
import type { Journal } from './journal.js';
import type { Models } from './models.js';
import { sequenceCount } from './job-sequences.js';
import { modelNameOf, type Asked, type ServedModel } from './openai.js';
import type { AnswerHead } from './openai-answer.js';
import { outputLine, refusedLine, unansweredLine } from './openai-batch.js';
import { endpoints } from './openai-endpoints.js';

const FIRST_PAUSE_MS = 500;
const MAX_PAUSE_MS = 15_000;

/** Why lines stop being answered before the file's end. */
export type Closing = 'cancelled' | 'expired';

const closingNews: Readonly<Record<Closing, readonly [code: string, message: string]>> = {
  cancelled: ['batch_cancelled', 'The batch was cancelled before this request was answered.'],
  expired: [
    'batch_expired',
    'This request could not be executed before the completion window expired.',
  ],
};

export interface LineRunNeeds {
  readonly models: Models;
  readonly journal: Journal;
  readonly answers: Answers;
  /** Of every line's job: the least urgent there is. */
  readonly priority: number;
}

/** A line that has a job. */
export class LineRun {
  readonly #needs: LineRunNeeds;
  readonly #order: BatchOrder;
  readonly #line: StartedLine;
  readonly #stopping: AbortSignal;
  /** Wakes a pause between two tries. */
  readonly #closed = new AbortController();
  #closing: Closing | null = null;
  #model: string | null = null;

  /** @param stopping ends the wait, not the job. */
  constructor(needs: LineRunNeeds, order: BatchOrder, line: StartedLine, stopping: AbortSignal) {
    this.#needs = needs;
    this.#order = order;
    this.#line = line;
    this.#stopping = stopping;
  }

  /** Withdraws the job; what it has answered by then stays. Can be repeated. */
  async close(closing: Closing): Promise<void> {
    this.#closing = closing;
    this.#closed.abort();
    if (this.#model !== null) await this.#needs.answers.cancel(this.#line.jobId, this.#model);
  }

  /**
   * Waits for the line's result.
   *
   * @param isResumed whether an earlier holder may have queued the job.
   * @throws the signal's reason, or our own faults.
   */
  async result(raw: RawLine, isResumed: boolean): Promise<LineResult> {
    const { jobId, line } = this.#line;
    let customId: string | null = null;
    let sequences = 1;
    try {
      const { endpoint } = this.#order;
      const parsed = parseLine(raw, endpoint);
      customId = parsed.customId;
      const { tokenizer, ...asked } = await this.#patiently(() => this.#ask(parsed.body));
      this.#model = asked.request.model;
      sequences = sequenceCount(asked.request);
      const job = isResumed ? await this.#patiently(() => this.#needs.journal.job(jobId)) : null;
      const createdS = Math.floor((job?.createdMs ?? Date.now()) / 1000);
      const { kind } = endpoints[endpoint]!;
      const head: AnswerHead = { kind, jobId, createdS, tokenizer, request: asked.request };
      // An earlier holder's job, of a batch that is over, is only withdrawn.
      if (this.#closing !== null && job !== null) await this.close(this.#closing);
      let isQueued = job !== null && (job.ending !== null || this.#closing !== null);
      const body = await this.#patiently(async () => {
        if (!isQueued) await this.#submit(asked);
        isQueued = true;
        try {
          return await this.#needs.answers.whole(head, null, this.#stopping);
        } catch (error) {
          isQueued = await this.#isDecided(error);
          throw isQueued ? new Decided(error) : error;
        }
      });
      const { usage } = body;
      return {
        ...{ line, jobId, sequences, isError: false },
        text: JSON.stringify(outputLine(this.#head(customId), jobId, body)),
        inputTokens: usage.prompt_tokens,
        outputTokens: usage.completion_tokens,
      };
    } catch (thrown) {
      this.#stopping.throwIfAborted();
      const error = thrown instanceof Decided ? thrown.error : thrown;
      const text = JSON.stringify(this.#errorLine(customId, error));
      return { line, jobId, sequences, isError: true, text, inputTokens: 0, outputTokens: 0 };
    }
  }

  /** @throws CaravanError as the endpoint does over HTTP. */
  async #ask(body: unknown): Promise<Asked & Pick<ServedModel, 'tokenizer'>> {
    const model = await this.#needs.models.find(modelNameOf(body));
    const asked = endpoints[this.#order.endpoint]!.parse(body, model);
    if (asked.isStream) {
      throw new CaravanError('invalid_request', "stream: a batch's answers are not streamed", {
        param: 'stream',
      });
    }
    const terms = { priority: this.#needs.priority, deadlineMs: this.#order.expiresMs };
    return { ...asked, terms, tokenizer: model.tokenizer };
  }

  async #submit(asked: Asked): Promise<void> {
    if (this.#closing !== null) throw new CaravanError('cancelled', 'the batch is closing');
    await this.#needs.answers.submit(asked, this.#line.jobId);
  }

  /** Whether an error is what the job came to, and not that of somebody who looks at it. */
  async #isDecided(error: unknown): Promise<boolean> {
    if (!(error instanceof CaravanError) || !error.isRetryable) return true;
    return (await this.#needs.journal.job(this.#line.jobId))?.ending != null;
  }

  /** Tries again for as long as that may help and the batch is open. */
  async #patiently<T>(call: () => Promise<T>): Promise<T> {
    for (let pauseMs = FIRST_PAUSE_MS; ; pauseMs = Math.min(2 * pauseMs, MAX_PAUSE_MS)) {
      try {
        return await call();
      } catch (error) {
        this.#stopping.throwIfAborted();
        if (!(error instanceof CaravanError) || !error.isRetryable) throw error;
        if (this.#closing !== null) throw error;
        await delay(pauseMs, undefined, {
          signal: AbortSignal.any([this.#stopping, this.#closed.signal]),
        }).catch(() => undefined);
      }
    }
  }

  #head(customId: string | null) {
    return { batchId: this.#order.id, line: this.#line.line, customId };
  }

  #errorLine(customId: string | null, thrown: unknown) {
    const head = this.#head(customId);
    if (thrown instanceof LineFault) return unansweredLine(head, thrown.code, thrown.message);
    const error = toCaravanError(thrown);
    const isOver = error.code === 'expired' && Date.now() >= this.#order.expiresMs;
    const closing = this.#closing ?? (isOver ? 'expired' : null);
    // What was wrong with the request is wrong whether or not the batch was cancelled.
    const isWithdrawn = error.isRetryable || error.code === 'cancelled' || error.code === 'expired';
    if (closing !== null && isWithdrawn) return unansweredLine(head, ...closingNews[closing]);
    return refusedLine(head, this.#line.jobId, error);
  }
}

/** The result of a line that never got a job. */
export function unstartedResult(order: BatchOrder, raw: RawLine, closing: Closing): LineResult {
  let customId: string | null = null;
  try {
    customId = parseLine(raw, order.endpoint).customId;
  } catch (error) {
    if (!(error instanceof LineFault)) throw error;
  }
  const head = { batchId: order.id, line: raw.line, customId };
  const text = JSON.stringify(unansweredLine(head, ...closingNews[closing]));
  return {
    line: raw.line,
    jobId: null,
    sequences: 0,
    isError: true,
    text,
    inputTokens: 0,
    outputTokens: 0,
  };
}

/** An error that no second try changes, whatever its code says. */
class Decided extends Error {
  readonly error: unknown;

  constructor(error: unknown) {
    super('decided');
    this.error = error;
  }
}
