/**
 * Jobs over gRPC (proto/jobs.proto): the same requests, checked by the same rules, in the same queue and journal as those over
 * HTTP, for the tenant that the call's metadata name as headers do over HTTP.
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
import { newJobId, type JobRecord, type Journal } from './journal.js';
import type { Models } from './models.js';
import { parseChat, parseCompletion } from './openai.js';
import { refuse } from './openai-refusal.js';
import type { LinkSecurity } from '../proto/link-security.js';
import type { Usage } from './request.js';
import type { Tenant, TenantClaim } from './tenant.js';
import type { Tenants } from './tenants.js';
import {
  closeRpc,
  listenRpc,
  newRpcServer,
  streaming,
  unary,
  type CallHeader,
} from './rpc-server.js';

export interface JobsServerNeeds {
  readonly models: Models;
  readonly journal: Journal;
  readonly answers: Answers;
  readonly tenants: Tenants;
}

export class JobsServer {
  readonly #needs: JobsServerNeeds;
  readonly #security: LinkSecurity | null;
  readonly #server = newRpcServer();
  readonly #closing = new AbortController();

  /** @param security of its links; plain if left out. */
  constructor(needs: JobsServerNeeds, security: LinkSecurity | null = null) {
    this.#needs = needs;
    this.#security = security;
    const { tenants } = needs;
    const handlers: JobsHandlers = {
      submit: unary((request: SubmitRequest, header) => this.#submit(request, claimOf(header))),
      stream: streaming(this.#closing.signal, (request: StreamRequest, header, signal) =>
        this.#stream(request, tenants.find(claimOf(header)), signal),
      ),
      get: unary(async ({ jobId }, header) =>
        jobMessage(await this.#find(jobId, tenants.find(claimOf(header)))),
      ),
      cancel: unary(async ({ jobId }, header) => {
        const tenant = tenants.find(claimOf(header));
        const { model } = await this.#find(jobId, tenant);
        await needs.answers.cancel(jobId, model);
        return jobMessage(await this.#find(jobId, tenant));
      }),
    };
    this.#server.addService(JobsService, handlers);
  }

  /** @returns the port. @throws CaravanError `bad_usage` when it is taken. */
  listen(host: string, port: number): Promise<number> {
    return listenRpc(this.#server, host, port, '--grpc-port', this.#security);
  }

  /** Open streams end with `gateway_unavailable`: callers come back at their offset, to another gateway. */
  async close(): Promise<void> {
    this.#closing.abort(new CaravanError('gateway_unavailable', 'the gateway stops'));
    await closeRpc(this.#server);
  }

  async #submit(request: SubmitRequest, claim: TenantClaim): Promise<Job> {
    const { models, answers, tenants } = this.#needs;
    const tenant = tenants.find(claim);
    const isChat = request.prompt?.$case === 'chat';
    const body = bodyOf(request);
    const model = await models.find(request.model ?? null);
    const asked = isChat ? parseChat(body, model) : parseCompletion(body, model);
    const route = isChat ? 'grpc chat' : 'grpc completion';
    const client = [tenant.name, claim.authorization ?? ''];
    const key = idempotencyKeyOf(request.idempotencyKey, client, route, body);
    const id = key?.jobId ?? newJobId();
    const { estimate } = await (key === null
      ? answers.submit(asked, id, tenant)
      : answers.submitOnce(asked, key, tenant));
    const job = jobMessage(await this.#find(id, tenant));
    if (estimate === null) return job;
    return {
      ...job,
      expectedStartMs: Math.round(estimate.startMs),
      expectedEndMs: Math.round(estimate.endMs),
    };
  }

  async *#stream(
    request: StreamRequest,
    tenant: Tenant,
    signal: AbortSignal,
  ): AsyncGenerator<StreamEvent> {
    const { jobId, offsets } = request;
    const { request: asked } = await this.#find(jobId, tenant);
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

  /** @throws CaravanError `not_found`, also for a job that is another tenant's. */
  async #find(id: string, tenant: Tenant): Promise<JobRecord> {
    const { journal, tenants } = this.#needs;
    const job = await journal.job(id);
    if (job !== null && tenants.mayMind(tenant, job.terms.tenant)) return job;
    throw new CaravanError('not_found', `job ${id} is not known`);
  }
}

/** As headers over HTTP. */
const claimOf = (header: CallHeader): TenantClaim => ({
  authorization: header('authorization'),
  name: header('x-caravan-tenant'),
});

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
