/** /v1/responses: answers that remember what was said before. The conversation is in Redis, its answers in journals. */
import type { FastifyInstance, FastifyReply, FastifyRequest } from 'fastify';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import type { AnswerRoutes } from './http-answers.js';
import { whileThere } from './http-leaving.js';
import { EventStream } from './http-stream.js';
import { sendJobHeaders, tenantOf, termsOf } from './http-tenant.js';
import { modelNameOf } from './openai.js';
import { callBodies } from './openai-calls.js';
import type { AnswerHead } from './openai-answer.js';
import { newResponseId, ResponseEvents, responseBodyOf } from './openai-response-body.js';
import { askResponse, parseResponseBody } from './openai-responses.js';
import { newJobId, type JobRecord } from './journal.js';
import type { ResponseMessage, ResponseRecord, ResponseRecords } from './store-responses.js';
import type { CallStyle } from './tool-calls.js';

export interface ResponseRoutes extends AnswerRoutes {
  readonly responses: ResponseRecords;
  /** How long jobs, and what was said, are kept. */
  readonly retentionS: number;
}

type Head = Omit<AnswerHead, 'kind'>;

export function addResponseRoutes(app: FastifyInstance, routes: ResponseRoutes): void {
  app.post('/v1/responses', async (request, reply) => {
    const startMs = performance.now();
    const model = await routes.models.find(modelNameOf(request.body));
    const body = parseResponseBody(request.body);
    const { previous_response_id: previous } = body;
    const earlier = previous == null ? [] : await conversationOf(routes, request, previous);
    const { asked, messages, echoed } = askResponse(body, earlier, model);
    const jobId = newJobId();
    const createdS = Math.floor(Date.now() / 1000);
    const id = newResponseId(jobId);
    const record: ResponseRecord = { version: 1, id, jobId, createdS, messages, echoed };
    // Kept before it is queued: an answer that is there must be found.
    if (body.store !== false) await routes.responses.keep(record, routes.retentionS);
    const wished = { ...asked, terms: termsOf(request, asked.terms) };
    const tenant = tenantOf(routes, request);
    const { terms, estimate } = await routes.answers.submit(wished, jobId, tenant);
    sendJobHeaders(reply, jobId, estimate);
    const { request: answered } = asked;
    const known = { request: answered, terms };
    const head: Head = { jobId, createdS, request: answered, known, tokenizer: model.tokenizer };
    const signal = whileThere(routes, reply, { jobId, model: model.card.name });
    if (asked.isStream) {
      await stream(routes, reply, record, head, startMs, signal);
      return undefined;
    }
    const { text, finishReason, usage } = await wholeOf(routes, head, startMs, signal);
    const style = styleOf(head);
    return responseBodyOf(record, { kind: 'ended', text, style, finishReason, usage });
  });

  app.get<{ Params: { id: string } }>('/v1/responses/:id', async (call) => {
    const { record, job } = await ownResponse(routes, call, call.params.id);
    const { ending, request } = job;
    if (ending === null) return responseBodyOf(record, { kind: 'running' });
    if (ending.status !== 'completed') {
      return responseBodyOf(record, { kind: 'failed', message: `the job is ${ending.status}` });
    }
    const { tokenizer } = await routes.models.find(job.model);
    const head: Head = { ...record, request, tokenizer };
    const { text } = await wholeOf(routes, head, null, routes.stopping);
    return responseBodyOf(record, { ...ending, kind: 'ended', text, style: styleOf(head) });
  });

  app.delete<{ Params: { id: string } }>('/v1/responses/:id', async (request) => {
    const { id } = request.params;
    await ownResponse(routes, request, id);
    if (!(await routes.responses.forget(id))) throw unknownResponse(id);
    return { id, object: 'response', deleted: true };
  });
}

/** How an answer calls tools; null where it may call none. */
const styleOf = ({ request: { grammar } }: Head): CallStyle | null =>
  grammar?.kind === 'calls' ? grammar.style : null;

const unknownResponse = (id: string): CaravanError =>
  new CaravanError('not_found', `response ${id} is not known (responses are kept for a day)`);

/** A response of the request's tenant, and its job. @throws CaravanError `not_found`, also for one that is another's. */
async function ownResponse(
  routes: ResponseRoutes,
  request: FastifyRequest,
  id: string,
): Promise<{ readonly record: ResponseRecord; readonly job: JobRecord }> {
  const record = await routes.responses.find(id);
  const job = record === null ? null : await routes.journal.job(record.jobId);
  const { tenants } = routes;
  if (record === null || job === null) throw unknownResponse(id);
  if (!tenants.mayMind(tenantOf(routes, request), job.terms.tenant)) throw unknownResponse(id);
  return { record, job };
}

/** What was said up to and with a response. @throws CaravanError for one that is unknown or has no answer. */
async function conversationOf(
  routes: ResponseRoutes,
  request: FastifyRequest,
  id: string,
): Promise<ResponseMessage[]> {
  const param = 'previous_response_id';
  const { record, job } = await ownResponse(routes, request, id).catch((thrown: unknown) => {
    const { code, message } = toCaravanError(thrown);
    throw new CaravanError(code, `${param}: ${message}`, { param });
  });
  if (job.ending?.status !== 'completed') {
    const status = job.ending?.status ?? 'not finished';
    throw new CaravanError('invalid_request', `${param}: response ${id} is ${status}`, { param });
  }
  const { tokenizer } = await routes.models.find(job.model);
  const head: Head = { ...record, request: job.request, tokenizer };
  const { text } = await wholeOf(routes, head, null, routes.stopping);
  const style = styleOf(head);
  if (style === null) return [...record.messages, { role: 'assistant', content: text }];
  const { content, calls } = callBodies(record.jobId, 0, text, style);
  const said = { role: 'assistant', content: content ?? (calls.length === 0 ? '' : null) };
  return [...record.messages, calls.length === 0 ? said : { ...said, tool_calls: calls }];
}

async function wholeOf(
  { answers }: ResponseRoutes,
  head: Head,
  startMs: number | null,
  signal: AbortSignal,
) {
  const { choices, usage } = await answers.wholeChoices(head, startMs, signal);
  const { text, finishReason } = choices[0]!;
  return { text, usage, finishReason: finishReason! };
}

async function stream(
  { answers }: ResponseRoutes,
  reply: FastifyReply,
  record: ResponseRecord,
  head: Head,
  startMs: number,
  signal: AbortSignal,
): Promise<void> {
  const out = new EventStream(reply, { 'x-caravan-job': record.jobId });
  const events = new ResponseEvents(record, styleOf(head));
  const send = (event: { readonly type: string }): Promise<void> =>
    out.send(event, { event: event.type });
  try {
    for (const event of events.start()) await send(event);
    let finishReason: 'stop' | 'length' = 'stop';
    for await (const event of answers.follow(head, [0], startMs, signal)) {
      if (event.kind === 'completed') {
        for (const last of events.end(finishReason, event.usage)) await send(last);
        return;
      }
      const text = event.kind === 'tokens' ? event.texts.join('') : event.text;
      if (event.kind === 'finish') finishReason = event.finishReason;
      for (const told of events.push(text)) await send(told);
    }
  } catch (thrown) {
    if (!signal.aborted) await send(events.fail(toCaravanError(thrown).message));
  } finally {
    out.end();
  }
}
