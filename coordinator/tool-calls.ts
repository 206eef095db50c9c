/**
 * How a model calls tools, as text: a JSON array of calls, or, for models whose own chat template writes `<tool_call>`, one
 * tagged object a call. The grammar of an answer says which texts there can be, so reading them needs no guesses:
 *
 *   array   [{"name": "find", "arguments": {…}}, …]
 *   tags    <tool_call>\n{"name": "find", "arguments": {…}}\n</tool_call>…
 *
 * Any other text is content; it never begins with `[`, or `<`.
 */
export type CallStyle = 'array' | 'tags';

export const CALL_OPENERS: Readonly<Record<CallStyle, string>> = { array: '[', tags: '<' };

/** What a piece of text adds to an answer. */
export type AnswerDelta =
  | { readonly kind: 'content'; readonly text: string }
  /** A call begins. */
  | { readonly kind: 'call'; readonly index: number; readonly name: string }
  | { readonly kind: 'arguments'; readonly index: number; readonly text: string };

/** Turns an answer's text, in pieces of any size, into content and calls. */
export class ToolCallReader {
  readonly #opener: string;
  #part: 'start' | 'content' | 'between' | 'head' | 'arguments' | 'tail' = 'start';
  /** What is not decided yet: leading spaces, or the beginning of a call. */
  #held = '';
  #index = -1;
  #depth = 0;
  #isInText = false;
  #isEscaped = false;

  constructor(style: CallStyle) {
    this.#opener = CALL_OPENERS[style];
  }

  /** Calls that have begun. */
  get callCount(): number {
    return this.#index + 1;
  }

  push(text: string): AnswerDelta[] {
    const deltas: AnswerDelta[] = [];
    let said = '';
    const flush = (): void => {
      if (said === '') return;
      deltas.push(
        this.#part === 'content'
          ? { kind: 'content', text: said }
          : { kind: 'arguments', index: this.#index, text: said },
      );
      said = '';
    };
    for (const character of text) {
      switch (this.#part) {
        case 'start':
          this.#held += character;
          if (/\s/.test(character)) break;
          this.#part = character === this.#opener ? 'between' : 'content';
          if (this.#part === 'content') said = this.#held;
          this.#held = '';
          break;
        case 'content':
          said += character;
          break;
        case 'between':
          if (character === '{') this.#part = 'head';
          break;
        case 'head': {
          const head = /"name"\s*:\s*"([^"]*)"\s*,\s*"arguments"\s*:\s*$/.exec(this.#held);
          if (head === null || character !== '{') {
            this.#held += character;
            break;
          }
          this.#index += 1;
          this.#held = '';
          deltas.push({ kind: 'call', index: this.#index, name: head[1]! });
          this.#part = 'arguments';
          this.#depth = 1;
          said = character;
          break;
        }
        case 'arguments':
          said += character;
          if (this.#closes(character)) {
            flush();
            this.#part = 'tail';
          }
          break;
        case 'tail':
          if (character === '}') this.#part = 'between';
      }
    }
    flush();
    return deltas;
  }

  /** Leading spaces of an answer that is nothing else. */
  end(): AnswerDelta[] {
    if (this.#part !== 'start' || this.#held === '') return [];
    return [{ kind: 'content', text: this.#held }];
  }

  /** Follows the object of arguments. @returns whether this character ends it. */
  #closes(character: string): boolean {
    if (this.#isInText) {
      if (this.#isEscaped) this.#isEscaped = false;
      else if (character === '\\') this.#isEscaped = true;
      else if (character === '"') this.#isInText = false;
    } else if (character === '"') {
      this.#isInText = true;
    } else if ('{['.includes(character)) {
      this.#depth += 1;
    } else if ('}]'.includes(character)) {
      this.#depth -= 1;
    }
    return this.#depth === 0;
  }
}
