/** Logprobs in the forms of chats and of completions. */
import type { Tokenizer } from '../model/tokenizer.js';
import type { ShownToken } from './choice.js';

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** A token's text; one that is no whole characters is told by its bytes, as OpenAI does, a control token by its name. */
function textOf(id: number, tokenizer: Tokenizer): string {
  const bytes = tokenizer.tokenBytes(id);
  if (bytes.length === 0) return tokenizer.pieceOf(id);
  try {
    return utf8.decode(bytes);
  } catch {
    const hex = Array.from(bytes, (byte) => `\\x${byte.toString(16).padStart(2, '0')}`);
    return `bytes:${hex.join('')}`;
  }
}

/** `logprobs` of a choice of a chat. */
export function chatLogprobs(tokens: readonly ShownToken[], tokenizer: Tokenizer) {
  const entryOf = (id: number, logprob: number) => ({
    token: textOf(id, tokenizer),
    logprob,
    bytes: [...tokenizer.tokenBytes(id)],
  });
  return {
    content: tokens.map(({ id, logprobs }) => ({
      ...entryOf(id, logprobs?.logprob ?? 0),
      top_logprobs: (logprobs?.top ?? []).map(([topId, logprob]) => entryOf(topId, logprob)),
    })),
    refusal: null,
  };
}

/** `logprobs` of a choice of a completion: the likeliest tokens always include the chosen one. */
export function completionLogprobs(tokens: readonly ShownToken[], tokenizer: Tokenizer) {
  return {
    tokens: tokens.map(({ id }) => textOf(id, tokenizer)),
    token_logprobs: tokens.map(({ logprobs }) => logprobs?.logprob ?? null),
    top_logprobs: tokens.map(({ id, logprobs }) => {
      if (logprobs === null) return null;
      const named = [...logprobs.top, [id, logprobs.logprob] as const];
      return Object.fromEntries(named.map(([topId, value]) => [textOf(topId, tokenizer), value]));
    }),
    text_offset: tokens.map(({ textOffset }) => textOffset),
  };
}
