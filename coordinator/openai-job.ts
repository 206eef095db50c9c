/** A job as it is told over HTTP and to webhooks. OpenAI has no such object. */
import type { JobRecord } from './journal.js';
import { usageBody } from './openai-answer.js';

export function jobBody({ id, status, model, createdMs, terms, ending }: JobRecord) {
  const { priority, deadlineMs } = terms;
  return {
    id,
    object: 'job',
    status,
    model,
    created_at: Math.floor(createdMs / 1000),
    priority,
    deadline_at: deadlineMs === null ? null : Math.floor(deadlineMs / 1000),
    finish_reason: ending?.status === 'completed' ? ending.finishReason : null,
    usage: ending?.status === 'completed' ? usageBody(ending.usage) : null,
    error: ending?.status === 'failed' ? { code: ending.code, message: ending.message } : null,
  };
}
