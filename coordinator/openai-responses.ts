/** POST /v1/responses: OpenAI's body, turned into that of a chat. */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { parseChat, type Asked, type ServedModel } from './openai.js';
import { parseBody, refuse } from './openai-refusal.js';
import type { ResponseMessage } from './store-responses.js';

const part = z.object({ type: z.enum(['input_text', 'output_text']), text: z.string() });

const message = z.object({
  type: z.literal('message').nullish(),
  role: z.enum(['user', 'assistant', 'system', 'developer']),
  content: z.union([z.string(), z.array(part).min(1)], {
    error: 'must be a string, or an array of parts of type input_text or output_text',
  }),
});

export const responseBody = z.object({
  model: z.string().nullish(),
  input: z.union([z.string(), z.array(message).min(1)], {
    error: 'must be a string, or an array of messages of text',
  }),
  instructions: z.string().nullish(),
  previous_response_id: z.string().nullish(),
  store: z.boolean().nullish(),
  stream: z.boolean().nullish(),
  max_output_tokens: z.number().int().min(1).nullish(),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().gt(0).max(1).nullish(),
  metadata: z.record(z.string(), z.string()).nullish(),
  user: z.string().nullish(),
  background: z.literal(false, { error: 'answers in the background are not supported' }).nullish(),
  text: z
    .object({
      format: z.looseObject({ type: z.enum(['text', 'json_object', 'json_schema']) }).nullish(),
    })
    .nullish(),
});

/** What a body asks, before the conversation that it continues is known. */
export type ResponseBody = z.infer<typeof responseBody>;

export interface AskedResponse {
  readonly asked: Asked;
  /** The whole conversation, without instructions. */
  readonly messages: readonly ResponseMessage[];
  /** Fields of the response that repeat the request. */
  readonly echoed: Readonly<Record<string, unknown>>;
}

/** @throws CaravanError `invalid_request` with the field as `param`. */
export function parseResponseBody(body: unknown): ResponseBody {
  const { tools } = body as { tools?: unknown };
  if (Array.isArray(tools) && tools.length > 0) {
    refuse('tools', 'are taken by /v1/chat/completions, not by /v1/responses');
  }
  return parseBody(responseBody, body);
}

/** The field of a chat's body, as a response's body names it. */
const fieldNames: Readonly<Record<string, string>> = {
  messages: 'input',
  response_format: 'text.format',
};

/** @param earlier the conversation of `previous_response_id`, its answer included. */
export function askResponse(
  body: ResponseBody,
  earlier: readonly ResponseMessage[],
  model: ServedModel,
): AskedResponse {
  const messages = [...earlier, ...messagesOf(body.input)];
  const system = body.instructions == null ? [] : [{ role: 'system', content: body.instructions }];
  const format = body.text?.format ?? { type: 'text' as const };
  const chat = {
    messages: [...system, ...messages],
    stream: body.stream,
    max_completion_tokens: body.max_output_tokens,
    temperature: body.temperature,
    top_p: body.top_p,
    response_format:
      format.type === 'json_schema'
        ? { type: 'json_schema', json_schema: { ...format, type: undefined } }
        : { type: format.type },
  };
  const asked = renamed(() => parseChat(chat, model));
  const { temperature, topP } = asked.request.sampling;
  return {
    asked,
    messages,
    echoed: {
      instructions: body.instructions ?? null,
      max_output_tokens: body.max_output_tokens ?? null,
      model: model.card.name,
      previous_response_id: body.previous_response_id ?? null,
      store: body.store ?? true,
      temperature,
      top_p: topP,
      text: { format },
      metadata: body.metadata ?? {},
      ...(body.user == null ? {} : { user: body.user }),
    },
  };
}

const messagesOf = (input: ResponseBody['input']): ResponseMessage[] =>
  typeof input === 'string'
    ? [{ role: 'user', content: input }]
    : input.map(({ role, content }) => ({
        role: role === 'developer' ? 'system' : role,
        content: typeof content === 'string' ? content : content.map(({ text }) => text).join(''),
      }));

/** Refusals of a chat's fields under the names that the client used. */
function renamed<T>(parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    if (!(error instanceof CaravanError) || error.param === null) throw error;
    const [head = '', ...rest] = error.param.split('.');
    const name = fieldNames[head];
    if (name === undefined) throw error;
    const param = [name, ...rest].join('.');
    throw new CaravanError(error.code, error.message.replace(error.param, param), {
      param,
      cause: error,
    });
  }
}
