/**
 * The one table of error codes. Every failure that leaves a process is one of these; callers match
 * on `code`, never on the message. The message names the field, the rule and the value.
 */

/** `http`: status of a response; `grpc`: status of an rpc (numbers of the gRPC specification). */
interface ErrorRule {
  readonly http: number;
  readonly grpc: number;
  /** Whether the same request can succeed when it is tried again. */
  readonly isRetryable: boolean;
  readonly meaning: string;
}

const rule = (http: number, grpc: number, isRetryable: boolean, meaning: string): ErrorRule => ({
  http,
  grpc,
  isRetryable,
  meaning,
});

export const errorTable = {
  bad_usage: rule(400, 3, false, 'a command line or a setting is wrong'),
  invalid_request: rule(400, 3, false, 'a field of a request breaks a rule'),
  context_length_exceeded: rule(400, 3, false, 'prompt and answer do not fit the context'),
  invalid_api_key: rule(401, 16, false, 'the API key is missing or wrong'),
  unauthorized: rule(401, 16, false, 'the source of a download refuses it to this account'),
  model_not_found: rule(404, 5, false, 'no such model'),
  not_found: rule(404, 5, false, 'no such route, job, file, batch or response'),
  payload_too_large: rule(413, 3, false, 'the body is larger than the limit'),
  quota_exceeded: rule(429, 8, false, 'what is kept for later would pass a limit'),
  in_use: rule(409, 9, false, 'something that has not ended needs what is to be removed'),
  storage_unavailable: rule(503, 14, true, 'the storage of files cannot be reached'),
  queue_full: rule(429, 8, true, 'the queue is at its limit'),
  rate_limited: rule(429, 8, true, 'the tenant is at one of its limits'),
  deadline_unmeetable: rule(409, 9, false, 'the measured speed cannot meet the deadline'),
  illegal_tp: rule(400, 3, false, 'the model cannot be cut into that many ranks'),
  invalid_checkpoint: rule(
    400,
    9,
    false,
    'a file of the checkpoint is damaged or contradicts itself',
  ),
  unsupported_model: rule(400, 12, false, 'the checkpoint is of a kind that Caravan does not run'),
  protocol_mismatch: rule(500, 9, false, 'two processes speak different versions of the wire'),
  rank_busy: rule(503, 9, true, 'another coordinator holds the rank'),
  rank_unavailable: rule(503, 14, true, 'a rank cannot be reached'),
  rank_failed: rule(503, 14, true, 'a rank stopped in the middle of its work'),
  redis_unavailable: rule(503, 14, true, 'Redis cannot be reached'),
  engine_unavailable: rule(503, 14, true, 'no engine serves the model at present'),
  gateway_unavailable: rule(503, 14, true, 'the gateway cannot be reached'),
  hub_unavailable: rule(503, 14, true, 'a download cannot be reached, or broke off'),
  checksum_mismatch: rule(502, 15, true, 'a downloaded file is not what its source says it is'),
  disk_full: rule(507, 8, false, 'the disk has too little room'),
  timeout: rule(504, 4, true, 'the deadline of a call passed'),
  poisonous: rule(500, 13, false, 'the job ended every engine that ran it, two of them alone'),
  stale_take: rule(409, 10, false, 'another engine has taken the job since'),
  cancelled: rule(499, 1, false, 'the client withdrew the request'),
  expired: rule(408, 4, false, 'the deadline of the job passed'),
  out_of_memory: rule(507, 8, false, 'the device has too little memory'),
  internal: rule(500, 13, false, 'a fault of Caravan itself'),
} as const satisfies Record<string, ErrorRule>;

export type ErrorCode = keyof typeof errorTable;

/** A failure of the world (not of our code: that is an assertion), with its code from the table. */
export class CaravanError extends Error {
  readonly code: ErrorCode;
  /** The request's field at fault, as OpenAI's `param`. */
  readonly param: string | null;
  /** Seconds after which a retry is likely to help; null where nobody knows. */
  readonly retryAfterS: number | null;

  constructor(
    code: ErrorCode,
    message: string,
    options?: { param?: string; cause?: unknown; retryAfterS?: number },
  ) {
    super(message, options?.cause === undefined ? undefined : { cause: options.cause });
    this.name = 'CaravanError';
    this.code = code;
    this.param = options?.param ?? null;
    this.retryAfterS = options?.retryAfterS ?? null;
  }

  get isRetryable(): boolean {
    return errorTable[this.code].isRetryable;
  }
}

export const isErrorCode = (code: string): code is ErrorCode => Object.hasOwn(errorTable, code);

/** Coerces whatever was thrown into a CaravanError; unknown things become `fallback`. */
export function toCaravanError(thrown: unknown, fallback: ErrorCode = 'internal'): CaravanError {
  if (thrown instanceof CaravanError) return thrown;
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new CaravanError(fallback, message.split('\n')[0] ?? message, { cause: thrown });
}

export const isOutOfMemory = (error: unknown): error is CaravanError =>
  error instanceof CaravanError && error.code === 'out_of_memory';
