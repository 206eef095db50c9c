/**
 * What the gateway answers, as schemas: the description at /openapi.json and the types of the client are made of them, and a
 * test holds real answers to them.
 */
import { z } from 'zod';
import type { BatchStatus } from './batch.js';

const count = z.number().int().nonnegative();
/** Unix time in seconds. */
const seconds = z.number().int();

export const errorAnswer = z.object({
  error: z.object({
    message: z.string(),
    type: z.string(),
    param: z.string().nullable(),
    code: z.string(),
  }),
});

const usage = z.object({
  prompt_tokens: count,
  completion_tokens: count,
  total_tokens: count,
  prompt_tokens_details: z.object({ cached_tokens: count }),
});

const tokenLogprob = z.object({
  token: z.string(),
  logprob: z.number(),
  bytes: z.array(z.number().int().min(0).max(255)),
});

const chatLogprobs = z.object({
  content: z.array(z.object({ ...tokenLogprob.shape, top_logprobs: z.array(tokenLogprob) })),
  refusal: z.null(),
});

const completionLogprobs = z.object({
  tokens: z.array(z.string()),
  token_logprobs: z.array(z.number().nullable()),
  top_logprobs: z.array(z.record(z.string(), z.number()).nullable()),
  text_offset: z.array(count),
});

const toolCall = z.object({
  id: z.string(),
  type: z.literal('function'),
  function: z.object({ name: z.string(), arguments: z.string() }),
});

const completionReason = z.enum(['stop', 'length']);
const chatReason = z.enum(['stop', 'length', 'tool_calls']);

export const chatCompletion = z.object({
  id: z.string(),
  object: z.literal('chat.completion'),
  created: seconds,
  model: z.string(),
  choices: z.array(
    z.object({
      index: count,
      message: z.object({
        role: z.literal('assistant'),
        content: z.string().nullable(),
        refusal: z.null(),
        tool_calls: z.array(toolCall).optional(),
      }),
      logprobs: chatLogprobs.nullable(),
      finish_reason: chatReason,
    }),
  ),
  usage,
});

export const chatCompletionChunk = z.object({
  id: z.string(),
  object: z.literal('chat.completion.chunk'),
  created: seconds,
  model: z.string(),
  choices: z.array(
    z.object({
      index: count,
      delta: z.object({
        role: z.literal('assistant').optional(),
        content: z.string().optional(),
        tool_calls: z
          .array(
            z.object({
              index: count,
              id: z.string().optional(),
              type: z.literal('function').optional(),
              function: z.object({ name: z.string().optional(), arguments: z.string() }),
            }),
          )
          .optional(),
      }),
      logprobs: chatLogprobs.nullable(),
      finish_reason: chatReason.nullable(),
    }),
  ),
  usage: usage.nullish(),
});

const completionOf = <R extends z.ZodType>(reason: R) => ({
  id: z.string(),
  object: z.literal('text_completion'),
  created: seconds,
  model: z.string(),
  choices: z.array(
    z.object({
      index: count,
      text: z.string(),
      logprobs: completionLogprobs.nullable(),
      finish_reason: reason,
    }),
  ),
});

export const completion = z.object({ ...completionOf(completionReason), usage });

export const completionChunk = z.object({
  ...completionOf(completionReason.nullable()),
  usage: usage.nullish(),
});

const outputText = z.object({
  type: z.literal('output_text'),
  text: z.string(),
  annotations: z.array(z.never()),
  logprobs: z.array(z.never()),
});

const itemStatus = z.enum(['in_progress', 'completed', 'incomplete']);

const outputItem = z.discriminatedUnion('type', [
  z.object({
    id: z.string(),
    type: z.literal('message'),
    role: z.literal('assistant'),
    status: itemStatus,
    content: z.array(outputText),
  }),
  z.object({
    id: z.string(),
    type: z.literal('function_call'),
    status: itemStatus,
    call_id: z.string(),
    name: z.string(),
    arguments: z.string(),
  }),
]);

export const response = z.object({
  id: z.string(),
  object: z.literal('response'),
  created_at: seconds,
  status: z.enum(['in_progress', 'completed', 'incomplete', 'failed']),
  background: z.literal(false),
  error: z.object({ code: z.literal('server_error'), message: z.string() }).nullable(),
  incomplete_details: z.object({ reason: z.literal('max_output_tokens') }).nullable(),
  instructions: z.string().nullable(),
  max_output_tokens: count.nullable(),
  metadata: z.record(z.string(), z.string()),
  model: z.string(),
  output: z.array(outputItem),
  parallel_tool_calls: z.boolean(),
  previous_response_id: z.string().nullable(),
  reasoning: z.object({ effort: z.null(), summary: z.null() }),
  store: z.boolean(),
  temperature: z.number(),
  text: z.object({ format: z.looseObject({ type: z.string() }) }),
  tool_choice: z.unknown(),
  tools: z.array(z.unknown()),
  top_p: z.number(),
  truncation: z.literal('disabled'),
  usage: z
    .object({
      input_tokens: count,
      input_tokens_details: z.object({ cached_tokens: count, cache_write_tokens: count }),
      output_tokens: count,
      output_tokens_details: z.object({ reasoning_tokens: count }),
      total_tokens: count,
    })
    .optional(),
  user: z.string().optional(),
});

const eventHead = { sequence_number: count };
const itemPlace = { ...eventHead, output_index: count };
const ofItem = { ...itemPlace, item_id: z.string() };
const partPlace = { ...ofItem, content_index: count };

const responseStand = <T extends string>(type: T) =>
  z.object({ ...eventHead, type: z.literal(type), response });

export const responseEvent = z.discriminatedUnion('type', [
  responseStand('response.created'),
  responseStand('response.in_progress'),
  responseStand('response.completed'),
  responseStand('response.incomplete'),
  responseStand('response.failed'),
  z.object({ ...itemPlace, type: z.literal('response.output_item.added'), item: outputItem }),
  z.object({ ...itemPlace, type: z.literal('response.output_item.done'), item: outputItem }),
  z.object({ ...partPlace, type: z.literal('response.content_part.added'), part: outputText }),
  z.object({ ...partPlace, type: z.literal('response.content_part.done'), part: outputText }),
  z.object({
    ...{ ...partPlace, type: z.literal('response.output_text.delta') },
    ...{ delta: z.string(), logprobs: z.array(z.never()) },
  }),
  z.object({
    ...{ ...partPlace, type: z.literal('response.output_text.done') },
    ...{ text: z.string(), logprobs: z.array(z.never()) },
  }),
  z.object({
    ...ofItem,
    type: z.literal('response.function_call_arguments.delta'),
    delta: z.string(),
  }),
  z.object({
    ...ofItem,
    type: z.literal('response.function_call_arguments.done'),
    name: z.string(),
    arguments: z.string(),
  }),
]);

export const deleted = z.object({ id: z.string(), object: z.string(), deleted: z.literal(true) });

export const modelObject = z.object({
  id: z.string(),
  object: z.literal('model'),
  created: seconds,
  owned_by: z.string(),
  max_model_len: count,
});

export const modelList = z.object({ object: z.literal('list'), data: z.array(modelObject) });

export const tokenized = z.object({
  tokens: z.array(count),
  count,
  max_model_len: count,
  token_strs: z.array(z.string()),
});

export const detokenized = z.object({ prompt: z.string() });

export const fileObject = z.object({
  id: z.string(),
  object: z.literal('file'),
  bytes: count,
  created_at: seconds,
  expires_at: seconds.optional(),
  filename: z.string(),
  purpose: z.enum(['batch', 'batch_output']),
  status: z.literal('processed'),
});

const listOf = <T extends z.ZodType>(item: T) =>
  z.object({
    object: z.literal('list'),
    data: z.array(item),
    first_id: z.string().nullable(),
    last_id: z.string().nullable(),
    has_more: z.boolean(),
  });

export const fileList = listOf(fileObject);

const batchStatuses = [
  ...(['validating', 'failed', 'in_progress', 'finalizing'] as const),
  ...(['completed', 'expired', 'cancelling', 'cancelled'] as const),
] as const satisfies readonly BatchStatus[];

const atSeconds = seconds.optional();

export const batchObject = z.object({
  id: z.string(),
  object: z.literal('batch'),
  endpoint: z.string(),
  model: z.string().optional(),
  errors: z
    .object({
      object: z.literal('list'),
      data: z.array(
        z.object({
          code: z.string(),
          message: z.string(),
          param: z.string().nullable(),
          line: z.number().int().nullable(),
        }),
      ),
    })
    .optional(),
  input_file_id: z.string(),
  completion_window: z.string(),
  status: z.enum(batchStatuses),
  output_file_id: z.string().optional(),
  error_file_id: z.string().optional(),
  created_at: seconds,
  expires_at: seconds,
  in_progress_at: atSeconds,
  finalizing_at: atSeconds,
  completed_at: atSeconds,
  failed_at: atSeconds,
  expired_at: atSeconds,
  cancelling_at: atSeconds,
  cancelled_at: atSeconds,
  request_counts: z.object({ total: count, completed: count, failed: count }),
  usage: z.object({
    input_tokens: count,
    input_tokens_details: z.object({ cached_tokens: count }),
    output_tokens: count,
    output_tokens_details: z.object({ reasoning_tokens: count }),
    total_tokens: count,
  }),
  metadata: z.record(z.string(), z.string()).nullable(),
});

export const batchList = listOf(batchObject);

export const jobObject = z.object({
  id: z.string(),
  object: z.literal('job'),
  status: z.enum(['waiting', 'active', 'completed', 'failed', 'cancelled', 'expired']),
  model: z.string(),
  created_at: seconds,
  priority: z.number().int(),
  deadline_at: seconds.nullable(),
  finish_reason: completionReason.nullable(),
  usage: usage.nullable(),
  error: z.object({ code: z.string(), message: z.string() }).nullable(),
});

export const health = z.object({ status: z.literal('ok'), engines: count.optional() });
