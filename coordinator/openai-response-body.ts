/** The bodies of responses, and the events of their streams. */
import type { FinishReason, Usage } from './request.js';
import type { ResponseRecord } from './store-responses.js';

/** How far a response is. */
export type ResponseStand =
  | { readonly kind: 'running' }
  | {
      readonly kind: 'ended';
      readonly text: string;
      readonly finishReason: FinishReason;
      readonly usage: Usage;
    }
  | { readonly kind: 'failed'; readonly message: string };

type Head = Pick<ResponseRecord, 'id' | 'createdS' | 'echoed'>;

export const newResponseId = (jobId: string): string => `resp_${jobId.replace(/^job_/, '')}`;

const messageIdOf = ({ id }: Head): string => id.replace(/^resp_/, 'msg_');

const textPart = (text: string) => ({
  ...{ type: 'output_text', text, annotations: [], logprobs: [] },
});

const itemOf = (head: Head, status: string, content: readonly unknown[]) => ({
  ...{ id: messageIdOf(head), type: 'message', role: 'assistant', status, content },
});

const statusOf = (stand: ResponseStand): string =>
  stand.kind === 'running'
    ? 'in_progress'
    : stand.kind === 'failed'
      ? 'failed'
      : stand.finishReason === 'length'
        ? 'incomplete'
        : 'completed';

export function responseBodyOf(head: Head, stand: ResponseStand) {
  const status = statusOf(stand);
  return {
    id: head.id,
    object: 'response',
    created_at: head.createdS,
    status,
    background: false,
    error: stand.kind === 'failed' ? { code: 'server_error', message: stand.message } : null,
    incomplete_details: status === 'incomplete' ? { reason: 'max_output_tokens' } : null,
    output: stand.kind === 'ended' ? [itemOf(head, status, [textPart(stand.text)])] : [],
    parallel_tool_calls: true,
    reasoning: { effort: null, summary: null },
    tool_choice: 'auto',
    tools: [],
    truncation: 'disabled',
    ...(stand.kind === 'ended' ? { usage: usageOf(stand.usage) } : {}),
    ...head.echoed,
  };
}

const usageOf = ({ promptTokens, completionTokens, cachedTokens }: Usage) => ({
  input_tokens: promptTokens,
  input_tokens_details: { cached_tokens: cachedTokens ?? 0, cache_write_tokens: 0 },
  output_tokens: completionTokens,
  output_tokens_details: { reasoning_tokens: 0 },
  total_tokens: promptTokens + completionTokens,
});

/** The events of one response in their order: each names its type and its number. */
export class ResponseEvents {
  readonly #head: Head;
  #number = 0;
  #text = '';

  constructor(head: Head) {
    this.#head = head;
  }

  start() {
    const response = responseBodyOf(this.#head, { kind: 'running' });
    return [
      this.#event('response.created', { response }),
      this.#event('response.in_progress', { response }),
      this.#event('response.output_item.added', {
        output_index: 0,
        item: itemOf(this.#head, 'in_progress', []),
      }),
      this.#event('response.content_part.added', { ...this.#place(), part: textPart('') }),
    ];
  }

  delta(text: string) {
    this.#text += text;
    return this.#event('response.output_text.delta', {
      ...{ ...this.#place(), delta: text, logprobs: [] },
    });
  }

  end(finishReason: FinishReason, usage: Usage) {
    const text = this.#text;
    const stand: ResponseStand = { kind: 'ended', text, finishReason, usage };
    const status = statusOf(stand);
    return [
      this.#event('response.output_text.done', { ...this.#place(), text, logprobs: [] }),
      this.#event('response.content_part.done', { ...this.#place(), part: textPart(text) }),
      this.#event('response.output_item.done', {
        output_index: 0,
        item: itemOf(this.#head, status, [textPart(text)]),
      }),
      this.#event(`response.${status}`, { response: responseBodyOf(this.#head, stand) }),
    ];
  }

  fail(message: string) {
    const response = responseBodyOf(this.#head, { kind: 'failed', message });
    return this.#event('response.failed', { response });
  }

  #place() {
    return { item_id: messageIdOf(this.#head), output_index: 0, content_index: 0 };
  }

  #event(type: string, fields: object) {
    const event = { type, sequence_number: this.#number, ...fields };
    this.#number += 1;
    return event;
  }
}
