/** What each route of the gateway takes and gives. A test holds the served routes to this table. */
import type { z } from 'zod';
import * as answers from './openai-bodies.js';
import { chatBody, completionBody } from './openai.js';
import { batchOrderBody, batchListQuery, fileListQuery } from './openai-batch.js';
import { eventsQuery } from './openai-events.js';
import { responseBody } from './openai-responses.js';
import { detokenizeBody, tokenizeBody } from './openai-tokens.js';

/** Bodies by the names that the description gives them. */
export const requestSchemas = {
  ChatCompletionRequest: chatBody,
  CompletionRequest: completionBody,
  ResponseRequest: responseBody,
  TokenizeRequest: tokenizeBody,
  DetokenizeRequest: detokenizeBody,
  BatchRequest: batchOrderBody,
} as const satisfies Record<string, z.ZodType>;

export const answerSchemas = {
  Error: answers.errorAnswer,
  ChatCompletion: answers.chatCompletion,
  ChatCompletionChunk: answers.chatCompletionChunk,
  Completion: answers.completion,
  CompletionChunk: answers.completionChunk,
  Response: answers.response,
  ResponseEvent: answers.responseEvent,
  Deleted: answers.deleted,
  Model: answers.modelObject,
  ModelList: answers.modelList,
  Tokenized: answers.tokenized,
  Detokenized: answers.detokenized,
  File: answers.fileObject,
  FileList: answers.fileList,
  Batch: answers.batchObject,
  BatchList: answers.batchList,
  Job: answers.jobObject,
  Health: answers.health,
} as const satisfies Record<string, z.ZodType>;

export interface RouteDescription {
  readonly summary: string;
  /** The body, by its name; `form` is a file with fields beside it. */
  readonly body?: keyof typeof requestSchemas | 'form';
  readonly query?: z.ZodObject;
  /** The answer, by its name, or the media type of one that is no JSON. */
  readonly answer: keyof typeof answerSchemas | { readonly mediaType: string };
  /** The data of each event, where the answer may be a stream. */
  readonly events?: readonly (keyof typeof answerSchemas)[];
  /** Resumes after the event of this id. */
  readonly takesLastEventId?: boolean;
}

const text = (mediaType: string) => ({ mediaType });

/** By method and path, as Fastify has them. */
export const routeDescriptions: Readonly<Record<string, RouteDescription>> = {
  'POST /v1/chat/completions': {
    summary: 'Answers a chat, whole or as a stream of chunks.',
    ...{ body: 'ChatCompletionRequest', answer: 'ChatCompletion', events: ['ChatCompletionChunk'] },
  },
  'POST /v1/completions': {
    summary: 'Continues texts, whole or as a stream of chunks.',
    ...{ body: 'CompletionRequest', answer: 'Completion', events: ['CompletionChunk'] },
  },
  'POST /v1/responses': {
    summary: 'Answers and remembers, whole or as a stream of events.',
    ...{ body: 'ResponseRequest', answer: 'Response', events: ['ResponseEvent'] },
  },
  'GET /v1/responses/:id': { summary: 'A response of the last day.', answer: 'Response' },
  'DELETE /v1/responses/:id': { summary: 'Forgets a response.', answer: 'Deleted' },
  'GET /v1/jobs/:id': { summary: 'Where a job stands.', answer: 'Job' },
  'POST /v1/jobs/:id/cancel': { summary: 'Cancels a job.', answer: 'Job' },
  'GET /v1/jobs/:id/events': {
    summary: 'The stream of a job from its beginning, or after the last event that a client has.',
    query: eventsQuery,
    answer: text('text/event-stream'),
    events: ['CompletionChunk', 'ChatCompletionChunk'],
    takesLastEventId: true,
  },
  'GET /v1/models': { summary: 'The models that are served.', answer: 'ModelList' },
  'GET /v1/models/*': { summary: 'One model.', answer: 'Model' },
  'POST /tokenize': {
    summary: 'The tokens of a text, or of a chat.',
    ...{ body: 'TokenizeRequest', answer: 'Tokenized' },
  },
  'POST /detokenize': {
    summary: 'The text of tokens.',
    ...{ body: 'DetokenizeRequest', answer: 'Detokenized' },
  },
  'POST /v1/files': { summary: 'Uploads a file for a batch.', body: 'form', answer: 'File' },
  'GET /v1/files': { summary: 'The files.', query: fileListQuery, answer: 'FileList' },
  'GET /v1/files/:id': { summary: 'One file.', answer: 'File' },
  'GET /v1/files/:id/content': {
    summary: 'The bytes of a file.',
    answer: text('application/octet-stream'),
  },
  'DELETE /v1/files/:id': { summary: 'Deletes a file.', answer: 'Deleted' },
  'POST /v1/batches': {
    summary: 'Starts a batch over an uploaded file of requests.',
    ...{ body: 'BatchRequest', answer: 'Batch' },
  },
  'GET /v1/batches': { summary: 'The batches.', query: batchListQuery, answer: 'BatchList' },
  'GET /v1/batches/:id': { summary: 'One batch.', answer: 'Batch' },
  'POST /v1/batches/:id/cancel': {
    summary: 'Cancels a batch; what is answered stays.',
    answer: 'Batch',
  },
  'GET /livez': { summary: 'Whether the gateway is alive.', answer: 'Health' },
  'GET /health': { summary: 'Whether requests can be taken: Redis answers.', answer: 'Health' },
  'GET /readyz': { summary: 'Whether Redis answers and an engine is alive.', answer: 'Health' },
  'GET /metrics': { summary: "Prometheus' metrics.", answer: text('text/plain') },
  'GET /openapi.json': { summary: 'This description.', answer: text('application/json') },
  'GET /': { summary: 'The status page.', answer: text('text/html') },
};
