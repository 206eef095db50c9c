/** The routes that generate: chats and completions, streamed and whole, and the events of a job. */
import type { FastifyInstance, FastifyReply } from 'fastify';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { endingError, type Answers } from './answers.js';
import { EventStream } from './http-stream.js';
import type { Journal } from './journal.js';
import type { Models } from './models.js';
import { modelNameOf } from './openai.js';
import { chunkBody, errorBody, usageChunkBody, type AnswerHead } from './openai-answer.js';
import { endpoints } from './openai-endpoints.js';
import type { Ending } from './request.js';

export interface AnswerRoutes {
  readonly models: Models;
  readonly journal: Journal;
  readonly answers: Answers;
  /** Aborts when the gateway stops: answers end, but their jobs go on. */
  readonly stopping: AbortSignal;
}

export function addAnswerRoutes(app: FastifyInstance, routes: AnswerRoutes): void {
  for (const [path, { kind, parse }] of Object.entries(endpoints)) {
    app.post(path, async (request, reply) => {
      const startMs = performance.now();
      const model = await routes.models.find(modelNameOf(request.body));
      const asked = parse(request.body, model);
      const jobId = await routes.answers.submit(asked);
      const createdS = Math.floor(Date.now() / 1000);
      const head: AnswerHead = { kind, jobId, model: model.card.name, createdS };
      void reply.header('x-caravan-job', jobId);
      const answer = new Answer(routes, reply, head, startMs);
      return asked.isStream ? answer.stream(reply, asked.includesUsage, START) : answer.whole();
    });
  }

  app.get<{ Params: { id: string }; Querystring: { from?: string } }>(
    '/v1/jobs/:id/events',
    async (request, reply) => {
      const { id } = request.params;
      const job = await routes.journal.job(id);
      if (job === null) throw new CaravanError('not_found', `job ${id} is not known`);
      const position = positionOf(request.query.from ?? request.headers['last-event-id']);
      const createdS = Math.floor(job.createdMs / 1000);
      const head: AnswerHead = { kind: 'completion', jobId: id, model: job.model, createdS };
      // Whoever only looks on does not take the job with him when he leaves.
      const answer = new Answer(routes, reply, head, performance.now(), { isOwner: false });
      return answer.stream(reply, true, position);
    },
  );
}

/** Where a client stands: tokens that it has, and how much of the ending (see sendEnd). */
interface Position {
  readonly offset: number;
  readonly endPart: number;
}

const START: Position = { offset: 0, endPart: 0 };

/** An event's id is `<tokens>-<part of the ending>`. */
function positionOf(eventId: string | string[] | undefined): Position {
  if (eventId === undefined || eventId === '') return START;
  const match = /^(\d{1,9})(?:-(\d))?$/.exec(String(eventId));
  if (match === null) {
    throw new CaravanError(
      'invalid_request',
      `last-event-id: ${String(eventId)} is no event's id`,
      { param: 'last-event-id' },
    );
  }
  return { offset: Number(match[1]), endPart: Number(match[2] ?? 0) };
}

/** One client that reads one job. */
class Answer {
  readonly #routes: AnswerRoutes;
  readonly #head: AnswerHead;
  readonly #startMs: number;
  readonly #signal: AbortSignal;

  constructor(
    routes: AnswerRoutes,
    reply: FastifyReply,
    head: AnswerHead,
    startMs: number,
    { isOwner }: { isOwner: boolean } = { isOwner: true },
  ) {
    this.#routes = routes;
    this.#head = head;
    this.#startMs = startMs;
    const left = new AbortController();
    this.#signal = AbortSignal.any([left.signal, routes.stopping]);
    const onClose = (): void => {
      // Closed after the last byte is the normal end; closed because we stop is not the client's wish.
      if (reply.raw.writableFinished || routes.stopping.aborted) return;
      left.abort(new CaravanError('cancelled', 'the client left'));
      // The job's own ending may have come first; then there is nothing to cancel.
      if (isOwner) routes.answers.cancel(head.jobId, head.model).catch(() => undefined);
    };
    // A client may have left while its job was being queued.
    if (reply.raw.destroyed) onClose();
    else reply.raw.once('close', onClose);
  }

  /** Waits for the end. @throws CaravanError for a job that did not complete. */
  whole(): Promise<unknown> {
    return this.#routes.answers.whole(this.#head, this.#startMs, this.#signal);
  }

  /** Sends every piece of text as it is written, from a position on. */
  async stream(
    reply: FastifyReply,
    includesUsage: boolean,
    { offset, endPart }: Position,
  ): Promise<void> {
    const stream = new EventStream(reply, { 'x-caravan-job': this.#head.jobId });
    try {
      if (this.#head.kind === 'chat' && offset === 0) {
        await stream.send(chunkBody(this.#head, '', null, true));
      }
      for await (const entry of this.#follow(offset)) {
        if (entry.kind === 'tokens') {
          const text = entry.texts.join('');
          const id = `${entry.endOffset}-0`;
          if (text !== '') await stream.send(chunkBody(this.#head, text, null, false), id);
          continue;
        }
        if (entry.ending.status !== 'completed') throw endingError(entry.ending);
        await this.#sendEnd(stream, entry, entry.ending, endPart);
        if (includesUsage) await stream.send(usageChunkBody(this.#head, entry.ending.usage));
        await stream.send('[DONE]');
      }
    } catch (thrown) {
      // The status line is long gone: the error is an event, as OpenAI's clients expect.
      if (!this.#signal.aborted) await stream.send(errorBody(toCaravanError(thrown)));
    } finally {
      stream.end();
    }
  }

  /** The ending has two parts with ids of their own: the text that was held back, and the reason. */
  async #sendEnd(
    stream: EventStream,
    { endOffset, text }: { readonly endOffset: number; readonly text: string },
    { finishReason }: Extract<Ending, { status: 'completed' }>,
    endPart: number,
  ): Promise<void> {
    if (text !== '' && endPart < 1) {
      await stream.send(chunkBody(this.#head, text, null, false), `${endOffset}-1`);
    }
    if (endPart < 2) {
      await stream.send(chunkBody(this.#head, '', finishReason, false), `${endOffset}-2`);
    }
  }

  #follow(offset: number) {
    const { jobId, model } = this.#head;
    return this.#routes.answers.follow(jobId, model, offset, this.#startMs, this.#signal);
  }
}
