/**
 * GBNF, llama.cpp's notation for grammars: `name ::= "text" [a-z]+ (other | ".")? item{1,3}`, `#` for comments, a rule ends
 * with its line unless an alternative or a group goes on. The text is what `root` says.
 */
import { CaravanError } from '../proto/errors.js';
import {
  ANY,
  classOf,
  complement,
  literal,
  repeat,
  union,
  type Expression,
  type Ranges,
} from './grammar-expression.js';
import { NfaBuilder, type Nfa, type Rule } from './grammar-nfa.js';
import { writeClass } from './grammar-text.js';

const MAX_CHARACTERS = 1 << 17;
const MAX_DEPTH = 200;
const ESCAPES: Readonly<Record<string, string>> = { n: '\n', r: '\r', t: '\t' };
const HEX_LENGTH: Readonly<Record<string, number>> = { x: 2, u: 4, U: 8 };

/** The grammar of a GBNF source. @throws CaravanError `invalid_request` with the line. */
export function compileGbnf(source: string): Nfa {
  if (source.length > MAX_CHARACTERS) {
    throw new CaravanError(
      'invalid_request',
      `has ${source.length} characters; at most ${MAX_CHARACTERS}`,
    );
  }
  const expressions = new GbnfParser(source).parse();
  const builder = new NfaBuilder();
  const rules = new Map([...expressions.keys()].map((name) => [name, builder.rule(name)]));
  for (const [name, expression] of expressions) {
    const { start, end } = rules.get(name)!;
    writeExpression(builder, rules, expression, start, end);
  }
  return builder.finish(rules.get('root')!);
}

/** Writes an expression, and calls of the rules that it names, between two states. */
export function writeExpression(
  builder: NfaBuilder,
  rules: ReadonlyMap<string, Rule>,
  expression: Expression,
  from: number,
  to: number,
): void {
  const once = (part: Expression, start: number): number => {
    const next = builder.state();
    writeExpression(builder, rules, part, start, next);
    return next;
  };
  switch (expression.kind) {
    case 'class':
      writeClass(builder, from, expression.ranges, to, 'plain');
      return;
    case 'rule':
      builder.call(from, rules.get(expression.name)!, to);
      return;
    case 'sequence': {
      let at = from;
      for (const part of expression.parts) at = once(part, at);
      builder.epsilon(at, to);
      return;
    }
    case 'choice':
      for (const option of expression.options) writeExpression(builder, rules, option, from, to);
      return;
    case 'repeat': {
      const { of, least, most } = expression;
      let at = from;
      for (let i = 0; i < least; i += 1) at = once(of, at);
      if (most === null) {
        const loop = builder.state();
        builder.epsilon(at, loop);
        builder.epsilon(once(of, loop), loop);
        at = loop;
      }
      for (let i = least; i < (most ?? 0); i += 1) {
        builder.epsilon(at, to);
        at = once(of, at);
      }
      builder.epsilon(at, to);
    }
  }
}

class GbnfParser {
  readonly #source: string;
  readonly #rules = new Map<string, Expression>();
  readonly #named = new Set<string>();
  #at = 0;
  #depth = 0;

  constructor(source: string) {
    this.#source = source.toWellFormed();
  }

  parse(): ReadonlyMap<string, Expression> {
    this.#skip(true);
    while (this.#at < this.#source.length) {
      const name = this.#name();
      if (name === null) this.#refuse('a rule begins with its name');
      this.#skip(false);
      if (!this.#take('::=')) this.#refuse(`::= must follow ${name}`);
      this.#skip(true);
      if (this.#rules.has(name)) this.#refuse(`${name} is there twice`);
      this.#rules.set(name, this.#choice(false));
      this.#skip(true);
    }
    if (!this.#rules.has('root')) this.#refuse('there is no rule root');
    const missing = [...this.#named].find((name) => !this.#rules.has(name));
    if (missing !== undefined) this.#refuse(`there is no rule ${missing}`);
    return this.#rules;
  }

  #choice(isNested: boolean): Expression {
    this.#depth += 1;
    if (this.#depth > MAX_DEPTH) this.#refuse(`groups more than ${MAX_DEPTH} deep`);
    const options = [this.#sequence(isNested)];
    for (;;) {
      const before = this.#at;
      // An alternative may begin on the next line.
      this.#skip(true);
      if (!this.#take('|')) {
        this.#at = isNested ? this.#at : before;
        break;
      }
      this.#skip(true);
      options.push(this.#sequence(isNested));
    }
    this.#depth -= 1;
    return options.length === 1 ? options[0]! : { kind: 'choice', options };
  }

  #sequence(isNested: boolean): Expression {
    const parts: Expression[] = [];
    for (;;) {
      this.#skip(isNested);
      const part = this.#item();
      if (part === null) return { kind: 'sequence', parts };
      parts.push(this.#quantified(part));
    }
  }

  #item(): Expression | null {
    if (this.#take('"')) {
      let text = '';
      while (!this.#take('"')) text += this.#character();
      return literal(text);
    }
    if (this.#take('[')) {
      const isNegated = this.#take('^');
      const ranges: (readonly [number, number])[] = [];
      while (!this.#take(']')) {
        const first = this.#character().codePointAt(0)!;
        const isRange = this.#source[this.#at] === '-' && this.#source[this.#at + 1] !== ']';
        if (isRange) this.#at += 1;
        const last = isRange ? this.#character().codePointAt(0)! : first;
        if (last < first) this.#refuse('a range of characters that does not rise');
        ranges.push([first, last]);
      }
      const set: Ranges = isNegated ? complement(ranges) : union(ranges);
      return classOf(set);
    }
    if (this.#take('(')) {
      this.#skip(true);
      const inner = this.#choice(true);
      this.#skip(true);
      if (!this.#take(')')) this.#refuse('an unmatched (');
      return inner;
    }
    if (this.#take('.')) return classOf(ANY);
    const before = this.#at;
    const name = this.#name();
    if (name === null) return null;
    const after = this.#at;
    this.#skip(false);
    if (this.#source.startsWith('::=', this.#at)) {
      this.#at = before;
      return null;
    }
    this.#at = after;
    this.#named.add(name);
    return { kind: 'rule', name };
  }

  #quantified(of: Expression): Expression {
    if (this.#take('*')) return repeat(of, 0, null);
    if (this.#take('+')) return repeat(of, 1, null);
    if (this.#take('?')) return repeat(of, 0, 1);
    const bounds = /^\{\s*(\d{1,9})\s*(,\s*(\d{1,9})?\s*)?\}/.exec(
      this.#source.slice(this.#at, this.#at + 40),
    );
    if (bounds === null) return of;
    this.#at += bounds[0].length;
    const least = Number(bounds[1]);
    if (bounds[2] === undefined) return repeat(of, least, least);
    return repeat(of, least, bounds[3] === undefined ? null : Number(bounds[3]));
  }

  #name(): string | null {
    const name = /^[A-Za-z][A-Za-z0-9_-]*/.exec(this.#source.slice(this.#at, this.#at + 200))?.[0];
    if (name === undefined) return null;
    this.#at += name.length;
    return name;
  }

  /** One character of a text or a class, escapes resolved. */
  #character(): string {
    const code = this.#source.codePointAt(this.#at);
    if (code === undefined) return this.#refuse('an end in the middle');
    this.#at += code > 0xffff ? 2 : 1;
    if (code !== 0x5c) return String.fromCodePoint(code);
    const letter = this.#source[this.#at] ?? '';
    this.#at += 1;
    const length = HEX_LENGTH[letter];
    if (length === undefined) return ESCAPES[letter] ?? letter;
    const digits = this.#source.slice(this.#at, this.#at + length);
    this.#at += length;
    const value = /^[0-9A-Fa-f]+$/.test(digits) ? Number.parseInt(digits, 16) : 0x110000;
    if (digits.length < length || value > 0x10ffff) this.#refuse('an escape that is no character');
    return String.fromCodePoint(value);
  }

  #skip(overLines: boolean): void {
    const space = overLines ? /(?:[ \t\r\n]|#[^\n]*)*/y : /(?:[ \t]|#[^\n]*)*/y;
    space.lastIndex = this.#at;
    this.#at += space.exec(this.#source)?.[0].length ?? 0;
  }

  #take(text: string): boolean {
    if (!this.#source.startsWith(text, this.#at)) return false;
    this.#at += text.length;
    return true;
  }

  #refuse(what: string): never {
    const line = this.#source.slice(0, this.#at).split('\n').length;
    throw new CaravanError('invalid_request', `line ${line}: ${what}`);
  }
}
