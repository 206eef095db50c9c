/** The endpoints that generate, by path: how a body becomes a Request, and which shape its answer has. */
import { parseChat, parseCompletion, type Asked, type ServedModel } from './openai.js';
import type { AnswerKind } from './openai-answer.js';

export interface Endpoint {
  readonly kind: AnswerKind;
  /** @throws CaravanError `invalid_request` with the field as `param`, `context_length_exceeded`. */
  readonly parse: (body: unknown, model: ServedModel) => Asked;
}

export const endpoints: Readonly<Record<string, Endpoint>> = {
  '/v1/chat/completions': { kind: 'chat', parse: parseChat },
  '/v1/completions': { kind: 'completion', parse: parseCompletion },
};
