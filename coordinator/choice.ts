/**
 * One sequence as a client sees it: its text, and which of its tokens are shown with it. A token is shown when its
 * first character is: those of a stop text and EOS never are.
 */
import { Detokenizer } from '../model/detokenizer.js';
import type { Tokenizer } from '../model/tokenizer.js';
import { ToolCallReader, type AnswerDelta } from './tool-calls.js';
import type { JournalEntry } from './journal-entry.js';
import type { FinishReason, Request, TokenLogprobs } from './request.js';

export interface ShownToken {
  readonly id: number;
  /** Characters of the text before it. */
  readonly textOffset: number;
  /** Null for the first token of a prompt. */
  readonly logprobs: TokenLogprobs | null;
}

/** What came at once: text, and the tokens that it shows. Tokens only where the request asks for logprobs. */
export interface ChoicePiece {
  readonly text: string;
  readonly tokens: readonly ShownToken[];
  /** What the text says, where it may call tools. */
  readonly deltas?: readonly AnswerDelta[];
}

export class Choice {
  readonly #request: Request;
  readonly #tokenizer: Tokenizer;
  readonly #detokenizer: Detokenizer;
  /** Tokens whose text was not shown yet, with logprobs. */
  readonly #unshown: ShownToken[] = [];
  readonly #shown: ShownToken[] = [];
  /** Characters of the prompt, if it is shown, and of all tokens so far. */
  #spokenLength = 0;
  /** Null where no tools may be called. */
  readonly #calls: ToolCallReader | null;
  #text = '';
  #finishReason: FinishReason | null = null;
  #tokenCount = 0;
  #logprobSum = 0;

  /** @param request of this sequence alone. */
  constructor(request: Request, tokenizer: Tokenizer) {
    this.#request = request;
    this.#tokenizer = tokenizer;
    this.#detokenizer = new Detokenizer(tokenizer, request.isTextStart);
    const { grammar } = request;
    this.#calls = grammar?.kind === 'calls' ? new ToolCallReader(grammar.style) : null;
  }

  /** All text so far. */
  get text(): string {
    return this.#text;
  }

  /** All tokens so far; empty where the request asks for no logprobs. */
  get tokens(): readonly ShownToken[] {
    return this.#shown;
  }

  /** Calls of tools that have begun. */
  get callCount(): number {
    return this.#calls?.callCount ?? 0;
  }

  /** Null while it goes on. */
  get finishReason(): FinishReason | null {
    return this.#finishReason;
  }

  /** Of all tokens, EOS included: what `best_of` compares. */
  get meanLogprob(): number {
    return this.#tokenCount === 0 ? -Infinity : this.#logprobSum / this.#tokenCount;
  }

  /** The prompt, as the beginning of the answer. @param logprobs from its second token on; empty for none. */
  prompt(logprobs: readonly TokenLogprobs[]): ChoicePiece {
    const { promptTokenIds } = this.#request;
    const detokenizer = new Detokenizer(this.#tokenizer, this.#tokenizer.addsFirstSpace);
    let text = '';
    promptTokenIds.forEach((id, i) => {
      this.#unshown.push({ id, textOffset: text.length, logprobs: logprobs[i - 1] ?? null });
      text += detokenizer.push(id);
    });
    text += detokenizer.end();
    this.#spokenLength = text.length;
    return this.#show(text, true);
  }

  /** More tokens. */
  push({ tokenIds, texts, logprobs }: Extract<JournalEntry, { kind: 'tokens' }>): ChoicePiece {
    tokenIds.forEach((id, i) => {
      const own = logprobs?.[i];
      this.#tokenCount += 1;
      this.#logprobSum += own?.logprob ?? 0;
      if (own !== undefined) {
        this.#unshown.push({ id, textOffset: this.#spokenLength, logprobs: own });
        this.#spokenLength += this.#detokenizer.push(id).length;
      }
    });
    return this.#show(texts.join(''), false);
  }

  /** The end, with the text that was held back. An answer that met a limit ends with its last token. */
  finish(finishReason: FinishReason, heldText: string): ChoicePiece {
    this.#finishReason = finishReason;
    const piece = this.#show(heldText, finishReason === 'length');
    if (piece.deltas === undefined) return piece;
    return { ...piece, deltas: [...piece.deltas, ...this.#calls!.end()] };
  }

  #show(text: string, isAll: boolean): ChoicePiece {
    this.#text += text;
    const deltas = this.#calls?.push(text);
    const next = this.#unshown.findIndex(({ textOffset }) => textOffset >= this.#text.length);
    const count = isAll || next === -1 ? this.#unshown.length : next;
    const tokens = this.#unshown.splice(0, count);
    const piece = deltas === undefined ? { text } : { text, deltas };
    if (this.#request.logprobs === undefined) return { ...piece, tokens: [] };
    this.#shown.push(...tokens);
    return { ...piece, tokens };
  }
}
