/**
 * OpenAI's request bodies, turned into a Request or refused. Nothing that a client asks for is passed over in
 * silence: what we do not do yet is a 400 that says so. Fields that OpenAI does not know are ignored, as
 * OpenAI does.
 */
import { randomInt } from 'node:crypto';
import { z } from 'zod';
import type { ChatTemplate } from '../model/chat-template.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import type { CallsSpec, GrammarCache } from './grammar.js';
import { spokenMessages } from './openai-messages.js';
import { asObject, parseBody, refuse } from './openai-refusal.js';
import { promptField, promptsOf } from './openai-prompts.js';
import { grammarOf, shapeFields } from './openai-shape.js';
import { termFields, termsOfBody } from './openai-terms.js';
import {
  foldTools,
  offeredTools,
  toTemplate,
  toolFields,
  toolMessageFields,
} from './openai-tools.js';
import {
  MAX_LOGPROBS,
  MAX_SEQUENCES,
  temperatureOf,
  type JobTerms,
  type ModelCard,
  type Prompt,
  type Request,
  type Sampling,
} from './request.js';

/** A model that can be asked: its card, its tokenizer and its way of chatting. */
export interface ServedModel {
  readonly card: ModelCard;
  readonly tokenizer: Tokenizer;
  readonly chat: ChatTemplate;
  /** Shapes of answers that were asked for, compiled. */
  readonly grammars: GrammarCache;
}

/** What a body asks for, besides the Request itself. */
export interface Asked {
  readonly request: Request;
  readonly terms: JobTerms;
  readonly isStream: boolean;
  readonly includesUsage: boolean;
}

const MAX_STOPS = 16;
const MAX_STOP_CHARACTERS = 1000;

/** A field that may be left out or null, as OpenAI's clients send it. */
const maybe = <T extends z.ZodType>(schema: T) => schema.nullish();

const stopText = z.string().min(1).max(MAX_STOP_CHARACTERS);

/** 64 bits, as OpenAI's; JSON keeps 53 of them where there are more. */
export const seedField = z
  .number()
  .min(-(2 ** 63))
  .max(2 ** 63)
  .refine(Number.isInteger, { error: 'must be a whole number' });

/** Who is told of the end; of batches too. */
export const webhookField = z.object({ url: z.string() });

const common = {
  ...shapeFields,
  model: maybe(z.string()),
  stream: maybe(z.boolean()),
  stream_options: maybe(z.object({ include_usage: maybe(z.boolean()) })),
  temperature: maybe(z.number().min(0).max(2)),
  top_p: maybe(z.number().gt(0).max(1)),
  top_k: maybe(z.number().int().min(-1)),
  min_p: maybe(z.number().min(0).max(1)),
  presence_penalty: maybe(z.number().min(-2).max(2)),
  frequency_penalty: maybe(z.number().min(-2).max(2)),
  repetition_penalty: maybe(z.number().gt(0).max(10)),
  logit_bias: maybe(z.record(z.string().regex(/^\d{1,9}$/), z.number().min(-100).max(100))),
  seed: maybe(seedField),
  stop: maybe(
    z.union([stopText, z.array(stopText).max(MAX_STOPS)], {
      error: `must be a text, or at most ${MAX_STOPS}, of 1 to ${MAX_STOP_CHARACTERS} characters each`,
    }),
  ),
  ignore_eos: maybe(z.boolean()),
  n: maybe(z.number().int().min(1).max(MAX_SEQUENCES)),
  user: maybe(z.string()),
  ...termFields,
  webhook: maybe(webhookField),
};

const textPart = z.object({ type: z.literal('text'), text: z.string() });

export const chatBody = z.object({
  ...common,
  ...toolFields,
  messages: z
    .array(
      z
        .object({
          role: z.string(),
          content: maybe(
            z.union([z.string(), z.array(textPart).min(1)], {
              error: 'must be a string, or an array of parts of type text',
            }),
          ),
          ...toolMessageFields,
        })
        .refine(({ content, tool_calls: calls }) => content != null || calls != null, {
          path: ['content'],
          error: 'must be a string, or an array of parts of type text',
        }),
    )
    .min(1),
  max_tokens: maybe(z.number().int().min(1)),
  max_completion_tokens: maybe(z.number().int().min(1)),
  logprobs: maybe(z.boolean()),
  top_logprobs: maybe(z.number().int().min(0).max(MAX_LOGPROBS)),
});

export const completionBody = z.object({
  ...common,
  prompt: maybe(promptField),
  // None at all only looks at the prompt, for its logprobs.
  max_tokens: maybe(z.number().int().min(0)),
  best_of: maybe(z.number().int().min(1).max(MAX_SEQUENCES)),
  logprobs: maybe(z.number().int().min(0).max(MAX_LOGPROBS)),
  echo: maybe(z.boolean()),
});

type Common = z.infer<typeof chatBody> | z.infer<typeof completionBody>;

const isOff = (value: unknown): boolean => value === undefined || value === null || value === false;

/** Fields that OpenAI knows and this release does not: the values that ask for nothing. */
const unsupported: Readonly<Record<string, (value: unknown) => boolean>> = {
  functions: (value) => isOff(value) || isEmpty(value),
  function_call: (value) => isOff(value) || value === 'none' || value === 'auto',
  modalities: (value) => isOff(value) || JSON.stringify(value) === '["text"]',
  audio: isOff,
};

const isEmpty = (value: unknown): boolean =>
  typeof value === 'object' && value !== null && Object.keys(value).length === 0;

/** The model that a body names, if it names one. @throws CaravanError `invalid_request`. */
export function modelNameOf(body: unknown): string | null {
  const { model } = asObject(body);
  if (model === undefined || model === null) return null;
  return typeof model === 'string' ? model : refuse('model', 'must be a string');
}

/**
 * POST /v1/chat/completions.
 *
 * @throws CaravanError `invalid_request` with the field as `param`, `context_length_exceeded`.
 */
export function parseChat(body: unknown, model: ServedModel): Asked {
  const parsed = parse(chatBody, body);
  const messages = spokenMessages(
    parsed.messages.map(({ content, ...message }) => ({
      ...message,
      content: Array.isArray(content)
        ? content.map(({ text }) => text).join('')
        : (content ?? null),
    })),
  );
  const { chat } = model;
  const offered = offeredTools(parsed, chat.tagsCalls === true ? 'tags' : 'array');
  const promptTokenIds = chat.knowsTools
    ? chat.render(toTemplate(messages), { tools: offered?.tools ?? [] })
    : chat.render(foldTools(messages, offered));
  const maxTokens = parsed.max_completion_tokens ?? parsed.max_tokens;
  if (parsed.top_logprobs != null && parsed.logprobs !== true) {
    refuse('top_logprobs', 'needs logprobs to be true');
  }
  const prompt = { promptTokenIds, isTextStart: model.tokenizer.addsFirstSpace };
  return finish(parsed, model, [prompt], 'messages', {
    maxTokens: maxTokens ?? null,
    calls: offered?.grammar,
    answers: {
      ...severalOf(parsed.n ?? 1, null, 1),
      ...(parsed.logprobs === true ? { logprobs: parsed.top_logprobs ?? 0 } : {}),
    },
  });
}

/** POST /v1/completions. @throws CaravanError as parseChat. */
export function parseCompletion(body: unknown, model: ServedModel): Asked {
  const parsed = parse(completionBody, body);
  const { suffix } = body as { suffix?: unknown };
  if (!isOff(suffix) && suffix !== '') {
    refuse('suffix', 'models of this kind continue a text and cannot fill in before a suffix');
  }
  const prompts = promptsOf(parsed.prompt ?? '', model);
  const { best_of: bestOf, stream, logprobs, echo } = parsed;
  const several = severalOf(parsed.n ?? 1, bestOf ?? null, prompts.length);
  if (several.bestOf !== undefined && stream === true) {
    refuse('best_of', `${several.bestOf} answers cannot be compared while they are streamed`);
  }
  return finish(parsed, model, prompts, 'prompt', {
    maxTokens: parsed.max_tokens ?? null,
    answers: {
      ...several,
      ...(logprobs == null ? {} : { logprobs }),
      ...(echo === true ? { echo } : {}),
    },
  });
}

/** What a request asks for besides one plain answer; each left out where it does not. */
type Answers = Pick<Request, 'n' | 'bestOf' | 'logprobs' | 'echo'>;

/** What bodies of chats and completions say in ways of their own. */
interface Wishes {
  readonly maxTokens: number | null;
  readonly answers: Answers;
  /** The tools that the answer may call. */
  readonly calls?: CallsSpec | undefined;
}

function severalOf(
  n: number,
  bestOf: number | null,
  prompts: number,
): Pick<Answers, 'n' | 'bestOf'> {
  if (bestOf !== null && bestOf < n) refuse('best_of', `${bestOf} is less than n, ${n}`);
  const sequences = (bestOf ?? n) * prompts;
  if (sequences > MAX_SEQUENCES) {
    refuse(
      bestOf === null ? 'n' : 'best_of',
      `${sequences} answers to ${prompts} prompts; at most ${MAX_SEQUENCES} are generated`,
    );
  }
  return { ...(n > 1 ? { n } : {}), ...(bestOf !== null && bestOf > n ? { bestOf } : {}) };
}

function parse<T extends z.ZodType>(schema: T, body: unknown): z.infer<T> {
  modelNameOf(body);
  for (const [field, asksNothing] of Object.entries(unsupported)) {
    const value = (body as Record<string, unknown>)[field];
    if (!asksNothing(value)) refuse(field, `${JSON.stringify(value)} is not supported yet`);
  }
  return parseBody(schema, body);
}

function finish(
  body: Common,
  { card, grammars }: ServedModel,
  prompts: readonly [Prompt, ...Prompt[]],
  field: 'messages' | 'prompt',
  { maxTokens, answers, calls }: Wishes,
): Asked {
  const [first, ...others] = prompts;
  const longest = Math.max(...prompts.map(({ promptTokenIds }) => promptTokenIds.length));
  const room = card.maxSeqLen - longest;
  if (room < 1) {
    throw new CaravanError(
      'context_length_exceeded',
      `${field}: has ${longest} tokens, and the context of ${card.maxSeqLen} ` +
        `must hold at least one more`,
      { param: field },
    );
  }
  const stop = typeof body.stop === 'string' ? [body.stop] : (body.stop ?? []);
  const ignoreEos = body.ignore_eos ?? false;
  const grammar = grammarOf(body, grammars, { stop, ignoreEos }, calls);
  return {
    request: {
      version: 1,
      model: card.name,
      ...first,
      ...(others.length > 0 ? { otherPrompts: others } : {}),
      ...answers,
      sampling: {
        temperature: temperatureOf(body.temperature ?? card.defaults.temperature ?? 1),
        topP: body.top_p ?? card.defaults.topP ?? 1,
        // vLLM's clients say -1 for all.
        topK: Math.max(0, body.top_k ?? card.defaults.topK ?? 0),
        ...(body.min_p ? { minP: body.min_p } : {}),
        ...adjustmentOf(body, card),
        seed: body.seed ?? randomInt(2 ** 47),
      },
      maxTokens: maxTokens ?? wishedTokens(card, longest, room),
      stop,
      ignoreEos,
      ...(grammar === undefined ? {} : { grammar }),
    },
    terms: {
      ...termsOfBody(body),
      ...(body.webhook == null ? {} : { webhook: body.webhook }),
    },
    isStream: body.stream ?? false,
    includesUsage: body.stream_options?.include_usage ?? false,
  };
}

const MAX_BIASES = 1024;

/** Left out where the body changes no logit: such rows cost the ranks nothing. */
function adjustmentOf(body: Common, { vocabSize }: ModelCard): Pick<Sampling, 'adjustment'> {
  const biases = Object.entries(body.logit_bias ?? {})
    .map(([id, bias]) => [Number(id), bias] as const)
    .filter(([, bias]) => bias !== 0);
  if (biases.length > MAX_BIASES) {
    refuse('logit_bias', `has ${biases.length} tokens; at most ${MAX_BIASES} are taken`);
  }
  const alien = biases.find(([id]) => id >= vocabSize)?.[0];
  if (alien !== undefined) {
    refuse('logit_bias', `token id ${alien} is not below the vocabulary's ${vocabSize}`);
  }
  if (new Set(biases.map(([id]) => id)).size < biases.length) {
    refuse('logit_bias', 'names a token id twice');
  }
  const repetitionPenalty = body.repetition_penalty ?? 1;
  const presencePenalty = body.presence_penalty ?? 0;
  const frequencyPenalty = body.frequency_penalty ?? 0;
  const changesNothing = repetitionPenalty === 1 && presencePenalty === 0 && frequencyPenalty === 0;
  if (changesNothing && biases.length === 0) return {};
  return { adjustment: { repetitionPenalty, presencePenalty, frequencyPenalty, biases } };
}

/** The most tokens of an answer to a request that does not say: the model's wish, within the context. */
function wishedTokens({ defaults }: ModelCard, promptTokens: number, room: number): number {
  const { maxNewTokens, maxLength } = defaults;
  const left = (maxLength ?? 0) - promptTokens;
  return Math.min(room, maxNewTokens ?? (left > 0 ? left : room));
}
