/** The bodies of responses, and the events of their streams. */
import { callBodies, callIdOf } from './openai-calls.js';
import type { FinishReason, Usage } from './request.js';
import type { ResponseRecord } from './store-responses.js';
import { ToolCallReader, type AnswerDelta, type CallStyle } from './tool-calls.js';

/** How far a response is. */
export type ResponseStand =
  | { readonly kind: 'running' }
  | {
      readonly kind: 'ended';
      readonly text: string;
      /** How the text calls tools; null where it may call none. */
      readonly style: CallStyle | null;
      readonly finishReason: FinishReason;
      readonly usage: Usage;
    }
  | { readonly kind: 'failed'; readonly message: string };

type Head = Pick<ResponseRecord, 'id' | 'jobId' | 'createdS' | 'echoed'>;

export const newResponseId = (jobId: string): string => `resp_${jobId.replace(/^job_/, '')}`;

const messageIdOf = ({ id }: Head): string => id.replace(/^resp_/, 'msg_');

const textPart = (text: string) => ({
  ...{ type: 'output_text', text, annotations: [], logprobs: [] },
});

const messageOf = (head: Head, status: string, content: readonly unknown[]) => ({
  ...{ id: messageIdOf(head), type: 'message', role: 'assistant', status, content },
});

interface Call {
  readonly id: string;
  readonly function: { readonly name: string; readonly arguments: string };
}

const callItemOf = ({ id, function: called }: Call, status: string) => ({
  ...{ id: id.replace(/^call_/, 'fc_'), type: 'function_call', status, call_id: id },
  ...called,
});

/** What was answered: a message, calls, or both. */
function outputOf(head: Head, { text, style }: Ended, status: string) {
  if (style === null) return [messageOf(head, status, [textPart(text)])];
  const { content, calls } = callBodies(head.jobId, 0, text, style);
  const isMessage = content !== null || calls.length === 0;
  const lastStatus = (i: number): string => (i + 1 === calls.length ? status : 'completed');
  return [
    ...(isMessage ? [messageOf(head, status, [textPart(content ?? '')])] : []),
    ...calls.map((call, i) => callItemOf(call, lastStatus(i))),
  ];
}

type Ended = Extract<ResponseStand, { kind: 'ended' }>;

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
    output: stand.kind === 'ended' ? outputOf(head, stand, status) : [],
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

/** An item of the output that is being told. */
type OpenItem =
  | { readonly kind: 'message'; text: string }
  | { readonly kind: 'call'; readonly index: number; readonly name: string; given: string };

interface ResponseEvent {
  readonly type: string;
  readonly sequence_number: number;
}

/**
 * The events of one response in their order: each names its type and its number. One item is open at a time: a message,
 * or a call, which begins when its name is known.
 */
export class ResponseEvents {
  readonly #head: Head;
  readonly #style: CallStyle | null;
  readonly #reader: ToolCallReader | null;
  #number = 0;
  #text = '';
  #open: OpenItem | null = null;
  /** Items that are told, or are being told. */
  #itemCount = 0;

  constructor(head: Head, style: CallStyle | null) {
    this.#head = head;
    this.#style = style;
    this.#reader = style === null ? null : new ToolCallReader(style);
  }

  start(): ResponseEvent[] {
    const response = responseBodyOf(this.#head, { kind: 'running' });
    return [
      this.#event('response.created', { response }),
      this.#event('response.in_progress', { response }),
      ...(this.#style === null ? this.#begin({ kind: 'message', text: '' }) : []),
    ];
  }

  push(text: string): ResponseEvent[] {
    this.#text += text;
    if (this.#reader === null) return text === '' ? [] : this.#tell({ kind: 'content', text });
    return this.#reader.push(text).flatMap((delta) => this.#tell(delta));
  }

  end(finishReason: FinishReason, usage: Usage): ResponseEvent[] {
    const rest = (this.#reader?.end() ?? []).flatMap((delta) => this.#tell(delta));
    const begun = this.#itemCount === 0 ? this.#begin({ kind: 'message', text: '' }) : [];
    const style = this.#style;
    const stand: Ended = { kind: 'ended', text: this.#text, style, finishReason, usage };
    const status = statusOf(stand);
    const closing = this.#close(status);
    const response = responseBodyOf(this.#head, stand);
    return [...rest, ...begun, ...closing, this.#event(`response.${status}`, { response })];
  }

  fail(message: string): ResponseEvent {
    const response = responseBodyOf(this.#head, { kind: 'failed', message });
    return this.#event('response.failed', { response });
  }

  #tell(delta: AnswerDelta): ResponseEvent[] {
    if (delta.kind === 'call') {
      const { index, name } = delta;
      return [
        ...this.#close('completed'),
        ...this.#begin({ kind: 'call', index, name, given: '' }),
      ];
    }
    const { text } = delta;
    if (delta.kind === 'content') {
      const begun = this.#open === null ? this.#begin({ kind: 'message', text: '' }) : [];
      if (this.#open?.kind === 'message') this.#open.text += text;
      const told = { ...this.#partPlace(), delta: text, logprobs: [] };
      return [...begun, this.#event('response.output_text.delta', told)];
    }
    if (this.#open?.kind === 'call') this.#open.given += text;
    const told = { ...this.#place(), delta: text };
    return [this.#event('response.function_call_arguments.delta', told)];
  }

  #begin(item: OpenItem): ResponseEvent[] {
    this.#open = item;
    this.#itemCount += 1;
    const added = {
      output_index: this.#itemCount - 1,
      item: this.#itemOf(item, 'in_progress', []),
    };
    const events = [this.#event('response.output_item.added', added)];
    if (item.kind === 'message') {
      const part = { ...this.#partPlace(), part: textPart('') };
      events.push(this.#event('response.content_part.added', part));
    }
    return events;
  }

  #close(status: string): ResponseEvent[] {
    const open = this.#open;
    if (open === null) return [];
    const events =
      open.kind === 'message'
        ? [
            this.#event('response.output_text.done', {
              ...{ ...this.#partPlace(), text: open.text, logprobs: [] },
            }),
            this.#event('response.content_part.done', {
              ...{ ...this.#partPlace(), part: textPart(open.text) },
            }),
          ]
        : [
            this.#event('response.function_call_arguments.done', {
              ...{ ...this.#place(), name: open.name, arguments: open.given },
            }),
          ];
    const content = open.kind === 'message' ? [textPart(open.text)] : [];
    const item = this.#itemOf(open, status, content);
    events.push(
      this.#event('response.output_item.done', { output_index: this.#itemCount - 1, item }),
    );
    this.#open = null;
    return events;
  }

  #itemOf(item: OpenItem, status: string, content: readonly unknown[]) {
    if (item.kind === 'message') return messageOf(this.#head, status, content);
    const called = { name: item.name, arguments: item.given };
    const id = callIdOf(this.#head.jobId, 0, item.index);
    return callItemOf({ id, function: called }, status);
  }

  /** Of the open item. */
  #place() {
    const { id } = this.#itemOf(this.#open!, '', []);
    return { item_id: id, output_index: this.#itemCount - 1 };
  }

  #partPlace() {
    return { ...this.#place(), content_index: 0 };
  }

  #event(type: string, fields: object): ResponseEvent {
    const event = { type, sequence_number: this.#number, ...fields };
    this.#number += 1;
    return event;
  }
}
