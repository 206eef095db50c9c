/** The prompt of a command: a text to continue, or a file of messages to answer. */
import fs from 'node:fs';
import { z } from 'zod';
import type { ChatTemplate } from '../model/chat-template.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import type { Prompt } from './request.js';

const messages = z.array(z.object({ role: z.string(), content: z.string() })).min(1);

/**
 * Tokens of the prompt. Neither text nor file is the empty prompt.
 *
 * @throws CaravanError `bad_usage` when the file is not an array of messages, `invalid_request` when the
 *   messages break the model's rules.
 */
export function promptOf(
  tokenizer: Tokenizer,
  chat: ChatTemplate,
  { prompt, chatFile }: { prompt: string | undefined; chatFile: string | undefined },
): Prompt {
  if (chatFile !== undefined) {
    const promptTokenIds = chat.render(readMessages(chatFile));
    return { promptTokenIds, isTextStart: tokenizer.addsFirstSpace };
  }
  const { ids, isTextStart } = encodePrompt(prompt ?? '', tokenizer);
  return { promptTokenIds: ids, isTextStart };
}

/** Tokens of a text to continue, with BOS before it where the model knows one. The empty text is BOS in any case. */
export function encodePrompt(
  text: string,
  tokenizer: Tokenizer,
): { readonly ids: readonly number[]; readonly isTextStart: boolean } {
  const ids = [...tokenizer.prefixTokenIds, ...tokenizer.encode(text)];
  return {
    ids: ids.length > 0 ? ids : [tokenizer.bosTokenId],
    isTextStart: text === '' && tokenizer.addsFirstSpace,
  };
}

/** Reads a file of messages. @throws CaravanError `bad_usage`. */
export function readMessages(file: string): z.infer<typeof messages> {
  let json: unknown;
  try {
    json = JSON.parse(fs.readFileSync(file, 'utf8'));
  } catch (cause) {
    const reason = cause instanceof SyntaxError ? 'is not valid JSON' : 'cannot be read';
    throw new CaravanError('bad_usage', `--chat ${file}: ${reason}`, { cause });
  }
  const parsed = messages.safeParse(json);
  if (parsed.success) return parsed.data;
  const issue = parsed.error.issues[0];
  throw new CaravanError(
    'bad_usage',
    `--chat ${file}: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}; it must be [{"role", "content"}, …]`,
  );
}
