/** The messages of a chat as templates know them. */
import { refuse } from './openai-refusal.js';

interface Said {
  readonly role: string;
  readonly content?: string | null;
  readonly tool_calls?: unknown;
}

/**
 * A developer is a system. What systems say at the beginning is one message: most templates take one.
 *
 * @throws CaravanError `invalid_request` for a tool's result without the call before it.
 */
export function spokenMessages<M extends Said>(messages: readonly M[]): M[] {
  const spoken: M[] = [];
  let isAfterCalls = false;
  messages.forEach((message, i) => {
    const { role, content } = message;
    if (role === 'tool' && !isAfterCalls) {
      refuse(`messages.${i}`, "a tool's message must follow the assistant's that called it");
    }
    isAfterCalls = role === 'tool' || message.tool_calls != null;
    const isSystem = role === 'system' || role === 'developer';
    const first = spoken[0];
    if (isSystem && spoken.length === 1 && first?.role === 'system') {
      spoken[0] = { ...first, content: `${first.content ?? ''}\n\n${content ?? ''}` };
    } else spoken.push(isSystem ? { ...message, role: 'system' } : message);
  });
  return spoken;
}
