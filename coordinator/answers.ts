/**
 * One answer: a job that is submitted, and its journal as it grows. What HTTP shows, whatever its shape.
 */
import { CaravanError, isErrorCode } from '../proto/errors.js';
import { AwaitedJobs, type KnownJob } from './awaited-jobs.js';
import type { GatewayMetrics } from './metrics.js';
import { Choice } from './choice.js';
import {
  needsPromptLogprobs,
  promptCount,
  sequenceCount,
  sequenceRequest,
  sequencesPerPrompt,
} from './job-sequences.js';
import type { Estimate } from './admission.js';
import type { IdempotencyKey } from './idempotency-key.js';
import type { Intake } from './intake.js';
import { newJobId, type Journal } from './journal.js';
import type { JournalEntry, StreamEntry } from './journal-entry.js';
import { JobQueue } from './queue.js';
import { jobSizeOf } from './queue-order.js';
import type { Asked } from './openai.js';
import { answerBody, type AnswerHead, type ShownChoice } from './openai-answer.js';
import type { Ending, JobTerms, Request, Usage } from './request.js';
import type { Tenant } from './tenant.js';
import { cancelJob } from './unheld-jobs.js';
import type { WebhookIntake } from './webhook-intake.js';

/** What happens to an answer. */
export type AnswerEvent =
  | (Exclude<StreamEntry, { kind: 'end' }> & { readonly index: number })
  /** Every sequence has finished. */
  | { readonly kind: 'completed'; readonly usage: Usage };

/** Redis has it on its disk after a second, unless that is busy. */
const UNWRITTEN_MS = 5_000;

/** A job that is in the queue. */
export interface Submitted {
  readonly id: string;
  readonly terms: JobTerms;
  /** When it will start and end; null where nothing was measured, or nobody asked. */
  readonly estimate: Estimate | null;
}

export class Answers {
  readonly #redisUrl: string;
  readonly #journal: Journal;
  readonly #metrics: GatewayMetrics;
  readonly #queues = new Map<string, JobQueue>();
  readonly #awaited: AwaitedJobs;
  readonly #webhooks: WebhookIntake | null;
  readonly #intake: Intake | null;
  readonly #onError: (error: Error) => void;

  constructor(
    redisUrl: string,
    journal: Journal,
    metrics: GatewayMetrics,
    onError: (error: Error) => void,
    { webhooks, intake }: { readonly webhooks?: WebhookIntake; readonly intake?: Intake } = {},
  ) {
    this.#intake = intake ?? null;
    this.#redisUrl = redisUrl;
    this.#journal = journal;
    this.#metrics = metrics;
    this.#onError = onError;
    this.#webhooks = webhooks ?? null;
    this.#awaited = new AwaitedJobs(journal, {
      has: (id, model) => this.queueOf(model).has(id),
      submit: (id, job) => this.submit(job, id),
      onError,
    });
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
   * Makes room for the job, writes it down and queues it; with an id that is known already, does what is missing of
   * that.
   *
   * @param tenant whose quotas count; null for none.
   * @throws CaravanError `queue_full`, `rate_limited`, `deadline_unmeetable`, `redis_unavailable`.
   */
  async submit(asked: KnownJob, id = newJobId(), tenant: Tenant | null = null): Promise<Submitted> {
    const { request, terms } = asked;
    this.#webhooks?.check(terms.webhook);
    const queue = this.queueOf(request.model);
    const size = jobSizeOf(request);
    const isNewWish = await this.#webhooks?.add(id, terms.webhook);
    try {
      if (this.#intake !== null) {
        return { id, ...(await this.#intake.admit(queue, id, request, terms, size, tenant)) };
      }
      await queue.enqueue(id, terms, size, { request });
      return { id, terms, estimate: null };
    } catch (error) {
      // A Redis that did not answer may have let it in.
      const isRefused = error instanceof CaravanError && error.code !== 'redis_unavailable';
      if (isNewWish === true && isRefused) await this.#webhooks!.remove(id).catch(() => undefined);
      throw error;
    }
  }

  /**
   * As `submit`, for a request with an idempotency key: the first of several is the job, and what it asked counts.
   *
   * @throws CaravanError `invalid_request` when the key stands for another request, `redis_unavailable`.
   */
  async submitOnce(
    asked: Asked,
    { jobId, fingerprint }: IdempotencyKey,
    tenant: Tenant | null = null,
  ): Promise<KnownJob & Pick<Submitted, 'estimate'>> {
    const terms = { ...asked.terms, fingerprint };
    let job = await this.#journal.job(jobId);
    let estimate: Estimate | null = null;
    if (job === null) {
      ({ estimate } = await this.submit({ ...asked, terms }, jobId, tenant));
      // Of two that came at once, one was first.
      job = await this.#journal.job(jobId);
    } else if (job.ending === null && !(await this.queueOf(job.model).has(jobId))) {
      // Whoever wrote it down died before it was queued.
      await this.submit({ ...asked, request: job.request, terms: job.terms }, jobId);
    }
    if (job !== null && job.terms.fingerprint !== fingerprint) {
      throw new CaravanError(
        'invalid_request',
        'idempotency-key: belongs to a request with another body',
        { param: 'idempotency-key' },
      );
    }
    const { request, terms: kept } = job ?? { request: asked.request, terms };
    return { request, terms: kept, estimate };
  }

  /**
   * Follows a job's journal and measures it, to its completion: the last event.
   *
   * @param offsets tokens of each sequence that the reader has.
   * @param startMs of performance.now() at the request; null where nobody waits for the first token.
   * @throws CaravanError for a job that did not complete, or the signal's reason.
   */
  async *follow(
    { jobId, request, known }: Pick<AnswerHead, 'jobId' | 'request' | 'known'>,
    offsets: readonly number[],
    startMs: number | null,
    signal: AbortSignal,
  ): AsyncGenerator<AnswerEvent> {
    const { model } = request;
    const release = known === undefined ? () => undefined : this.#awaited.add(jobId, known);
    const isKnown = known !== undefined;
    let lastMs = startMs ?? 0;
    let isFirst = offsets.every((offset) => offset === 0);
    this.#metrics.answersInFlight.inc();
    try {
      for await (const { index, entry } of this.#journal.readAll(jobId, offsets, signal, isKnown)) {
        if (entry.kind === 'end') {
          yield* eventsOfEnd(entry, offsets.length);
          return;
        }
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
        yield { ...entry, index };
      }
    } finally {
      release();
      this.#metrics.answersInFlight.dec();
    }
  }

  /** The logprobs of a sequence's prompt, from its second token on; complete once it has a token or has finished. */
  promptLogprobs({ jobId, request }: Pick<AnswerHead, 'jobId' | 'request'>, index: number) {
    return needsPromptLogprobs(request) ? this.#journal.promptLogprobs(jobId, index) : [];
  }

  /**
   * Waits for the end of a job.
   *
   * @returns OpenAI's body of the whole answer.
   * @throws CaravanError for a job that did not complete, or the signal's reason.
   */
  async whole(head: AnswerHead, startMs: number | null, signal: AbortSignal) {
    const { choices, usage } = await this.wholeChoices(head, startMs, signal);
    return answerBody(head, choices, usage);
  }

  /** As `whole`, before it takes a shape: the choices that are shown. */
  async wholeChoices(
    head: Omit<AnswerHead, 'kind'>,
    startMs: number | null,
    signal: AbortSignal,
  ): Promise<{ readonly choices: readonly ShownChoice[]; readonly usage: Usage }> {
    const { request, tokenizer } = head;
    const count = sequenceCount(request);
    const choices = Array.from(
      { length: count },
      (_, index) => new Choice(sequenceRequest(request, index), tokenizer),
    );
    const spoken = new Set<number>();
    for await (const event of this.follow(head, Array<number>(count).fill(0), startMs, signal)) {
      if (event.kind === 'completed')
        return { choices: shownOf(choices, request), usage: event.usage };
      const choice = choices[event.index]!;
      if (request.echo === true && !spoken.has(event.index)) {
        spoken.add(event.index);
        choice.prompt(await this.promptLogprobs(head, event.index));
      }
      if (event.kind === 'tokens') choice.push(event);
      else choice.finish(event.finishReason, event.text);
    }
    throw new CaravanError('internal', `the journal of ${head.jobId} ended without an ending`);
  }

  /** Nobody waits for a job that was just submitted: what Redis may not have on its disk yet is looked after. */
  leave(id: string, job: KnownJob): void {
    const release = this.#awaited.add(id, job);
    setTimeout(release, UNWRITTEN_MS).unref();
  }

  /** Nobody waits for it any more. */
  async cancel(id: string, model: string): Promise<void> {
    await cancelJob(this.#journal, this.queueOf(model), id);
  }

  async close(): Promise<void> {
    this.#awaited.close();
    await Promise.all([...this.#queues.values()].map((queue) => queue.close()));
  }
}

/** The ending of a job, and, of a job of one, how its sequence finished. @throws CaravanError. */
function* eventsOfEnd(
  entry: Extract<JournalEntry, { kind: 'end' }>,
  count: number,
): Generator<AnswerEvent> {
  const { ending, endOffset, text } = entry;
  if (ending.status !== 'completed') throw endingError(ending);
  const { finishReason, usage } = ending;
  if (count === 1) yield { kind: 'finish', index: 0, endOffset, finishReason, text };
  yield { kind: 'completed', usage };
}

/** The choices that are shown: of every prompt the `n` with the best mean logprob. */
function shownOf(choices: readonly Choice[], request: Request): ShownChoice[] {
  const perPrompt = sequencesPerPrompt(request);
  const n = request.n ?? 1;
  const shown = Array.from({ length: promptCount(request) }, (_, prompt) => {
    const own = choices.slice(prompt * perPrompt, (prompt + 1) * perPrompt);
    if (perPrompt > n) own.sort((a, b) => b.meanLogprob - a.meanLogprob);
    return own.slice(0, n);
  }).flat();
  return shown.map(({ text, tokens, finishReason, callCount }, index) => ({
    ...{ index, text, tokens, finishReason, callCount },
  }));
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
