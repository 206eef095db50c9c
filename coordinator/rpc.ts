/**
 * Jobs over gRPC (proto/jobs.proto): the same requests, checked by the same rules, in the same queue and journal as those over
 * HTTP. Links are not encrypted: see docs/grpc.md.
 */
import { CaravanError } from '../proto/errors.js';
import {
  JobsService,
  type Job,
  type JobsServer as JobsHandlers,
  type StreamEvent,
  type StreamRequest,
  type SubmitRequest,
  type Usage as UsageMessage,
} from '../proto/gen/jobs.js';
import type { AnswerEvent, Answers } from './answers.js';
import { idempotencyKeyOf } from './idempotency-key.js';
import { sequenceCount } from './job-sequences.js';
import { parseJson } from './json-text.js';
import type { JobRecord, Journal } from './journal.js';
import type { Models } from './models.js';
import { parseChat, parseCompletion } from './openai.js';
import { refuse } from './openai-refusal.js';
import type { Usage } from './request.js';
import { closeRpc, listenRpc, newRpcServer, streaming, unary } from './rpc-server.js';

export interface JobsServerNeeds {
  readonly models: Models;
  readonly journal: Journal;
  readonly answers: Answers;
}

export class JobsServer {
  readonly #needs: JobsServerNeeds;
  readonly #server = newRpcServer();
  readonly #closing = new AbortController();

  constructor(needs: JobsServerNeeds) {
    this.#needs = needs;
    const handlers: JobsHandlers = {
      submit: unary((request: SubmitRequest) => this.#submit(request)),
      stream: streaming(this.#closing.signal, (request: StreamRequest, signal) =>
        this.#stream(request, signal),
      ),
      get: unary(async ({ jobId }) => jobMessage(await this.#find(jobId))),
      cancel: unary(async ({ jobId }) => {
        const { model } = await this.#find(jobId);
        await needs.answers.cancel(jobId, model);
        return jobMessage(await this.#find(jobId));
      }),
    };
    this.#server.addService(JobsService, handlers);
  }

  /** @returns the port. @throws CaravanError `bad_usage` when it is taken. */
  listen(host: string, port: number): Promise<number> {
    return listenRpc(this.#server, host, port, '--grpc-port');
  }

  /** Open streams end with `gateway_unavailable`: callers come back at their offset, to another gateway. */
  async close(): Promise<void> {
    this.#closing.abort(new CaravanError('gateway_unavailable', 'the gateway stops'));
    await closeRpc(this.#server);
  }

  async #submit(request: SubmitRequest): Promise<Job> {
    const { models, answers } = this.#needs;
    const isChat = request.prompt?.$case === 'chat';
    const body = bodyOf(request);
    const model = await models.find(request.model ?? null);
    const asked = isChat ? parseChat(body, model) : parseCompletion(body, model);
    const route = isChat ? 'grpc chat' : 'grpc completion';
    const key = idempotencyKeyOf(request.idempotencyKey, '', route, body);
    let id = key?.jobId;
    if (key === null) ({ id } = await answers.submit(asked));
    else await answers.submitOnce(asked, key);
    return jobMessage(await this.#find(id!));
  }

  async *#stream(request: StreamRequest, signal: AbortSignal): AsyncGenerator<StreamEvent> {
    const { jobId, offsets } = request;
    const { request: asked } = await this.#find(jobId);
    const count = sequenceCount(asked);
    if (offsets.length > count) {
      refuse('offsets', `has ${offsets.length} of them; the job has ${count} sequences`);
    }
    const from = Array.from({ length: count }, (_, index) => offsets[index] ?? 0);
    const head = { jobId, request: asked };
    for await (const event of this.#needs.answers.follow(head, from, null, signal)) {
      yield { event: eventOf(event, asked.logprobs !== undefined) };
    }
  }

  async #find(id: string): Promise<JobRecord> {
    const job = await this.#needs.journal.job(id);
    if (job === null) throw new CaravanError('not_found', `job ${id} is not known`);
    return job;
  }
}

/** The body that says the same over HTTP. @throws CaravanError `invalid_request`. */
function bodyOf(request: SubmitRequest): Readonly<Record<string, unknown>> {
  const { prompt, stop, extraJson } = request;
  if (prompt === undefined) refuse('prompt', 'must be a text, tokens or a chat');
  return {
    ...extraOf(extraJson),
    ...promptOf(prompt!),
    max_tokens: request.maxTokens,
    temperature: request.temperature,
    top_p: request.topP,
    top_k: request.topK,
    min_p: request.minP,
    presence_penalty: request.presencePenalty,
    frequency_penalty: request.frequencyPenalty,
    repetition_penalty: request.repetitionPenalty,
    seed: request.seed,
    stop: stop.length > 0 ? stop : undefined,
    ignore_eos: request.ignoreEos,
    n: request.n,
    priority: request.priority,
    deadline_s: request.deadlineS,
  };
}

function promptOf(prompt: NonNullable<SubmitRequest['prompt']>): Readonly<Record<string, unknown>> {
  switch (prompt.$case) {
    case 'text':
      return { prompt: prompt.text };
    case 'tokens':
      return { prompt: prompt.tokens.ids };
    case 'chat':
      return { messages: prompt.chat.messages };
  }
}

function extraOf(json: string | undefined): object {
  if (json === undefined || json === '') return {};
  let extra: unknown;
  try {
    extra = parseJson(json);
  } catch (thrown) {
    const isTooDeep = thrown instanceof CaravanError;
    return refuse('extra_json', isTooDeep ? thrown.message : 'is not valid JSON');
  }
  if (typeof extra === 'object' && extra !== null && !Array.isArray(extra)) return extra;
  return refuse('extra_json', 'must be a JSON object');
}

function jobMessage({ id, model, status, createdMs, terms, ending, request }: JobRecord): Job {
  return {
    ...{ id, model, status, createdMs, priority: terms.priority },
    deadlineMs: terms.deadlineMs ?? undefined,
    finishReason: ending?.status === 'completed' ? ending.finishReason : undefined,
    usage: ending?.status === 'completed' ? usageMessage(ending.usage) : undefined,
    failure:
      ending?.status === 'failed' ? { code: ending.code, message: ending.message } : undefined,
    sequenceCount: sequenceCount(request),
  };
}

const usageMessage = ({ promptTokens, cachedTokens, completionTokens }: Usage): UsageMessage => ({
  ...{ promptTokens, cachedTokens: cachedTokens ?? 0, completionTokens },
});

function eventOf(event: AnswerEvent, tellsLogprobs: boolean): StreamEvent['event'] {
  switch (event.kind) {
    case 'completed':
      return { $case: 'completed', completed: usageMessage(event.usage) };
    case 'finish': {
      const { index, endOffset, text, finishReason } = event;
      return { $case: 'finish', finish: { sequence: index, endOffset, text, finishReason } };
    }
    case 'tokens': {
      const { index, endOffset, tokenIds, texts, logprobs } = event;
      return {
        $case: 'tokens',
        tokens: {
          ...{ sequence: index, endOffset, tokenIds: [...tokenIds], text: texts.join('') },
          logprobs: tellsLogprobs ? (logprobs ?? []).map(({ logprob }) => logprob) : [],
        },
      };
    }
  }
}
