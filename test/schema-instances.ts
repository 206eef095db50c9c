/**
 * Values that satisfy a schema, made up at random from its keywords, and the many ways in which JSON may spell them: spaces,
 * escapes, line breaks. Written without the code that it tests; what comes out is held against ajv.
 */
import type { Random } from './random.js';

type Node = Readonly<Record<string, unknown>>;

const isNode = (value: unknown): value is Node =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

export class Instances {
  readonly #root: unknown;
  readonly #random: Random;

  constructor(root: unknown, random: Random) {
    this.#root = root;
    this.#random = random;
  }

  /** A value that likely satisfies the schema. */
  make(schema: unknown = this.#root, depth = 0): unknown {
    const random = this.#random;
    if (!isNode(schema)) return random.pick([null, 1, 'a']);
    const merged = this.#merge(schema, depth);
    const pick = (key: string): readonly unknown[] | null =>
      Array.isArray(merged[key]) ? (merged[key] as unknown[]) : null;
    const examples = pick('examples');
    if (examples !== null) return random.pick(examples);
    if ('const' in merged) return merged['const'];
    const values = pick('enum');
    if (values !== null) return random.pick(values);
    const { type } = merged;
    const name: unknown = Array.isArray(type) ? random.pick(type as unknown[]) : type;
    switch (name) {
      case 'null':
        return null;
      case 'boolean':
        return random.below(2) === 0;
      case 'string':
        return this.#text(merged);
      case 'integer':
      case 'number':
        return this.#number(merged, name === 'integer');
      case 'array':
        return this.#array(merged, depth);
      case 'object':
        return this.#object(merged, depth);
      default:
        return random.pick([null, true, 'x', 7]);
    }
  }

  /** References, allOf and one of the alternatives, as one object of keywords. */
  #merge(schema: Node, depth: number): Node {
    const { $ref, allOf, anyOf, oneOf, ...own } = schema;
    let merged: Node = own;
    const add = (other: unknown): void => {
      if (!isNode(other)) return;
      const more = this.#merge(other, depth);
      const both: Record<string, unknown> = { ...more, ...merged };
      for (const [key, value] of Object.entries(more)) {
        const mine = merged[key];
        if (mine === undefined) continue;
        if (key === 'properties') both[key] = mergeProperties(value as Node, mine as Node);
        if (key === 'required') both[key] = [...(mine as []), ...(value as [])];
        if (key.startsWith('max') || key === 'exclusiveMaximum') {
          both[key] = Math.min(mine as number, value as number);
        }
        if (key.startsWith('min')) both[key] = Math.max(mine as number, value as number);
        if (key === 'multipleOf') both[key] = (mine as number) * (value as number);
        if (key === 'enum')
          both[key] = (mine as unknown[]).filter((v) => (value as unknown[]).includes(v));
        if (key === 'type' && mine !== value) both[key] = 'integer';
      }
      merged = both;
    };
    if (typeof $ref === 'string') add(this.#resolve($ref));
    for (const part of (allOf ?? []) as unknown[]) add(part);
    for (const options of [anyOf, oneOf]) {
      if (!Array.isArray(options)) continue;
      // Deep down, what does not go on.
      add(depth > 3 ? options[0] : this.#random.pick(options as unknown[]));
    }
    return merged;
  }

  #resolve(reference: string): unknown {
    let at: unknown = this.#root;
    for (const part of reference.split('/').slice(1)) {
      const key = decodeURIComponent(part).replaceAll('~1', '/').replaceAll('~0', '~');
      at = (at as Node)[key];
    }
    return at;
  }

  #text({ minLength = 0, maxLength = 12 }: Node): string {
    const [least, most] = [minLength as number, maxLength as number];
    const count = least + this.#random.below(most - least + 1);
    const odd = ['"', '\\', '\n', '\u0001', '/', '\u007f', '\ud7ff', '\ue000', '\u{10ffff}', 'é'];
    return Array.from({ length: count }, () =>
      this.#random.below(3) === 0 ? this.#random.pick(odd) : this.#random.text(1),
    ).join('');
  }

  #number(rule: Node, isInteger: boolean): number {
    const random = this.#random;
    const bound = (key: string, other: string): number | undefined =>
      (rule[key] ?? rule[other]) as number | undefined;
    const low = bound('minimum', 'exclusiveMinimum');
    const high = bound('maximum', 'exclusiveMaximum');
    const from = low ?? (high ?? 0) - random.pick([5, 1000, 1e6]);
    const to = high ?? (low ?? 0) + random.pick([5, 1000, 1e6]);
    const step = (rule['multipleOf'] as number | undefined) ?? (isInteger ? 1 : 0);
    const raw =
      random.below(6) === 0
        ? from
        : random.below(6) === 0
          ? to
          : from + random.next() * (to - from);
    if (step > 0) {
      const [least, most] = [Math.ceil(from / step), Math.floor(to / step)];
      return Math.min(most, Math.max(least, Math.round(raw / step))) * step || 0;
    }
    const digits = 1 + random.below(12);
    return Number(Number(raw.toPrecision(digits)).toFixed(12)) || 0;
  }

  #array({ prefixItems = [], items, minItems = 0, maxItems }: Node, depth: number): unknown[] {
    const prefix = prefixItems as unknown[];
    const most =
      (maxItems as number | undefined) ?? (items === false ? prefix.length : prefix.length + 2);
    const least = Math.min(most, minItems as number);
    const count = depth > 3 ? least : least + this.#random.below(most - least + 1);
    return Array.from({ length: count }, (_, i) =>
      this.make(i < prefix.length ? prefix[i] : items, depth + 1),
    );
  }

  #object(rule: Node, depth: number): Record<string, unknown> {
    const random = this.#random;
    const properties = (rule['properties'] ?? {}) as Node;
    const required = (rule['required'] ?? []) as string[];
    const names = new Set([...Object.keys(properties), ...required]);
    const { propertyNames, additionalProperties: others } = rule;
    if (isNode(propertyNames) && Array.isArray(propertyNames['enum'])) {
      for (const name of propertyNames['enum'] as string[]) names.add(name);
    }
    const members: [string, unknown][] = [];
    for (const name of names) {
      const isKept = required.includes(name) || random.below(2) === 0;
      const schema = properties[name] ?? others;
      if (isKept && schema !== false) members.push([name, this.make(schema, depth + 1)]);
    }
    if (isNode(others)) {
      for (let i = random.below(3); i > 0; i -= 1) {
        const name = isNode(propertyNames) ? this.#text(propertyNames) : random.text(3);
        // JSON.stringify spells control characters that have no letter with \u, which names may not have.
        // eslint-disable-next-line no-control-regex
        if (names.has(name) || /[\u0000-\u0007\u000b\u000e-\u001f]/.test(name)) continue;
        if (isNode(propertyNames) && Array.isArray(propertyNames['enum'])) continue;
        members.push([name, this.make(others, depth + 1)]);
      }
    }
    return Object.fromEntries(members);
  }
}

function mergeProperties(a: Node, b: Node): Node {
  const merged: Record<string, unknown> = { ...b, ...a, ...b };
  for (const key of Object.keys(a)) {
    if (isNode(a[key]) && isNode(b[key])) merged[key] = { ...a[key], ...b[key] };
  }
  return merged;
}

/** What is spelled at random: spaces and texts, spaces alone, or nothing, which is JSON.stringify's way. */
export type Freedom = 'all' | 'spaces' | 'none';

/** How freely instances of a schema may be spelled: constants, and classes of rare characters, have one spelling. */
export function freedomOf(schema: unknown): Freedom {
  const source = JSON.stringify(schema);
  if (/"(const|enum)":\[?[^"]*[[{]/.test(source)) return 'none';
  return /"(const|enum)":|\\p\{|\\u\{/.test(source) ? 'spaces' : 'all';
}

/** A value as JSON, members in the order of the value. */
export function spell(value: unknown, random: Random, freedom: Freedom, level = 1): string {
  // Numbers in an interval are spelled without an exponent.
  if (typeof value === 'number' && value !== 0 && Math.abs(value) < 1e-5) {
    return value.toFixed(14);
  }
  if (freedom === 'none' || typeof value === 'number') return JSON.stringify(value);
  if (typeof value === 'string') {
    return freedom === 'all' ? spellText(value, random) : JSON.stringify(value);
  }
  if (typeof value !== 'object' || value === null) return JSON.stringify(value);
  const gap = random.pick([
    '',
    ' ',
    `\n${'  '.repeat(level)}`,
    `\n${'\t'.repeat(Math.min(level, 4))}`,
  ]);
  const end = gap.length > 1 ? gap.slice(0, -1) : gap;
  const colon = random.pick([':', ': ']);
  if (Array.isArray(value)) {
    if (value.length === 0) return random.pick(['[]', '[ ]', '[\n]']);
    const items = value.map((item) => gap + spell(item, random, freedom, level + 1));
    return `[${items.join(',')}${end}]`;
  }
  const members = Object.entries(value).map(
    ([name, member]) =>
      `${gap}${JSON.stringify(name)}${colon}${spell(member, random, freedom, level + 1)}`,
  );
  return members.length === 0 ? random.pick(['{}', '{ }']) : `{${members.join(',')}${end}}`;
}

function spellText(text: string, random: Random): string {
  const letters: Readonly<Record<string, string>> = {
    ...{ '"': '\\"', '\\': '\\\\', '/': '\\/', '\b': '\\b', '\f': '\\f' },
    ...{ '\n': '\\n', '\r': '\\r', '\t': '\\t' },
  };
  const hex = (unit: number): string => {
    const digits = unit.toString(16).padStart(4, '0');
    return `\\u${random.below(2) === 0 ? digits : digits.toUpperCase()}`;
  };
  const spelled = Array.from(text, (character) => {
    const code = character.codePointAt(0)!;
    const isPlain = code >= 0x20 && character !== '"' && character !== '\\';
    const ways = [
      ...(isPlain ? [character, character, character] : []),
      ...(letters[character] === undefined ? [] : [letters[character]]),
      Array.from({ length: character.length }, (_, i) => hex(character.charCodeAt(i))).join(''),
    ];
    return random.pick(ways);
  });
  return `"${spelled.join('')}"`;
}

/** A small change of a text: what a careless writer, or a model without a mask, would do. */
export function mutate(text: string, random: Random): string {
  const characters = Array.from(text);
  const at = random.below(characters.length + 1);
  const alphabet = Array.from('{}[]",:\\ \n0123456789.-+eEtfnulabz_éu/\u0000');
  switch (random.below(6)) {
    case 0:
      return characters.toSpliced(at, 1).join('');
    case 1:
      return characters.toSpliced(at, 0, random.pick(alphabet)).join('');
    case 2:
      return characters.toSpliced(at, 1, random.pick(alphabet)).join('');
    case 3:
      return characters.slice(0, at).join('');
    case 4:
      return characters
        .toSpliced(at, 0, ...characters.slice(at, at + 1 + random.below(9)))
        .join('');
    default:
      return (
        text.replace(/\d+/, (digits) => `${Number(digits) + random.below(2000) - 1000}`) +
        random.pick(['', ',', '}', ']', '"', 'x'])
      );
  }
}
