/**
 * One answer: a job that is submitted, and its journal as it grows. What HTTP shows, whatever its shape.
 */
import { CaravanError, isErrorCode } from '../proto/errors.js';
import type { GatewayMetrics } from './metrics.js';
import { sequenceCount } from './job-sequences.js';
import { newJobId, type Journal, type JournalEntry } from './journal.js';
import { JobQueue } from './queue.js';
import type { Asked } from './openai.js';
import { answerBody, type AnswerHead } from './openai-answer.js';
import type { Ending } from './request.js';

export class Answers {
  readonly #redisUrl: string;
  readonly #journal: Journal;
  readonly #metrics: GatewayMetrics;
  readonly #queues = new Map<string, JobQueue>();
  readonly #onError: (error: Error) => void;

  constructor(
    redisUrl: string,
    journal: Journal,
    metrics: GatewayMetrics,
    onError: (error: Error) => void,
  ) {
    this.#redisUrl = redisUrl;
    this.#journal = journal;
    this.#metrics = metrics;
    this.#onError = onError;
  }

  queueOf(model: string): JobQueue {
    let queue = this.#queues.get(model);
    if (queue === undefined) {
      queue = new JobQueue(this.#redisUrl, model, this.#onError);
      this.#queues.set(model, queue);
    }
    return queue;
  }

  /**
   * Writes the job down and queues it; with an id that is known already, does what is missing of that.
   *
   * @returns its id.
   * @throws CaravanError `redis_unavailable`.
   */
  async submit({ request, terms }: Asked, id = newJobId()): Promise<string> {
    const isNew = await this.#journal.create(id, request, terms);
    try {
      await this.queueOf(request.model).submit(id, terms);
    } catch (error) {
      if (isNew) await this.#journal.forget(id, sequenceCount(request)).catch(() => undefined);
      throw error;
    }
    return id;
  }

  /**
   * Follows a job's journal and measures it.
   *
   * @param startMs of performance.now() at the request; null where nobody waits for the first token.
   */
  async *follow(
    id: string,
    model: string,
    offset: number,
    startMs: number | null,
    signal: AbortSignal,
  ): AsyncGenerator<JournalEntry> {
    let lastMs = startMs ?? 0;
    let isFirst = offset === 0;
    this.#metrics.answersInFlight.inc();
    try {
      for await (const entry of this.#journal.read(id, 0, offset, signal)) {
        if (entry.kind === 'tokens') {
          const count = entry.tokenIds.length;
          const nowMs = performance.now();
          const seconds = (nowMs - lastMs) / 1000;
          this.#metrics.tokens.inc({ model }, count);
          if (startMs !== null && isFirst) {
            this.#metrics.timeToFirstToken.observe({ model }, seconds);
          } else if (startMs !== null) {
            for (let i = 0; i < count; i += 1)
              this.#metrics.interTokenLatency.observe({ model }, seconds / count);
          }
          isFirst = false;
          lastMs = nowMs;
        }
        yield entry;
      }
    } finally {
      this.#metrics.answersInFlight.dec();
    }
  }

  /**
   * Waits for the end of a job.
   *
   * @returns OpenAI's body of the whole answer.
   * @throws CaravanError for a job that did not complete, or the signal's reason.
   */
  async whole(head: AnswerHead, startMs: number | null, signal: AbortSignal) {
    let text = '';
    for await (const entry of this.follow(head.jobId, head.model, 0, startMs, signal)) {
      if (entry.kind === 'tokens') {
        text += entry.texts.join('');
        continue;
      }
      if (entry.ending.status !== 'completed') throw endingError(entry.ending);
      const { finishReason, usage } = entry.ending;
      return answerBody(head, text + entry.text, finishReason, usage);
    }
    throw new CaravanError('internal', `the journal of ${head.jobId} ended without an ending`);
  }

  /** Nobody waits for it any more. */
  async cancel(id: string, model: string): Promise<void> {
    const outcome = await this.#journal.requestCancel(id);
    if (outcome === 'cancelled') await this.queueOf(model).remove(id);
  }

  async close(): Promise<void> {
    await Promise.all([...this.#queues.values()].map((queue) => queue.close()));
  }
}

/** What a client is told of a job that did not complete. */
export function endingError(ending: Exclude<Ending, { status: 'completed' }>): CaravanError {
  switch (ending.status) {
    case 'failed':
      return new CaravanError(
        isErrorCode(ending.code) ? ending.code : 'internal',
        `the job failed: ${ending.message}`,
      );
    case 'cancelled':
      return new CaravanError('cancelled', 'the job was cancelled');
    case 'expired':
      return new CaravanError('expired', "the job's deadline passed");
  }
}
