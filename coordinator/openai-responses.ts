/** POST /v1/responses: OpenAI's body, turned into that of a chat. */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { parseChat, seedField, type Asked, type ServedModel } from './openai.js';
import { parseBody, refuse } from './openai-refusal.js';
import { functionFields } from './openai-tools.js';
import type { ResponseMessage } from './store-responses.js';

const part = z.object({ type: z.enum(['input_text', 'output_text']), text: z.string() });
const said = z.union([z.string(), z.array(part).min(1)], {
  error: 'must be a string, or an array of parts of type input_text or output_text',
});

const message = z.object({
  type: z.literal('message').nullish(),
  role: z.enum(['user', 'assistant', 'system', 'developer']),
  content: said,
});

const functionCall = z.object({
  type: z.literal('function_call'),
  call_id: z.string().min(1),
  name: functionFields.name,
  arguments: z.string(),
});

const functionCallOutput = z.object({
  type: z.literal('function_call_output'),
  call_id: z.string().min(1),
  output: said,
});

const tool = z.object({
  type: z.literal('function', { error: 'must be function: other tools are not supported' }),
  ...functionFields,
});

export const responseBody = z.object({
  model: z.string().nullish(),
  input: z.union(
    [z.string(), z.array(z.union([message, functionCall, functionCallOutput])).min(1)],
    {
      error: 'must be a string, or an array of messages of text, function calls and their outputs',
    },
  ),
  instructions: z.string().nullish(),
  previous_response_id: z.string().nullish(),
  store: z.boolean().nullish(),
  stream: z.boolean().nullish(),
  max_output_tokens: z.number().int().min(1).nullish(),
  temperature: z.number().min(0).max(2).nullish(),
  top_p: z.number().gt(0).max(1).nullish(),
  seed: seedField.nullish(),
  metadata: z.record(z.string(), z.string()).nullish(),
  user: z.string().nullish(),
  background: z.literal(false, { error: 'answers in the background are not supported' }).nullish(),
  conversation: z
    .null({ error: 'conversations are not kept: previous_response_id continues a response' })
    .optional(),
  prompt: z.null({ error: 'there are no stored prompts' }).optional(),
  text: z
    .object({
      format: z.looseObject({ type: z.enum(['text', 'json_object', 'json_schema']) }).nullish(),
    })
    .nullish(),
  tools: z.array(tool).nullish(),
  tool_choice: z
    .union(
      [
        z.enum(['none', 'auto', 'required']),
        z.object({ type: z.literal('function'), name: z.string() }),
      ],
      { error: 'must be none, auto, required, or {"type": "function", "name"}' },
    )
    .nullish(),
  parallel_tool_calls: z.boolean().nullish(),
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
export const parseResponseBody = (body: unknown): ResponseBody => parseBody(responseBody, body);

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
  const messages = messagesOf(body.input, earlier);
  const system = body.instructions == null ? [] : [{ role: 'system', content: body.instructions }];
  const format = body.text?.format ?? { type: 'text' as const };
  const { tools, tool_choice: choice } = body;
  const chat = {
    messages: [...system, ...messages],
    stream: body.stream,
    max_completion_tokens: body.max_output_tokens,
    temperature: body.temperature,
    top_p: body.top_p,
    seed: body.seed,
    response_format:
      format.type === 'json_schema'
        ? { type: 'json_schema', json_schema: { ...format, type: undefined } }
        : { type: format.type },
    tools: tools?.map(({ type, ...called }) => ({ type, function: called })),
    tool_choice:
      typeof choice === 'object' && choice !== null
        ? { type: choice.type, function: { name: choice.name } }
        : choice,
    parallel_tool_calls: body.parallel_tool_calls,
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
      tools: (tools ?? []).map((each) => ({
        ...{ type: each.type, name: each.name, description: each.description ?? null },
        // Arguments fit their schema in any case.
        ...{ parameters: each.parameters ?? null, strict: each.strict ?? true },
      })),
      tool_choice: choice ?? 'auto',
      parallel_tool_calls: body.parallel_tool_calls ?? true,
      ...(body.user == null ? {} : { user: body.user }),
    },
  };
}

const textOf = (content: z.infer<typeof said>): string =>
  typeof content === 'string' ? content : content.map(({ text }) => text).join('');

/** Items as messages of a chat, after those of earlier responses: calls belong to what the assistant said before them. */
function messagesOf(
  input: ResponseBody['input'],
  earlier: readonly ResponseMessage[],
): ResponseMessage[] {
  const messages = [...earlier];
  if (typeof input === 'string') return [...messages, { role: 'user', content: input }];
  for (const item of input) {
    if (item.type === 'function_call') {
      const { call_id: id, name, arguments: given } = item;
      const call = { id, type: 'function' as const, function: { name, arguments: given } };
      const last = messages.at(-1);
      if (last?.role !== 'assistant') {
        messages.push({ role: 'assistant', content: null, tool_calls: [call] });
      } else {
        messages.splice(-1, 1, { ...last, tool_calls: [...(last.tool_calls ?? []), call] });
      }
    } else if (item.type === 'function_call_output') {
      const { call_id: id, output } = item;
      const isKnown = messages.some((each) => each.tool_calls?.some((call) => call.id === id));
      if (!isKnown)
        refuse('input', `there is no function call ${id} that this could be the output of`);
      messages.push({ role: 'tool', content: textOf(output), tool_call_id: id });
    } else {
      const { role, content } = item;
      messages.push({ role: role === 'developer' ? 'system' : role, content: textOf(content) });
    }
  }
  return messages;
}

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
