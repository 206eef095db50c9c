/**
 * Telling a template's own control tokens from those that a user spells. A text that a client gave is marked: a character
 * that occurs nowhere else, the mark, is put into it wherever a control token could begin or go on. The template
 * renders the marked text; what it spells itself is whole, what came from a client is broken by marks; and without
 * its marks the rendered text must be the one that the unmarked texts give, character for character. So templates may
 * trim, join, cut and search the texts as they like.
 *
 *     "Hi <|im_end|>"  ──mark──>  "Hi <·|im_end|>"  ──template──>  "<|im_start|>user\nHi <·|im_end|><|im_end|>"
 *     ──split──>  [<|im_start|>] "user\nHi <|im_end|>" [<|im_end|>]
 */

/** What a rendered text consists of: texts, and ids of control tokens between them. */
export type PromptPart = string | number;

export class TextMarker {
  readonly #controlTokens: ReadonlyMap<string, number>;
  /** Any control token, the longest first. Null where there is none. */
  readonly #anyControl: RegExp | null;
  readonly #firstCharacters: ReadonlySet<string>;
  /** What can follow the first character of a control token, up to its end; by its own first character. */
  readonly #tails = new Map<string, Set<string>>();
  /** What the template searches for, and what is no control token: it is left as it stands. */
  readonly #exempt: readonly string[];

  /**
   * @param controlTokens ids by spelling.
   * @param literals texts that the template compares with.
   */
  constructor(controlTokens: ReadonlyMap<string, number>, literals: Iterable<string>) {
    this.#controlTokens = controlTokens;
    const spellings = [...controlTokens.keys()].sort((a, b) => b.length - a.length);
    this.#firstCharacters = new Set(spellings.map((spelling) => firstOf(spelling)));
    this.#anyControl =
      spellings.length === 0 ? null : new RegExp(spellings.map(escapePattern).join('|'), 'gu');
    for (const spelling of spellings) {
      const characters = Array.from(spelling);
      for (let i = 1; i < characters.length; i += 1) {
        const tails = this.#tails.get(characters[i]!) ?? new Set();
        this.#tails.set(characters[i]!, tails.add(characters.slice(i).join('')));
      }
    }
    this.#exempt = [...literals].filter(
      (literal) =>
        literal.length > 1 &&
        this.#firstCharacters.has(firstOf(literal)) &&
        !spellings.some((s) => s.startsWith(literal) || literal.startsWith(s)),
    );
  }

  /** The text with marks, or the same text where it needs none. */
  mark(text: string, mark: string): string {
    let marked = '';
    let kept = 0;
    for (let at = 0; at < text.length; at += 1) {
      const character = String.fromCodePoint(text.codePointAt(at)!);
      if (!this.#firstCharacters.has(character)) continue;
      if (this.#exempt.some((literal) => text.startsWith(literal, at))) continue;
      const end = at + character.length;
      marked += text.slice(kept, end) + mark;
      kept = end;
    }
    marked += text.slice(kept);
    const start = marked.length - marked.trimStart().length;
    return this.#goesOn(text.trim()) ? marked.slice(0, start) + mark + marked.slice(start) : marked;
  }

  /** Every text within a value of JSON, marked; names of members are, too. */
  markAll(value: unknown, mark: string): unknown {
    if (typeof value === 'string') return this.mark(value, mark);
    if (Array.isArray(value)) return value.map((element) => this.markAll(element, mark));
    if (typeof value !== 'object' || value === null) return value;
    return Object.fromEntries(
      Object.entries(value).map(([key, member]) => [
        // A name stands in quotes, or is written as it is asked for: only its inside can be a control token.
        Array.from(key, (c) => (this.#firstCharacters.has(c) ? c + mark : c)).join(''),
        this.markAll(member, mark),
      ]),
    );
  }

  /** Cuts a rendered text at its control tokens, and takes the marks out. */
  split(rendered: string, mark: string): PromptPart[] {
    const parts: PromptPart[] = [];
    const add = (text: string): void => {
      if (text !== '') parts.push(text.replaceAll(mark, ''));
    };
    let from = 0;
    for (const { 0: spelling, index } of rendered.matchAll(this.#anyControl ?? /(?!)/gu)) {
      add(rendered.slice(from, index));
      parts.push(this.#controlTokens.get(spelling)!);
      from = index + spelling.length;
    }
    add(rendered.slice(from));
    return parts;
  }

  /** Whether a text could go on, or stand within, a control token that the template begins. */
  #goesOn(trimmed: string): boolean {
    if (trimmed === '') return false;
    for (const tail of this.#tails.get(firstOf(trimmed)) ?? []) {
      if (trimmed.startsWith(tail) || tail.startsWith(trimmed)) return true;
    }
    return false;
  }
}

/** A private-use character that none of the texts holds. */
export function markFor(texts: readonly string[]): string {
  for (let code = 0xe000; code <= 0xf8ff; code += 1) {
    const mark = String.fromCodePoint(code);
    if (!texts.some((text) => text.includes(mark))) return mark;
  }
  throw new RangeError('the texts hold every private-use character');
}

const firstOf = (text: string): string => String.fromCodePoint(text.codePointAt(0)!);

const escapePattern = (text: string): string => text.replace(/[\\^$.*+?()[\]{}|]/g, '\\$&');
