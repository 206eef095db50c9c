/**
 * Sets of texts, as automata over code points: what a pattern, a format, a length or a list of forbidden names says, and
 * all of them together. They are written into a grammar as UTF-8, or as JSON spells a text.
 */
import { CaravanError } from '../proto/errors.js';
import {
  ANY,
  complement,
  intersection,
  type Expression,
  type Ranges,
} from './grammar-expression.js';
import { MAX_STATES, type NfaBuilder, type Rule } from './grammar-nfa.js';

/**
 * `plain`: UTF-8. `json`: as a JSON string may spell it, with all escapes. `canonical`: as JSON.stringify spells it, in one
 * way only, so that two spellings differ where the texts do.
 */
export type Spelling = 'plain' | 'json' | 'canonical';

/** The longest text that can be bounded. */
const MAX_LENGTH = 8_192;
/** Texts of at most this many characters are written without calls. */
export const SHORT_LENGTH = 64;

interface Edge {
  readonly ranges: Ranges;
  readonly to: number;
}

export class TextSet {
  readonly edges: Edge[][] = [];
  readonly epsilons: number[][] = [];
  readonly start: number;
  readonly end: number;

  constructor() {
    this.start = this.state();
    this.end = this.state();
  }

  state(): number {
    if (this.edges.length >= MAX_STATES) {
      throw new CaravanError('invalid_request', 'repeats too much, or too long a text');
    }
    this.epsilons.push([]);
    return this.edges.push([]) - 1;
  }

  /** The texts of an expression without rules. */
  static of(expression: Expression): TextSet {
    const set = new TextSet();
    set.#add(expression, set.start, set.end);
    return set;
  }

  /** All texts of `least` to `most` code points. */
  static ofLength(least: number, most: number | null): TextSet {
    if (most !== null && most > MAX_LENGTH) {
      throw new CaravanError('invalid_request', `${most} is more than ${MAX_LENGTH} characters`);
    }
    return TextSet.of({ kind: 'repeat', of: { kind: 'class', ranges: ANY }, least, most });
  }

  /** All texts but these. */
  static except(texts: readonly string[]): TextSet {
    const set = new TextSet();
    const free = set.state();
    set.edges[free]!.push({ ranges: ANY, to: free });
    set.epsilons[free]!.push(set.end);
    const nodes = [{ at: set.start, prefix: '', children: new Map<number, number>() }];
    const byPrefix = new Map([['', 0]]);
    const forbidden = new Set(texts);
    for (const text of forbidden) {
      let prefix = '';
      for (const character of text) {
        const parent = nodes[byPrefix.get(prefix)!]!;
        prefix += character;
        if (byPrefix.has(prefix)) continue;
        byPrefix.set(prefix, nodes.length);
        const at = set.state();
        parent.children.set(character.codePointAt(0)!, at);
        nodes.push({ at, prefix, children: new Map() });
      }
    }
    for (const { at, prefix, children } of nodes) {
      const codes = [...children.keys()];
      for (const [code, to] of children) set.edges[at]!.push({ ranges: [[code, code]], to });
      set.edges[at]!.push({ ranges: complement(codes.map((code) => [code, code])), to: free });
      if (!forbidden.has(prefix)) set.epsilons[at]!.push(set.end);
    }
    return set;
  }

  /** Texts that are in both. */
  and(other: TextSet): TextSet {
    const both = new TextSet();
    const known = new Map<number, number>();
    const queue: (readonly [number, number])[] = [];
    const width = other.edges.length;
    const visit = (a: number, b: number): number => {
      const name = a * width + b;
      let id = known.get(name);
      if (id === undefined) {
        id = both.state();
        known.set(name, id);
        queue.push([a, b]);
      }
      return id;
    };
    both.epsilons[both.start]!.push(visit(this.start, other.start));
    for (let pair = queue.pop(); pair !== undefined; pair = queue.pop()) {
      const [a, b] = pair;
      const id = visit(a, b);
      for (const to of this.epsilons[a]!) both.epsilons[id]!.push(visit(to, b));
      for (const to of other.epsilons[b]!) both.epsilons[id]!.push(visit(a, to));
      if (a === this.end && b === other.end) both.epsilons[id]!.push(both.end);
      for (const edge of this.edges[a]!) {
        for (const { ranges, to } of other.edges[b]!) {
          const shared = intersection(edge.ranges, ranges);
          if (shared.length > 0) both.edges[id]!.push({ ranges: shared, to: visit(edge.to, to) });
        }
      }
    }
    return both;
  }

  /**
   * Writes the texts into a grammar between two of its states.
   *
   * @param anyCharacter a rule for a character that may be any: long texts take few states with it.
   */
  write(
    builder: NfaBuilder,
    from: number,
    to: number,
    spelling: Spelling,
    anyCharacter: Rule | null = null,
  ): void {
    const states = this.edges.map(() => builder.state());
    builder.epsilon(from, states[this.start]!);
    builder.epsilon(states[this.end]!, to);
    for (const [id, edges] of this.edges.entries()) {
      for (const next of this.epsilons[id]!) builder.epsilon(states[id]!, states[next]!);
      for (const { ranges, to: next } of edges) {
        if (ranges === ANY && anyCharacter !== null) {
          builder.call(states[id]!, anyCharacter, states[next]!);
        } else {
          writeClass(builder, states[id]!, ranges, states[next]!, spelling);
        }
      }
    }
  }

  #add(expression: Expression, from: number, to: number): void {
    switch (expression.kind) {
      case 'class':
        this.edges[from]!.push({ ranges: expression.ranges, to });
        return;
      case 'sequence': {
        let at = from;
        for (const part of expression.parts) {
          const next = this.state();
          this.#add(part, at, next);
          at = next;
        }
        this.epsilons[at]!.push(to);
        return;
      }
      case 'choice':
        for (const option of expression.options) this.#add(option, from, to);
        return;
      case 'repeat': {
        let at = from;
        for (let i = 0; i < expression.least; i += 1) at = this.#addOnce(expression.of, at);
        if (expression.most === null) {
          const loop = this.state();
          this.epsilons[at]!.push(loop);
          const after = this.#addOnce(expression.of, loop);
          this.epsilons[after]!.push(loop);
          at = loop;
        }
        for (let i = expression.least; i < (expression.most ?? 0); i += 1) {
          this.epsilons[at]!.push(to);
          at = this.#addOnce(expression.of, at);
        }
        this.epsilons[at]!.push(to);
        return;
      }
      case 'rule':
        throw new Error(`a text has no rules: ${expression.name}`);
    }
  }

  #addOnce(of: Expression, from: number): number {
    // A state of its own keeps what leads into `from` from being mixed with what loops.
    const next = this.state();
    this.#add(of, from, next);
    return next;
  }
}

/** Ranges of one byte, any of which will do. */
type ByteSet = readonly (readonly [low: number, high: number])[];

const MORE: ByteSet = [[0x80, 0xbf]];
const JSON_PLAIN = complement([
  [0, 0x1f],
  [0x22, 0x22],
  [0x5c, 0x5c],
]);
const SHORT_ESCAPES: readonly (readonly [code: number, letter: string, isCanonical: boolean])[] = [
  [0x22, '"', true],
  [0x5c, '\\', true],
  [0x2f, '/', false],
  [0x08, 'b', true],
  [0x0c, 'f', true],
  [0x0a, 'n', true],
  [0x0d, 'r', true],
  [0x09, 't', true],
];
/** Classes of more ranges (\p{L} has 600) are spelled without \u. */
const MAX_ESCAPED_RANGES = 64;

/** Edges for each spelling of each code point of a class. */
export function writeClass(
  builder: NfaBuilder,
  from: number,
  ranges: Ranges,
  to: number,
  spelling: Spelling,
): void {
  /** States by what is still to come before `to`. */
  const tails = new Map<string, number>();
  const chain = (sets: readonly ByteSet[]): void => {
    let next = to;
    let name = '';
    for (let i = sets.length - 1; i > 0; i -= 1) {
      name = `${sets[i]!.join('|')},${name}`;
      let state = tails.get(name);
      if (state === undefined) {
        state = builder.state();
        tails.set(name, state);
        for (const [low, high] of sets[i]!) builder.bytes(state, low, high, next);
      }
      next = state;
    }
    for (const [low, high] of sets[0]!) builder.bytes(from, low, high, next);
  };
  const plain = spelling === 'plain' ? ranges : intersection(ranges, JSON_PLAIN);
  for (const [first, last] of plain) for (const sets of utf8(first, last)) chain(sets);
  if (spelling === 'plain') return;
  for (const [code, letter, isCanonical] of SHORT_ESCAPES) {
    if (spelling === 'canonical' && !isCanonical) continue;
    if (!ranges.some(([first, last]) => first <= code && code <= last)) continue;
    chain([exactly(0x5c), exactly(letter.charCodeAt(0))]);
  }
  if (spelling === 'canonical' || ranges.length > MAX_ESCAPED_RANGES) return;
  const escape = [exactly(0x5c), exactly(0x75)];
  for (const [first, last] of intersection(ranges, [[0, 0xffff]])) {
    for (const digits of hexDigits(first, last, 4)) chain([...escape, ...digits]);
  }
  // A pair of surrogates, where the class has all characters that need one.
  if (!ranges.some(([first, last]) => first <= 0x10000 && last === 0x10ffff)) return;
  for (const high of hexDigits(0xd800, 0xdbff, 4)) {
    for (const low of hexDigits(0xdc00, 0xdfff, 4)) {
      chain([...escape, ...high, ...escape, ...low]);
    }
  }
}

const exactly = (byte: number): ByteSet => [[byte, byte]];

/** Sequences of bytes that spell the code points first … last. R. Cox, "Regular expression matching in the wild", 2010. */
function utf8(first: number, last: number): ByteSet[][] {
  for (const border of [0x7f, 0x7ff, 0xffff]) {
    if (first <= border && last > border)
      return [...utf8(first, border), ...utf8(border + 1, last)];
  }
  if (last < 0x80) return [[[[first, last]]]];
  const count = last < 0x800 ? 1 : last < 0x10000 ? 2 : 3;
  for (let i = 1; i <= count; i += 1) {
    const mask = (1 << (6 * i)) - 1;
    if ((first & ~mask) === (last & ~mask)) continue;
    if ((first & mask) !== 0) {
      return [...utf8(first, first | mask), ...utf8((first | mask) + 1, last)];
    }
    if ((last & mask) !== mask) {
      return [...utf8(first, (last & ~mask) - 1), ...utf8(last & ~mask, last)];
    }
  }
  const lead = [0xc0, 0xe0, 0xf0][count - 1]!;
  const sets: ByteSet[] = [[[lead | (first >> (6 * count)), lead | (last >> (6 * count))]]];
  for (let i = count - 1; i >= 0; i -= 1) {
    const [low, high] = [(first >> (6 * i)) & 0x3f, (last >> (6 * i)) & 0x3f];
    sets.push(low === 0 && high === 0x3f ? MORE : [[0x80 | low, 0x80 | high]]);
  }
  return [sets];
}

/** Sequences of `count` hexadecimal digits, in either case, that spell first … last. */
function hexDigits(first: number, last: number, count: number): ByteSet[][] {
  if (count === 0) return [[]];
  const unit = 16 ** (count - 1);
  const [top, bottom] = [Math.floor(last / unit), Math.floor(first / unit)];
  if (top === bottom) {
    const rest = hexDigits(first - bottom * unit, last - bottom * unit, count - 1);
    return rest.map((digits) => [hexSet(bottom, bottom), ...digits]);
  }
  if (first !== bottom * unit) {
    const border = (bottom + 1) * unit;
    return [...hexDigits(first, border - 1, count), ...hexDigits(border, last, count)];
  }
  if (last !== (top + 1) * unit - 1) {
    const border = top * unit;
    return [...hexDigits(first, border - 1, count), ...hexDigits(border, last, count)];
  }
  return [[hexSet(bottom, top), ...Array.from({ length: count - 1 }, () => hexSet(0, 15))]];
}

function hexSet(first: number, last: number): ByteSet {
  const sets: [number, number][] = [];
  if (first <= 9) sets.push([0x30 + first, 0x30 + Math.min(9, last)]);
  if (last >= 10) {
    const [low, high] = [Math.max(10, first) - 10, last - 10];
    sets.push([0x41 + low, 0x41 + high], [0x61 + low, 0x61 + high]);
  }
  return sets;
}
