/**
 * ECMAScript's regular expressions (with the flag u), as far as they describe a set of texts that an automaton can tell:
 * no look-around, no back references, no word boundaries, and anchors only where they say that a text begins or ends.
 */
import { CaravanError } from '../proto/errors.js';
import {
  ANY,
  classOf,
  complement,
  EMPTY,
  repeat,
  union,
  type Expression,
  type Ranges,
} from './grammar-expression.js';

const MAX_CHARACTERS = 16_384;
const MAX_DEPTH = 200;
/** Each takes a look at every character of Unicode, some 50 ms. */
const MAX_PROPERTIES = 3;

const DIGIT: Ranges = [[0x30, 0x39]];
const WORD: Ranges = [
  [0x30, 0x39],
  [0x41, 0x5a],
  [0x5f, 0x5f],
  [0x61, 0x7a],
];
const LINE_ENDS: Ranges = [
  [0x0a, 0x0a],
  [0x0d, 0x0d],
  [0x2028, 0x2029],
];
const SPACES: Ranges = [
  [0x09, 0x0d],
  [0x20, 0x20],
  [0xa0, 0xa0],
  [0x1680, 0x1680],
  [0x2000, 0x200a],
  [0x2028, 0x2029],
  [0x202f, 0x202f],
  [0x205f, 0x205f],
  [0x3000, 0x3000],
  [0xfeff, 0xfeff],
];
const CONTROLS: Readonly<Record<string, number>> = { n: 10, r: 13, t: 9, f: 12, v: 11, '0': 0 };
const ANY_TEXT = repeat(classOf(ANY), 0, null);

/**
 * Reads a pattern.
 *
 * @param match `whole`: the text must be what the pattern says; `part`: it must hold it somewhere, as in JSON Schema.
 * @throws CaravanError `invalid_request` that says where and what is not supported.
 */
export function parseRegex(pattern: string, match: 'whole' | 'part'): Expression {
  if (pattern.length > MAX_CHARACTERS) {
    throw new CaravanError(
      'invalid_request',
      `has ${pattern.length} characters; at most ${MAX_CHARACTERS}`,
    );
  }
  return new RegexParser(pattern, match).parse();
}

class RegexParser {
  readonly #characters: readonly string[];
  readonly #match: 'whole' | 'part';
  readonly #properties = new Map<string, Ranges>();
  #at = 0;
  #depth = 0;

  constructor(pattern: string, match: 'whole' | 'part') {
    this.#characters = Array.from(pattern.toWellFormed());
    this.#match = match;
  }

  parse(): Expression {
    const options: Expression[] = [];
    do options.push(this.#anchored());
    while (this.#take('|'));
    if (this.#at < this.#characters.length) this.#refuse('an unmatched )');
    return options.length === 1 ? options[0]! : { kind: 'choice', options };
  }

  /** One alternative of the whole pattern: here anchors may stand. */
  #anchored(): Expression {
    const begins = this.#take('^');
    const parts = this.#terms();
    const ends = this.#take('$');
    if (this.#match === 'part') {
      if (!begins) parts.unshift(ANY_TEXT);
      if (!ends) parts.push(ANY_TEXT);
    }
    return { kind: 'sequence', parts };
  }

  #choice(): Expression {
    this.#depth += 1;
    if (this.#depth > MAX_DEPTH) this.#refuse(`groups more than ${MAX_DEPTH} deep`);
    const options: Expression[] = [];
    do options.push({ kind: 'sequence', parts: this.#terms() });
    while (this.#take('|'));
    this.#depth -= 1;
    return options.length === 1 ? options[0]! : { kind: 'choice', options };
  }

  #terms(): Expression[] {
    const parts: Expression[] = [];
    for (let next = this.#peek(); next !== undefined && !'|)$'.includes(next);) {
      parts.push(this.#quantified(this.#atom()));
      next = this.#peek();
    }
    return parts;
  }

  #atom(): Expression {
    const character = this.#next();
    switch (character) {
      case '.':
        return classOf(complement(LINE_ENDS));
      case '[':
        return classOf(this.#class());
      case '(':
        return this.#group();
      case '\\':
        return classOf(this.#escape(false));
      case '^':
        return this.#refuse('^ elsewhere than at the beginning');
      case '*':
      case '+':
      case '?':
      case '{':
      case '}':
      case ']':
        return this.#refuse(`a lone ${character}`);
      default: {
        const code = character.codePointAt(0)!;
        return classOf([[code, code]]);
      }
    }
  }

  #group(): Expression {
    if (this.#take('?')) {
      const kind = this.#next();
      if (kind === '<') {
        const name = this.#next();
        if (name === '=' || name === '!') this.#refuse('look-behind');
        while (this.#next() !== '>');
      } else if (kind === '=' || kind === '!') {
        this.#refuse('look-ahead');
      } else if (kind !== ':') {
        this.#refuse(`(?${kind}`);
      }
    }
    const inner = this.#choice();
    if (this.#peek() === '$') this.#refuse('$ elsewhere than at the end');
    if (!this.#take(')')) this.#refuse('an unmatched (');
    return inner;
  }

  #quantified(of: Expression): Expression {
    const bounds = this.#bounds();
    if (bounds === null) return of;
    // A lazy quantifier matches the same texts.
    this.#take('?');
    if (this.#bounds() !== null) this.#refuse('a quantifier after a quantifier');
    return bounds[1] === 0 ? EMPTY : repeat(of, ...bounds);
  }

  #bounds(): readonly [number, number | null] | null {
    if (this.#take('*')) return [0, null];
    if (this.#take('+')) return [1, null];
    if (this.#take('?')) return [0, 1];
    if (!this.#take('{')) return null;
    const least = this.#number();
    if (this.#take('}')) return [least, least];
    if (!this.#take(',')) this.#refuse('a { without numbers');
    const most = this.#peek() === '}' ? null : this.#number();
    if (!this.#take('}')) this.#refuse('an unmatched {');
    return [least, most];
  }

  #number(): number {
    let digits = '';
    while (/^\d$/.test(this.#peek() ?? '')) digits += this.#next();
    if (digits === '' || digits.length > 9) this.#refuse('a { without numbers');
    return Number(digits);
  }

  #class(): Ranges {
    const isNegated = this.#take('^');
    const ranges: (readonly [number, number])[] = [];
    while (!this.#take(']')) {
      const first = this.#classMember();
      const single = first.length === 1 && first[0]![0] === first[0]![1] ? first[0]![0] : null;
      if (this.#peek() === '-' && this.#peek(1) !== ']' && single !== null) {
        this.#at += 1;
        const [last, ...more] = this.#classMember();
        if (last === undefined || more.length > 0 || last[0] !== last[1] || last[0] < single) {
          this.#refuse('a range of characters that does not rise');
        }
        ranges.push([single, last[0]]);
      } else {
        ranges.push(...first);
      }
    }
    return isNegated ? complement(ranges) : union(ranges);
  }

  #classMember(): Ranges {
    const character = this.#next();
    if (character === '\\') return this.#escape(true);
    const code = character.codePointAt(0)!;
    return [[code, code]];
  }

  #escape(isInClass: boolean): Ranges {
    const letter = this.#next();
    switch (letter) {
      case 'd':
        return DIGIT;
      case 'D':
        return complement(DIGIT);
      case 'w':
        return WORD;
      case 'W':
        return complement(WORD);
      case 's':
        return SPACES;
      case 'S':
        return complement(SPACES);
      case 'p':
      case 'P':
        return this.#property(letter);
      case 'x':
        return one(this.#hex(2));
      case 'u':
        return one(this.#unicode());
      case 'b':
        if (isInClass) return one(8);
        return this.#refuse('\\b');
      default: {
        const control = CONTROLS[letter];
        if (control !== undefined) return one(control);
        if (/^[A-Za-z1-9]$/.test(letter)) this.#refuse(`\\${letter}`);
        return one(letter.codePointAt(0)!);
      }
    }
  }

  #hex(count: number): number {
    let digits = '';
    for (let i = 0; i < count; i += 1) digits += this.#next();
    if (!/^[0-9a-fA-F]+$/.test(digits)) this.#refuse('an escape without hexadecimal digits');
    return Number.parseInt(digits, 16);
  }

  #unicode(): number {
    if (!this.#take('{')) {
      const unit = this.#hex(4);
      if (unit < 0xd800 || unit > 0xdbff) return unit;
      if (!(this.#take('\\') && this.#take('u'))) this.#refuse('half of a surrogate pair');
      return (unit - 0xd800) * 0x400 + (this.#hex(4) - 0xdc00) + 0x10000;
    }
    let digits = '';
    while (!this.#take('}')) digits += this.#next();
    if (!/^[0-9a-fA-F]{1,6}$/.test(digits)) this.#refuse('an escape without hexadecimal digits');
    return Number.parseInt(digits, 16);
  }

  #property(letter: string): Ranges {
    if (!this.#take('{')) this.#refuse(`\\${letter} without {`);
    let name = '';
    while (!this.#take('}')) name += this.#next();
    const known = this.#properties.get(name);
    if (known !== undefined) return letter === 'p' ? known : complement(known);
    if (this.#properties.size === MAX_PROPERTIES) {
      this.#refuse(`more than ${MAX_PROPERTIES} properties of characters`);
    }
    let matcher: RegExp;
    try {
      if (!/^[\w=]{1,64}$/.test(name)) throw new SyntaxError('no name');
      matcher = new RegExp(`^\\p{${name}}$`, 'u');
    } catch {
      return this.#refuse(`\\${letter}{${name}}`);
    }
    const ranges: [number, number][] = [];
    for (const [first, last] of ANY) {
      for (let code = first; code <= last; code += 1) {
        if (!matcher.test(String.fromCodePoint(code))) continue;
        const previous = ranges.at(-1);
        if (previous?.[1] === code - 1) previous[1] = code;
        else ranges.push([code, code]);
      }
    }
    this.#properties.set(name, ranges);
    return letter === 'p' ? ranges : complement(ranges);
  }

  #peek(ahead = 0): string | undefined {
    return this.#characters[this.#at + ahead];
  }

  #next(): string {
    const character = this.#characters[this.#at];
    if (character === undefined) return this.#refuse('an end in the middle');
    this.#at += 1;
    return character;
  }

  #take(character: string): boolean {
    if (this.#characters[this.#at] !== character) return false;
    this.#at += 1;
    return true;
  }

  #refuse(what: string): never {
    throw new CaravanError(
      'invalid_request',
      `the pattern has ${what}, at character ${this.#at}: not supported`,
    );
  }
}

const one = (code: number): Ranges => [[code, code]];
