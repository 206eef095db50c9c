/**
 * OpenAI's tools: which functions a model may call, what it is told of them, and which texts it may answer then.
 *
 * Llama 2 was never taught a format for them. Where a chat template knows no tools, the system text describes them, calls of
 * earlier turns are what the assistant said, and results are what the user said next.
 */
import { z } from 'zod';
import type { ChatMessage } from '../model/chat-template.js';
import type { GrammarSpec } from './grammar.js';
import { refuse } from './openai-refusal.js';
import type { CallStyle } from './tool-calls.js';

const MAX_TOOLS = 128;
/** Calls of one answer, where they may be several. */
const MAX_CALLS = 16;

const functionName = z
  .string()
  .regex(/^[\w-]{1,64}$/, 'must have 1 to 64 letters, digits, _ and -');

/** What is said of a function. */
export const functionFields = {
  name: functionName,
  description: z.string().nullish(),
  parameters: z.record(z.string(), z.unknown()).nullish(),
  strict: z.boolean().nullish(),
};

const tool = z.object({
  type: z.literal('function', { error: 'must be function: other tools are not supported' }),
  function: z.object(functionFields),
});

const toolCall = z.object({
  id: z.string().nullish(),
  type: z.string().nullish(),
  function: z.object({ name: functionName, arguments: z.string() }),
});

export const toolFields = {
  tools: z.array(tool).max(MAX_TOOLS).nullish(),
  tool_choice: z
    .union(
      [
        z.enum(['none', 'auto', 'required']),
        z.object({ type: z.literal('function'), function: z.object({ name: z.string() }) }),
      ],
      { error: 'must be none, auto, required, or {"type": "function", "function": {"name"}}' },
    )
    .nullish(),
  parallel_tool_calls: z.boolean().nullish(),
};

export const toolMessageFields = {
  tool_calls: z.array(toolCall).min(1).nullish(),
  tool_call_id: z.string().nullish(),
  name: z.string().nullish(),
};

export type ToolBody = z.infer<z.ZodObject<typeof toolFields>>;
export type ToolMessage = z.infer<z.ZodObject<typeof toolMessageFields>> & {
  readonly role: string;
  readonly content: string | null;
};

/** The tools that an answer may call, and the grammar of such answers; null where it may call none. */
export interface OfferedTools {
  readonly tools: NonNullable<ToolBody['tools']>;
  readonly grammar: Extract<GrammarSpec, { kind: 'calls' }>;
}

/** @throws CaravanError `invalid_request` with the field as `param`. */
export function offeredTools(body: ToolBody, style: CallStyle): OfferedTools | null {
  const { tools, tool_choice: choice } = body;
  const named = typeof choice === 'object' ? choice?.function.name : undefined;
  if (tools == null || tools.length === 0) {
    if (choice === 'required' || named !== undefined) refuse('tool_choice', 'needs tools');
    return null;
  }
  const names = tools.map((each) => each.function.name);
  const twice = names.find((name, i) => names.indexOf(name) !== i);
  if (twice !== undefined) refuse('tools', `${twice} is there twice`);
  if (named !== undefined && !names.includes(named)) {
    refuse('tool_choice', `${named} is none of the tools: ${names.join(', ')}`);
  }
  if (choice === 'none') return null;
  const callable = tools.filter((each) => named === undefined || each.function.name === named);
  const isOne = named !== undefined || body.parallel_tool_calls === false;
  return {
    tools,
    grammar: {
      kind: 'calls',
      style,
      orText: choice == null || choice === 'auto',
      calls: isOne ? 1 : MAX_CALLS,
      schema: {
        anyOf: callable.map(({ function: { name, parameters } }, i) =>
          callSchema(name, parameters, i),
        ),
      },
    },
  };
}

function callSchema(
  name: string,
  parameters: Readonly<Record<string, unknown>> | null | undefined,
  index: number,
) {
  const given = parameters ?? { properties: {} };
  const { type = 'object' } = given;
  if (type !== 'object') refuse('tools', `the parameters of ${name} must be of type object`);
  const root = `#/anyOf/${index}/properties/arguments`;
  return {
    type: 'object',
    properties: {
      name: { const: name },
      arguments: { ...rebased(given, root, name), type: 'object' },
    },
    required: ['name', 'arguments'],
    additionalProperties: false,
  };
}

const MAX_DEPTH = 128;
/** Keywords whose members are values, not schemas. */
const VALUES = ['const', 'enum', 'default', 'examples'];

/** A schema whose references to its own root lead to `root`. */
function rebased(
  schema: Readonly<Record<string, unknown>>,
  root: string,
  name: string,
): Record<string, unknown> {
  const move = (value: unknown, depth: number): unknown => {
    if (depth > MAX_DEPTH) {
      return refuse('tools', `the parameters of ${name} are more than ${MAX_DEPTH} levels deep`);
    }
    if (Array.isArray(value)) return value.map((item) => move(item, depth + 1));
    if (typeof value !== 'object' || value === null) return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, member]: [string, unknown]) => {
        const isReference = key === '$ref' && typeof member === 'string' && /^#(\/|$)/.test(member);
        if (isReference) return [key, root + member.slice(1)];
        return [key, VALUES.includes(key) ? member : move(member, depth + 1)];
      }),
    );
  };
  return move(schema, 1) as Record<string, unknown>;
}

/**
 * Messages for a template that knows no tools: what they say of tools becomes text. Results that follow each other are one
 * message of the user, together with what the user says after them.
 */
export function foldTools(
  messages: readonly ToolMessage[],
  offered: OfferedTools | null,
): ChatMessage[] {
  const names = new Map<string, string>();
  const folded: { role: string; content: string }[] = [];
  let isAfterResult = false;
  for (const { role, content, tool_calls: calls, tool_call_id: id } of messages) {
    for (const call of calls ?? []) if (call.id != null) names.set(call.id, call.function.name);
    if (calls != null) {
      const said = calls.map(
        ({ function: { name, arguments: given } }) =>
          `{"name": ${JSON.stringify(name)}, "arguments": ${given}}`,
      );
      folded.push({ role, content: `${content ?? ''}[${said.join(', ')}]` });
      isAfterResult = false;
      continue;
    }
    const text =
      role === 'tool'
        ? `Result of ${names.get(id ?? '') ?? 'the function'}: ${content ?? ''}`
        : (content ?? '');
    const previous = folded.at(-1);
    if (previous !== undefined && isAfterResult && (role === 'tool' || role === 'user')) {
      previous.content += `\n${text}`;
    } else {
      folded.push({ role: role === 'tool' ? 'user' : role, content: text });
    }
    isAfterResult = role === 'tool';
  }
  if (offered === null) return folded;
  const description = describe(offered);
  const first = folded[0];
  if (first?.role === 'system') first.content = `${first.content}\n\n${description}`;
  else folded.unshift({ role: 'system', content: description });
  return folded;
}

/** What the system text says of tools. */
function describe({ tools, grammar }: OfferedTools): string {
  const lines = tools.map(({ function: { name, description, parameters } }) =>
    JSON.stringify({
      name,
      ...(description == null ? {} : { description }),
      parameters: parameters ?? {},
    }),
  );
  const several = grammar.calls > 1 ? ', or with several such objects in the array' : '';
  return (
    `You can call these functions:\n${lines.join('\n')}\n` +
    `To call one, answer with nothing but [{"name": "…", "arguments": {…}}]${several}. ` +
    (grammar.orText ? 'Else answer in plain text.' : 'You must call one now.')
  );
}

/** Messages for a template that knows tools: arguments are values there, not texts. */
export function toTemplate(messages: readonly ToolMessage[]): ChatMessage[] {
  return messages.map(({ role, content, tool_calls: calls, tool_call_id: id, name }, i) => ({
    ...{ role, content },
    ...(name == null ? {} : { name }),
    ...(id == null ? {} : { tool_call_id: id }),
    ...(calls == null
      ? {}
      : {
          tool_calls: calls.map(({ id: callId, function: { name: called, arguments: given } }) => ({
            ...(callId == null ? {} : { id: callId }),
            type: 'function',
            function: { name: called, arguments: argumentsOf(given, i) },
          })),
        }),
  }));
}

function argumentsOf(given: string, index: number): unknown {
  try {
    return JSON.parse(given);
  } catch {
    return refuse(`messages.${index}.tool_calls`, 'the arguments are not valid JSON');
  }
}
