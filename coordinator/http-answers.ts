/** The routes that generate: chats and completions, streamed and whole, and the events of a job. */
import type { FastifyInstance, FastifyReply } from 'fastify';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import type { AnswerEvent, Answers } from './answers.js';
import { Choice } from './choice.js';
import { whileThere } from './http-leaving.js';
import { ownJob, sendJobHeaders, tenantOf, termsOf, type TenantRoutes } from './http-tenant.js';
import { EventStream } from './http-stream.js';
import { sequenceCount, sequenceRequest } from './job-sequences.js';
import { idempotencyKeyOf } from './idempotency-key.js';
import { newJobId, type Journal } from './journal.js';
import type { Models } from './models.js';
import { modelNameOf } from './openai.js';
import { chunkBody, errorBody, usageChunkBody, type AnswerHead } from './openai-answer.js';
import { endpoints } from './openai-endpoints.js';
import { jobBody } from './openai-job.js';
import { eventsQuery } from './openai-events.js';
import { parseBody } from './openai-refusal.js';

export interface AnswerRoutes extends TenantRoutes {
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
      const parsed = parse(request.body, model);
      const asked = { ...parsed, terms: termsOf(request, parsed.terms) };
      const tenant = tenantOf(routes, request);
      const { authorization = '', 'idempotency-key': header } = request.headers;
      const client = [tenant.name, authorization];
      const key = idempotencyKeyOf(header, client, path, request.body);
      const jobId = key?.jobId ?? newJobId();
      const job =
        key === null
          ? { ...asked, ...(await routes.answers.submit(asked, jobId, tenant)) }
          : await routes.answers.submitOnce(asked, key, tenant);
      const createdS = Math.floor(Date.now() / 1000);
      const { tokenizer } = model;
      const known = { request: job.request, terms: job.terms };
      const head = { kind, jobId, createdS, tokenizer, request: job.request, known };
      const headers = sendJobHeaders(reply, jobId, job.estimate);
      // Whoever can ask again with the same key has not given up when his connection breaks.
      const isTold = job.terms.webhook !== undefined;
      if (isTold && !asked.isStream) {
        routes.answers.leave(jobId, known);
        void reply.status(202);
        const record = await routes.journal.job(jobId);
        return jobBody(record ?? { ...known, ...unstarted(jobId, job.request.model) });
      }
      const isOwner = key === null && !isTold;
      const answer = new Answer(routes, reply, head, startMs, { isOwner });
      return asked.isStream
        ? answer.stream(reply, asked.includesUsage, null, headers)
        : answer.whole();
    });
  }

  app.get<{ Params: { id: string } }>('/v1/jobs/:id/events', async (request, reply) => {
    const { id } = request.params;
    const query = parseBody(eventsQuery, request.query);
    const job = await ownJob(routes, request, id);
    const { tokenizer } = await routes.models.find(job.model);
    const position = positionsOf(
      query.from ?? request.headers['last-event-id'],
      sequenceCount(job.request),
    );
    const createdS = Math.floor(job.createdMs / 1000);
    const head: AnswerHead = {
      kind: query.as,
      jobId: id,
      createdS,
      tokenizer,
      request: job.request,
      known: { request: job.request, terms: job.terms },
    };
    // Whoever only looks on does not take the job with him when he leaves.
    const answer = new Answer(routes, reply, head, performance.now(), { isOwner: false });
    return answer.stream(reply, query.usage, position);
  });
}

/** A job that Redis has just lost, and will be told again. */
const unstarted = (id: string, model: string) =>
  ({ id, model, status: 'waiting', createdMs: Date.now(), ending: null }) as const;

/** Where a client stands in a sequence: tokens that it has, and how much of the end (see #sendFinish). */
interface Position {
  readonly offset: number;
  readonly endPart: number;
}

/** An event's id is `<tokens>-<part of the end>` of each sequence, joined by `_`. @returns null for the beginning. */
function positionsOf(eventId: string | string[] | undefined, count: number): Position[] | null {
  if (eventId === undefined || eventId === '' || eventId === '0') return null;
  const positions = String(eventId)
    .split('_')
    .map((part) => /^(\d{1,9})(?:-(\d))?$/.exec(part));
  if (positions.length !== count || positions.includes(null)) {
    throw new CaravanError(
      'invalid_request',
      `last-event-id: ${String(eventId)} is no event's id`,
      { param: 'last-event-id' },
    );
  }
  return positions.map((match) => ({ offset: Number(match![1]), endPart: Number(match![2] ?? 0) }));
}

type SendChunk = (chunk: object, event?: { readonly id: string }) => Promise<void>;

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
    const { jobId, request } = head;
    this.#signal = whileThere(routes, reply, isOwner ? { jobId, model: request.model } : null);
  }

  /** Waits for the end. @throws CaravanError for a job that did not complete. */
  whole(): Promise<unknown> {
    return this.#routes.answers.whole(this.#head, this.#startMs, this.#signal);
  }

  /** Sends every piece of text as it is written. @param from where the client stands; null for the beginning. */
  async stream(
    reply: FastifyReply,
    includesUsage: boolean,
    from: readonly Position[] | null,
    headers: Readonly<Record<string, string>> = { 'x-caravan-job': this.#head.jobId },
  ): Promise<void> {
    const head = this.#head;
    const { request, tokenizer } = head;
    const stream = new EventStream(reply, headers);
    // Whoever is told the usage at the end is told with every chunk before that there is none yet, as OpenAI does.
    const send: SendChunk = (chunk, event) =>
      stream.send(includesUsage ? { ...chunk, usage: null } : chunk, event);
    const choices = Array.from(
      { length: sequenceCount(request) },
      (_, index) => new Choice(sequenceRequest(request, index), tokenizer),
    );
    const positions = [...(from ?? choices.map(() => ({ offset: 0, endPart: 0 })))];
    const unspoken = new Set(request.echo === true ? choices.keys() : []);
    try {
      if (head.kind === 'chat' && from === null) {
        for (const index of choices.keys()) {
          const first = { index, text: '', tokens: [], finishReason: null };
          await send(chunkBody(head, first, { isFirst: true }));
        }
      }
      // What a later piece means may depend on all before it: then it is read again, in silence.
      const isReplayed =
        request.logprobs !== undefined ||
        (head.kind === 'chat' && request.grammar?.kind === 'calls');
      const offsets = positions.map(({ offset }) => (isReplayed ? 0 : offset));
      const { answers } = this.#routes;
      for await (const event of answers.follow(head, offsets, this.#startMs, this.#signal)) {
        if (event.kind === 'completed') {
          if (includesUsage) await stream.send(usageChunkBody(head, event.usage));
          await stream.send('[DONE]');
          return;
        }
        const { index, kind, endOffset } = event;
        const choice = choices[index]!;
        if (unspoken.delete(index)) {
          const piece = choice.prompt(await answers.promptLogprobs(head, index));
          if (from === null) await send(chunkBody(head, { ...piece, index, finishReason: null }));
        }
        if (kind === 'finish') {
          await this.#sendFinish(send, choice, event, positions);
          continue;
        }
        const piece = choice.push(restAfter(positions[index]!.offset, event, choice));
        if (endOffset <= positions[index]!.offset) continue;
        positions[index] = { offset: endOffset, endPart: 0 };
        const isSilent = piece.deltas?.length === 0 || piece.text === '';
        if (isSilent && piece.tokens.length === 0) continue;
        const shown = { ...piece, index, finishReason: null };
        await send(chunkBody(head, shown), { id: idOf(positions) });
      }
    } catch (thrown) {
      // The status line is long gone: the error is an event, as OpenAI's clients expect.
      if (!this.#signal.aborted) await stream.send(errorBody(toCaravanError(thrown)));
    } finally {
      stream.end();
    }
  }

  /** The end has two parts with ids of their own: the text that was held back, and the reason. */
  async #sendFinish(
    send: SendChunk,
    choice: Choice,
    { index, endOffset, text, finishReason }: Extract<AnswerEvent, { kind: 'finish' }>,
    positions: Position[],
  ): Promise<void> {
    const endPart = positions[index]!.endPart;
    const piece = choice.finish(finishReason, text);
    if ((piece.text !== '' || piece.tokens.length > 0) && endPart < 1) {
      positions[index] = { offset: endOffset, endPart: 1 };
      const shown = { ...piece, index, finishReason: null };
      await send(chunkBody(this.#head, shown), { id: idOf(positions) });
    }
    positions[index] = { offset: endOffset, endPart: 2 };
    if (endPart < 2) {
      const { callCount } = choice;
      const shown = { index, text: '', tokens: [], finishReason, callCount };
      await send(chunkBody(this.#head, shown), { id: idOf(positions) });
    }
  }
}

type TokensEvent = Extract<AnswerEvent, { kind: 'tokens' }>;

/** The tokens after `offset`, if any are; those before it are pushed in silence. */
function restAfter(offset: number, event: TokensEvent, choice: Choice): TokensEvent {
  const { tokenIds, texts, logprobs, endOffset } = event;
  const known = offset - (endOffset - tokenIds.length);
  if (known <= 0 || known >= tokenIds.length) return event;
  const cut = (from: number, to?: number): TokensEvent => ({
    ...event,
    ...{ tokenIds: tokenIds.slice(from, to), texts: texts.slice(from, to) },
    ...(logprobs === undefined ? {} : { logprobs: logprobs.slice(from, to) }),
  });
  choice.push(cut(0, known));
  return cut(known);
}

const idOf = (positions: readonly Position[]): string =>
  positions.map(({ offset, endPart }) => `${offset}-${endPart}`).join('_');
