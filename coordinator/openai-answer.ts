/** OpenAI's response bodies, stream chunks and errors. */
import { errorTable, type CaravanError } from '../proto/errors.js';
import type { FinishReason, ModelCard, Usage } from './request.js';

/** The two shapes of an answer: a chat's message or a completion's text. */
export type AnswerKind = 'chat' | 'completion';

/** What all bodies of one answer have in common. */
export interface AnswerHead {
  readonly kind: AnswerKind;
  readonly jobId: string;
  readonly model: string;
  readonly createdS: number;
}

const idOf = ({ kind, jobId }: AnswerHead): string =>
  `${kind === 'chat' ? 'chatcmpl' : 'cmpl'}-${jobId.replace(/^job_/, '')}`;

export const usageBody = ({ promptTokens, completionTokens }: Usage) => ({
  prompt_tokens: promptTokens,
  completion_tokens: completionTokens,
  total_tokens: promptTokens + completionTokens,
});

/** The whole answer, not streamed. */
export function answerBody(
  head: AnswerHead,
  text: string,
  finishReason: FinishReason,
  usage: Usage,
) {
  const choice =
    head.kind === 'chat'
      ? { message: { role: 'assistant', content: text, refusal: null } }
      : { text };
  return {
    id: idOf(head),
    object: head.kind === 'chat' ? 'chat.completion' : 'text_completion',
    created: head.createdS,
    model: head.model,
    choices: [{ index: 0, ...choice, logprobs: null, finish_reason: finishReason }],
    usage: usageBody(usage),
  };
}

/** One event of a stream. `isFirst` names the role in a chat. */
export function chunkBody(
  head: AnswerHead,
  text: string,
  finishReason: FinishReason | null,
  isFirst: boolean,
) {
  const delta = {
    ...(isFirst ? { role: 'assistant' } : {}),
    ...(text === '' && !isFirst ? {} : { content: text }),
  };
  return {
    id: idOf(head),
    object: head.kind === 'chat' ? 'chat.completion.chunk' : 'text_completion',
    created: head.createdS,
    model: head.model,
    choices: [
      {
        index: 0,
        ...(head.kind === 'chat' ? { delta } : { text }),
        logprobs: null,
        finish_reason: finishReason,
      },
    ],
  };
}

/** The last event of a stream whose client asked for usage. */
export const usageChunkBody = (head: AnswerHead, usage: Usage) => ({
  ...chunkBody(head, '', null, false),
  choices: [],
  usage: usageBody(usage),
});

/** An error as OpenAI's clients expect it. */
export function errorBody(error: CaravanError) {
  const { http } = errorTable[error.code];
  const type =
    http === 401
      ? 'authentication_error'
      : http === 429
        ? 'rate_limit_error'
        : http < 500
          ? 'invalid_request_error'
          : 'server_error';
  return { error: { message: error.message, type, param: error.param, code: error.code } };
}

export const modelBody = (card: ModelCard) => ({
  id: card.name,
  object: 'model',
  created: card.createdS,
  owned_by: 'caravan',
  max_model_len: card.maxSeqLen,
});
