/** OpenAI's response bodies, stream chunks and errors. */
import type { Tokenizer } from '../model/tokenizer.js';
import { errorTable, type CaravanError } from '../proto/errors.js';
import type { ChoicePiece } from './choice.js';
import { chatLogprobs, completionLogprobs } from './openai-logprobs.js';
import { callBodies, deltaBody, shownReason } from './openai-calls.js';
import type { KnownJob } from './awaited-jobs.js';
import type { FinishReason, ModelCard, Request, Usage } from './request.js';

/** The two shapes of an answer: a chat's message or a completion's text. */
export type AnswerKind = 'chat' | 'completion';

/** What all bodies of one answer have in common. */
export interface AnswerHead {
  readonly kind: AnswerKind;
  readonly jobId: string;
  readonly createdS: number;
  readonly request: Request;
  /** As it was submitted, to be submitted again should Redis lose it while somebody waits. */
  readonly known?: KnownJob;
  readonly tokenizer: Tokenizer;
}

/** One choice of an answer, whole or a piece of it. */
export interface ShownChoice extends ChoicePiece {
  readonly index: number;
  readonly finishReason: FinishReason | null;
  /** Calls of tools that have begun. */
  readonly callCount?: number;
}

const idOf = ({ kind, jobId }: AnswerHead): string =>
  `${kind === 'chat' ? 'chatcmpl' : 'cmpl'}-${jobId.replace(/^job_/, '')}`;

export const usageBody = ({ promptTokens, completionTokens, cachedTokens }: Usage) => ({
  prompt_tokens: promptTokens,
  completion_tokens: completionTokens,
  total_tokens: promptTokens + completionTokens,
  prompt_tokens_details: { cached_tokens: cachedTokens ?? 0 },
});

function logprobsOf({ kind, request, tokenizer }: AnswerHead, { tokens }: ChoicePiece) {
  if (request.logprobs === undefined) return null;
  return kind === 'chat' ? chatLogprobs(tokens, tokenizer) : completionLogprobs(tokens, tokenizer);
}

/** The message of a chat: its text, or the calls that the text makes. */
function messageBody({ jobId, request }: AnswerHead, { text, index }: ShownChoice) {
  const message = { role: 'assistant', content: text, refusal: null };
  const { grammar } = request;
  if (grammar?.kind !== 'calls') return message;
  const { content, calls } = callBodies(jobId, index, text, grammar.style);
  return calls.length === 0 ? message : { ...message, content, tool_calls: calls };
}

/** The whole answer, not streamed. */
export function answerBody(head: AnswerHead, choices: readonly ShownChoice[], usage: Usage) {
  return {
    id: idOf(head),
    object: head.kind === 'chat' ? 'chat.completion' : 'text_completion',
    created: head.createdS,
    model: head.request.model,
    choices: choices.map((choice) => ({
      index: choice.index,
      ...(head.kind === 'chat' ? { message: messageBody(head, choice) } : { text: choice.text }),
      logprobs: logprobsOf(head, choice),
      finish_reason: shownReason(head.kind, choice),
    })),
    usage: usageBody(usage),
  };
}

/** One event of a stream. `isFirst` names the role in a chat. */
export function chunkBody(
  head: AnswerHead,
  choice: ShownChoice,
  { isFirst }: { isFirst: boolean } = { isFirst: false },
) {
  const { text, tokens, index } = choice;
  const delta = {
    ...(isFirst ? { role: 'assistant' } : {}),
    ...(choice.deltas === undefined
      ? text === '' && !isFirst
        ? {}
        : { content: text }
      : deltaBody(head.jobId, index, choice.deltas)),
  };
  return {
    ...chunkHead(head),
    choices: [
      {
        index,
        ...(head.kind === 'chat' ? { delta } : { text }),
        logprobs: tokens.length > 0 ? logprobsOf(head, choice) : null,
        finish_reason: shownReason(head.kind, choice),
      },
    ],
  };
}

const chunkHead = (head: AnswerHead) => ({
  id: idOf(head),
  object: head.kind === 'chat' ? 'chat.completion.chunk' : 'text_completion',
  created: head.createdS,
  model: head.request.model,
});

/** The last event of a stream whose client asked for usage. */
export const usageChunkBody = (head: AnswerHead, usage: Usage) => ({
  ...chunkHead(head),
  choices: [],
  usage: usageBody(usage),
});

/** An error as OpenAI's clients expect it. */
export function errorBody(error: CaravanError) {
  const { http } = errorTable[error.code];
  const type =
    http === 429 ? 'rate_limit_error' : http < 500 ? 'invalid_request_error' : 'server_error';
  return { error: { message: error.message, type, param: error.param, code: error.code } };
}

export const modelBody = (card: ModelCard) => ({
  id: card.name,
  object: 'model',
  created: card.createdS,
  owned_by: 'caravan',
  max_model_len: card.maxSeqLen,
});
