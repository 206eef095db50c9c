/** OpenAI's bodies of files and batches: requests turned into orders or refused, objects, and lines of results. */
import { z } from 'zod';
import { errorTable, type CaravanError } from '../proto/errors.js';
import type { BatchMoment, BatchOrder, BatchState } from './batch.js';
import { webhookField } from './openai.js';
import { endpoints } from './openai-endpoints.js';
import { errorBody } from './openai-answer.js';
import { parseBody, refuse } from './openai-refusal.js';
import type { FileRecord, Page } from './store-files.js';
import { newBatchId } from './store-batches.js';
import { DEFAULT_KEPT_S } from './files.js';

const MAX_METADATA = 16;
const MAX_WINDOW_S = 30 * 24 * 3600;

const expiresAfter = z.object({
  anchor: z.literal('created_at', { error: 'must be created_at' }),
  seconds: z.number().int().min(3600).max(2_592_000),
});

export const batchOrderBody = z.object({
  input_file_id: z.string(),
  endpoint: z.string(),
  completion_window: z.string(),
  metadata: z
    .record(z.string().max(64), z.string().max(512))
    .refine((pairs) => Object.keys(pairs).length <= MAX_METADATA, {
      error: `must have at most ${MAX_METADATA} pairs`,
    })
    .nullish(),
  output_expires_after: expiresAfter.nullish(),
  webhook: webhookField.nullish(),
});

/** POST /v1/batches. @throws CaravanError `invalid_request` with the field as `param`. */
export function parseBatch(body: unknown): { order: BatchOrder; webhook: { url: string } | null } {
  const parsed = parseBody(batchOrderBody, body);
  if (!Object.hasOwn(endpoints, parsed.endpoint)) {
    const served = Object.keys(endpoints).join(', ');
    refuse('endpoint', `must be one of ${served}, got ${JSON.stringify(parsed.endpoint)}`);
  }
  const createdMs = Date.now();
  const order: BatchOrder = {
    version: 1,
    id: newBatchId(),
    inputFileId: parsed.input_file_id,
    endpoint: parsed.endpoint,
    window: parsed.completion_window,
    createdMs,
    expiresMs: createdMs + 1000 * windowSeconds(parsed.completion_window),
    metadata: parsed.metadata ?? null,
    resultsKeptS: parsed.output_expires_after?.seconds ?? DEFAULT_KEPT_S,
  };
  return { order, webhook: parsed.webhook ?? null };
}

const UNIT_S: Readonly<Record<string, number>> = { s: 1, m: 60, h: 3600, d: 24 * 3600 };

/** `24h`, as OpenAI has it; other spans too. */
function windowSeconds(window: string): number {
  const match = /^(\d{1,7})([smhd])$/.exec(window);
  const seconds = match === null ? 0 : Number(match[1]) * UNIT_S[match[2]!]!;
  if (seconds < 1 || seconds > MAX_WINDOW_S) {
    const shown = JSON.stringify(window);
    refuse('completion_window', `must be a span such as 24h, 90m or 7d, up to 30d, got ${shown}`);
  }
  return seconds;
}

/** Fields of an upload beside the file itself. @throws CaravanError `invalid_request`. */
export function parseUpload(fields: ReadonlyMap<string, string>): { readonly keptS: number } {
  const purpose = fields.get('purpose') ?? refuse('purpose', 'is missing');
  if (purpose !== 'batch') {
    refuse('purpose', `must be batch, got ${JSON.stringify(purpose.slice(0, 100))}`);
  }
  const anchor = fields.get('expires_after[anchor]');
  const seconds = fields.get('expires_after[seconds]');
  if (anchor === undefined && seconds === undefined) return { keptS: DEFAULT_KEPT_S };
  const parsed = expiresAfter.safeParse({ anchor, seconds: Number(seconds) });
  if (parsed.success) return { keptS: parsed.data.seconds };
  const issue = parsed.error.issues[0];
  return refuse(`expires_after.${issue?.path.join('.') ?? ''}`, issue?.message ?? 'is wrong');
}

export const fileListQuery = z.object({
  after: z.string().optional(),
  purpose: z.string().optional(),
  order: z.enum(['asc', 'desc']).default('desc'),
  limit: z.coerce.number().int().min(1).max(10_000).default(10_000),
});

export const batchListQuery = z.object({
  after: z.string().optional(),
  limit: z.coerce.number().int().min(1).max(100).default(20),
});

/** Query of GET /v1/files. @throws CaravanError `invalid_request`. */
export const parseFileList = (query: unknown) => parseBody(fileListQuery, query);

/** Query of GET /v1/batches. @throws CaravanError `invalid_request`. */
export const parseBatchList = (query: unknown) => parseBody(batchListQuery, query);

export const fileBody = ({ id, bytes, createdMs, expiresS, filename, purpose }: FileRecord) => ({
  id,
  object: 'file',
  bytes,
  created_at: Math.floor(createdMs / 1000),
  ...(expiresS === null ? {} : { expires_at: expiresS }),
  filename,
  purpose,
  status: 'processed',
});

/** A page as OpenAI's clients turn it. */
export function listBody<T, B extends { readonly id: string }>(
  { items, hasMore }: Page<T>,
  bodyOf: (item: T) => B,
) {
  const data = items.map(bodyOf);
  return {
    object: 'list',
    data,
    first_id: data[0]?.id ?? null,
    last_id: data.at(-1)?.id ?? null,
    has_more: hasMore,
  };
}

const momentFields: Readonly<Record<BatchMoment, string>> = {
  inProgress: 'in_progress_at',
  finalizing: 'finalizing_at',
  completed: 'completed_at',
  failed: 'failed_at',
  expired: 'expired_at',
  cancelling: 'cancelling_at',
  cancelled: 'cancelled_at',
};

/** What there is not yet is left out, as OpenAI's own description has it. */
export function batchBody(state: BatchState) {
  const { order, status, moments, total, completed, failed, faults } = state;
  const { inputTokens, outputTokens } = state;
  return {
    id: order.id,
    object: 'batch',
    endpoint: order.endpoint,
    ...(state.model === null ? {} : { model: state.model }),
    ...(faults.length === 0 ? {} : { errors: { object: 'list', data: faults } }),
    input_file_id: order.inputFileId,
    completion_window: order.window,
    status,
    ...(state.outputFileId === null ? {} : { output_file_id: state.outputFileId }),
    ...(state.errorFileId === null ? {} : { error_file_id: state.errorFileId }),
    created_at: Math.floor(order.createdMs / 1000),
    expires_at: Math.floor(order.expiresMs / 1000),
    ...Object.fromEntries(
      Object.entries(moments).map(([moment, atS]) => [momentFields[moment as BatchMoment], atS]),
    ),
    request_counts: { total, completed, failed },
    usage: {
      input_tokens: inputTokens,
      input_tokens_details: { cached_tokens: 0 },
      output_tokens: outputTokens,
      output_tokens_details: { reasoning_tokens: 0 },
      total_tokens: inputTokens + outputTokens,
    },
    metadata: order.metadata,
  };
}

/** A line's id, the same however often its result is written. */
const resultId = (batchId: string, line: number): string =>
  `batch_req_${batchId.slice('batch_'.length)}_${line}`;

interface ResultHead {
  readonly batchId: string;
  readonly line: number;
  /** Null for a line that cannot be read. */
  readonly customId: string | null;
}

/** A line of the output file. */
export const outputLine = (
  { batchId, line, customId }: ResultHead,
  jobId: string,
  body: unknown,
) => ({
  id: resultId(batchId, line),
  custom_id: customId,
  response: { status_code: 200, request_id: jobId, body },
  error: null,
});

/** A line of the error file: a request that was answered with an error, as it would have been over HTTP. */
export const refusedLine = (
  { batchId, line, customId }: ResultHead,
  jobId: string,
  error: CaravanError,
) => ({
  id: resultId(batchId, line),
  custom_id: customId,
  response: {
    status_code: errorTable[error.code].http,
    request_id: jobId,
    body: errorBody(error),
  },
  error: null,
});

/** A line of the error file: a request that has no answer. */
export const unansweredLine = (
  { batchId, line, customId }: ResultHead,
  code: string,
  message: string,
) => ({
  id: resultId(batchId, line),
  custom_id: customId,
  response: null,
  error: { code, message },
});
