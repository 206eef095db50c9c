/** Calls of tools in OpenAI's response bodies and stream chunks. */
import { ToolCallReader, type AnswerDelta, type CallStyle } from './tool-calls.js';
import type { FinishReason } from './request.js';

/** The same for the same call, also after a stream was resumed. */
export const callIdOf = (jobId: string, choice: number, index: number): string =>
  `call_${jobId.replace(/^job_/, '')}_${choice}_${index}`;

/** Why a choice is over, as clients are told: an answer that calls tools waits for their results. */
export function shownReason(
  kind: 'chat' | 'completion',
  choice: { readonly finishReason: FinishReason | null; readonly callCount?: number },
): FinishReason | 'tool_calls' | null {
  const { finishReason, callCount = 0 } = choice;
  return kind === 'chat' && finishReason === 'stop' && callCount > 0 ? 'tool_calls' : finishReason;
}

/** The calls of a whole text. */
export function callBodies(jobId: string, choice: number, text: string, style: CallStyle) {
  const reader = new ToolCallReader(style);
  const calls: { id: string; type: 'function'; function: { name: string; arguments: string } }[] =
    [];
  let content = '';
  for (const delta of [...reader.push(text), ...reader.end()]) {
    if (delta.kind === 'content') content += delta.text;
    else if (delta.kind === 'arguments') calls[delta.index]!.function.arguments += delta.text;
    else {
      const { index, name } = delta;
      const id = callIdOf(jobId, choice, index);
      calls.push({ id, type: 'function', function: { name, arguments: '' } });
    }
  }
  return { content: content === '' ? null : content, calls };
}

export interface CallDelta {
  readonly index: number;
  readonly id?: string;
  readonly type?: 'function';
  readonly function: { readonly name?: string; readonly arguments: string };
}

/** What a piece of a stream adds: text, and beginnings and arguments of calls; of each call at most one entry. */
export function deltaBody(jobId: string, choice: number, deltas: readonly AnswerDelta[]) {
  let content = '';
  const calls = new Map<number, CallDelta>();
  for (const delta of deltas) {
    if (delta.kind === 'content') {
      content += delta.text;
      continue;
    }
    const { index } = delta;
    if (delta.kind === 'call') {
      const id = callIdOf(jobId, choice, index);
      const called = { name: delta.name, arguments: '' };
      calls.set(index, { index, id, type: 'function', function: called });
      continue;
    }
    const begun = calls.get(index) ?? { index, function: { arguments: '' } };
    const called = { ...begun.function, arguments: begun.function.arguments + delta.text };
    calls.set(index, { ...begun, function: called });
  }
  return {
    ...(content === '' ? {} : { content }),
    ...(calls.size === 0 ? {} : { tool_calls: [...calls.values()] }),
  };
}
