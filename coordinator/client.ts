/**
 * A typed client of the gateway: `import { CaravanClient } from 'caravan/client'`. Bodies are OpenAI's with Caravan's additions;
 * their types are those of the schemas that the gateway checks them by.
 */
import type { z } from 'zod';
import { AnswerStream } from './client-stream.js';
import { Transport, type CallOptions } from './client-transport.js';
import type * as answers from './openai-bodies.js';
import type { chatBody, completionBody } from './openai.js';
import type { batchOrderBody } from './openai-batch.js';
import type { responseBody } from './openai-responses.js';
import type { detokenizeBody, tokenizeBody } from './openai-tokens.js';

export { CaravanError, type ErrorCode } from '../proto/errors.js';
export { AnswerStream } from './client-stream.js';
export type { CallOptions } from './client-transport.js';

export type ChatRequest = Omit<z.input<typeof chatBody>, 'stream'>;
export type ChatCompletion = z.infer<typeof answers.chatCompletion>;
export type ChatCompletionChunk = z.infer<typeof answers.chatCompletionChunk>;
export type CompletionRequest = Omit<z.input<typeof completionBody>, 'stream'>;
export type Completion = z.infer<typeof answers.completion>;
export type CompletionChunk = z.infer<typeof answers.completionChunk>;
export type ResponseRequest = Omit<z.input<typeof responseBody>, 'stream'>;
export type ResponseBody = z.infer<typeof answers.response>;
export type ResponseEvent = z.infer<typeof answers.responseEvent>;
export type Job = z.infer<typeof answers.jobObject>;
export type Model = z.infer<typeof answers.modelObject>;
export type TokenizeRequest = z.input<typeof tokenizeBody>;
export type Tokenized = z.infer<typeof answers.tokenized>;
export type DetokenizeRequest = z.input<typeof detokenizeBody>;
export type FileObject = z.infer<typeof answers.fileObject>;
export type FileList = z.infer<typeof answers.fileList>;
export type BatchRequest = z.input<typeof batchOrderBody>;
export type Batch = z.infer<typeof answers.batchObject>;
export type BatchList = z.infer<typeof answers.batchList>;
export type Deleted = z.infer<typeof answers.deleted>;

export interface ClientOptions {
  /** Address of the gateway. Default http://127.0.0.1:8080. */
  readonly url?: string;
  readonly apiKey?: string | undefined;
  /** How long a whole answer may take. Default ten minutes. Streams have no limit but silence. */
  readonly answerTimeoutMs?: number;
  /** How calls are made. Default: the platform's fetch. */
  readonly fetch?: typeof fetch;
}

export interface UploadOptions extends CallOptions {
  /** Hears of every piece that is sent. */
  readonly onBytes?: (count: number) => void;
}

const ANSWER_TIMEOUT_MS = 600_000;
/** For calls that compute nothing. */
const CALL_TIMEOUT_MS = 30_000;

/**
 * Every call throws a CaravanError: with the code, the message and the `param` that the gateway says, or
 * `gateway_unavailable`, `timeout`, `cancelled`.
 */
export class CaravanClient {
  readonly #transport: Transport;
  readonly #answerTimeoutMs: number;

  constructor({ url, apiKey, answerTimeoutMs, fetch: own }: ClientOptions = {}) {
    this.#transport = new Transport({ url: url ?? 'http://127.0.0.1:8080', apiKey, fetch: own });
    this.#answerTimeoutMs = answerTimeoutMs ?? ANSWER_TIMEOUT_MS;
  }

  chat(body: ChatRequest, options?: CallOptions): Promise<ChatCompletion> {
    return this.#answer('/v1/chat/completions', body, options);
  }

  /** Goes on over broken connections. */
  streamChat(body: ChatRequest, options?: CallOptions): AnswerStream<ChatCompletionChunk> {
    return this.#stream('/v1/chat/completions', body, 'chat', options);
  }

  complete(body: CompletionRequest, options?: CallOptions): Promise<Completion> {
    return this.#answer('/v1/completions', body, options);
  }

  /** Goes on over broken connections. */
  streamComplete(body: CompletionRequest, options?: CallOptions): AnswerStream<CompletionChunk> {
    return this.#stream('/v1/completions', body, 'completion', options);
  }

  respond(body: ResponseRequest, options?: CallOptions): Promise<ResponseBody> {
    return this.#answer('/v1/responses', body, options);
  }

  /** Cannot go on over a broken connection: `response` tells the rest. */
  streamResponse(body: ResponseRequest, options?: CallOptions): AnswerStream<ResponseEvent> {
    return this.#stream('/v1/responses', body, null, options);
  }

  response(id: string, options?: CallOptions): Promise<ResponseBody> {
    return this.#get(`/v1/responses/${encodeURIComponent(id)}`, options);
  }

  deleteResponse(id: string, options?: CallOptions): Promise<Deleted> {
    return this.#delete(`/v1/responses/${encodeURIComponent(id)}`, options);
  }

  /**
   * What a job generates, from its beginning, or after an event. Leaving does not cancel the job.
   *
   * @param after the `lastEventId` of an earlier stream.
   */
  jobEvents(
    jobId: string,
    { after, signal }: CallOptions & { readonly after?: string } = {},
  ): AnswerStream<CompletionChunk> {
    const resume = (id: string): string => eventsRoute(id, 'completion');
    const call = { route: resume(jobId), init: {}, resume, after };
    return new AnswerStream(this.#transport, call, { signal });
  }

  /** Where a job stands. */
  job(id: string, options?: CallOptions): Promise<Job> {
    return this.#get(`/v1/jobs/${encodeURIComponent(id)}`, options);
  }

  /** A job that has ended stays as it is. */
  cancelJob(id: string, options?: CallOptions): Promise<Job> {
    return this.#post(`/v1/jobs/${encodeURIComponent(id)}/cancel`, undefined, options);
  }

  async models(options?: CallOptions): Promise<readonly Model[]> {
    const { data } = await this.#get<{ readonly data: readonly Model[] }>('/v1/models', options);
    return data;
  }

  model(id: string, options?: CallOptions): Promise<Model> {
    return this.#get(`/v1/models/${id.split('/').map(encodeURIComponent).join('/')}`, options);
  }

  tokenize(body: TokenizeRequest, options?: CallOptions): Promise<Tokenized> {
    return this.#post('/tokenize', body, options);
  }

  async detokenize(body: DetokenizeRequest, options?: CallOptions): Promise<string> {
    return (await this.#post<{ readonly prompt: string }>('/detokenize', body, options)).prompt;
  }

  /** Uploads a file for a batch, as a stream. */
  async upload(content: Blob, name: string, options: UploadOptions = {}): Promise<FileObject> {
    const { onBytes = () => undefined } = options;
    const fields = { purpose: 'batch' };
    const file = { name, content };
    const body = await this.#transport.upload('/v1/files', fields, file, onBytes, options);
    return body as FileObject;
  }

  files(
    query: { purpose?: string; order?: 'asc' | 'desc'; after?: string; limit?: number } = {},
    options?: CallOptions,
  ): Promise<FileList> {
    return this.#get(`/v1/files${queryOf(query)}`, options);
  }

  file(id: string, options?: CallOptions): Promise<FileObject> {
    return this.#get(`/v1/files/${encodeURIComponent(id)}`, options);
  }

  deleteFile(id: string, options?: CallOptions): Promise<Deleted> {
    return this.#delete(`/v1/files/${encodeURIComponent(id)}`, options);
  }

  /** The bytes of a file, as they come. */
  async *fileContent(id: string, options?: CallOptions): AsyncGenerator<Uint8Array> {
    const route = `/v1/files/${encodeURIComponent(id)}/content`;
    yield* (await this.#transport.open(route, {}, options)).bytes;
  }

  createBatch(body: BatchRequest, options?: CallOptions): Promise<Batch> {
    return this.#post('/v1/batches', body, options);
  }

  batch(id: string, options?: CallOptions): Promise<Batch> {
    return this.#get(`/v1/batches/${encodeURIComponent(id)}`, options);
  }

  /** The latest batches first. */
  batches(
    query: { after?: string; limit?: number } = {},
    options?: CallOptions,
  ): Promise<BatchList> {
    return this.#get(`/v1/batches${queryOf(query)}`, options);
  }

  cancelBatch(id: string, options?: CallOptions): Promise<Batch> {
    return this.#post(`/v1/batches/${encodeURIComponent(id)}/cancel`, undefined, options);
  }

  #stream<T>(
    route: string,
    body: object,
    kind: 'chat' | 'completion' | null,
    options?: CallOptions,
  ): AnswerStream<T> {
    const init = {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ ...body, stream: true }),
    };
    const { stream_options: wish } = body as {
      stream_options?: { include_usage?: boolean } | null;
    };
    const usage = wish?.include_usage === true ? '' : '&usage=false';
    const resume = kind === null ? null : (jobId: string) => `${eventsRoute(jobId, kind)}${usage}`;
    return new AnswerStream(this.#transport, { route, init, resume }, options);
  }

  async #answer<T>(route: string, body: object, options?: CallOptions): Promise<T> {
    const asked = { ...body, stream: false };
    const answer = this.#transport.json('POST', route, asked, this.#answerTimeoutMs, options);
    return (await answer) as T;
  }

  async #get<T>(route: string, options?: CallOptions): Promise<T> {
    return (await this.#transport.json('GET', route, undefined, CALL_TIMEOUT_MS, options)) as T;
  }

  async #post<T>(route: string, body: unknown, options?: CallOptions): Promise<T> {
    return (await this.#transport.json('POST', route, body, CALL_TIMEOUT_MS, options)) as T;
  }

  async #delete<T>(route: string, options?: CallOptions): Promise<T> {
    return (await this.#transport.json('DELETE', route, undefined, CALL_TIMEOUT_MS, options)) as T;
  }
}

const eventsRoute = (jobId: string, kind: 'chat' | 'completion'): string =>
  `/v1/jobs/${encodeURIComponent(jobId)}/events?as=${kind}`;

function queryOf(query: Readonly<Record<string, string | number | undefined>>): string {
  const pairs = Object.entries(query).flatMap(([name, value]) =>
    value === undefined ? [] : [[name, String(value)] as [string, string]],
  );
  return pairs.length === 0 ? '' : `?${new URLSearchParams(pairs).toString()}`;
}
