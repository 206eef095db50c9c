/**
 * JSON Schema (draft 2020-12) as far as an automaton can follow it: references are resolved, what stands beside each other
 * or in `allOf` becomes one, and alternatives are listed. What is not supported is refused with its place, never passed over.
 */
import { CaravanError } from '../proto/errors.js';

export type JsonType = 'string' | 'number' | 'boolean' | 'null' | 'object' | 'array';
export type SchemaObject = Readonly<Record<string, unknown>>;
export type Schema = SchemaObject | boolean;
/** Schemas that must all hold. */
export type Conjunction = readonly Schema[];

/** One alternative: objects whose own keywords must all hold, without references and alternatives. */
export type Flats = readonly SchemaObject[];

const MAX_DEPTH = 128;
const MAX_NODES = 20_000;
const MAX_CHARACTERS = 1 << 19;
const MAX_ALTERNATIVES = 256;
const MAX_REFERENCE_CHAIN = 64;

/** Keywords that restrict values in ways that are not supported. */
const UNSUPPORTED = [
  ...['not', 'if', 'then', 'else', 'dependentRequired', 'dependentSchemas', 'dependencies'],
  ...['contains', 'minContains', 'maxContains', 'unevaluatedItems', '$dynamicRef', '$recursiveRef'],
];

const ALL_TYPES: readonly JsonType[] = ['object', 'array', 'string', 'number', 'boolean', 'null'];

export class SchemaDocument {
  readonly #root: Schema;
  readonly #paths = new Map<object, string>();
  readonly #ids = new Map<object, number>();
  readonly #expanded = new Map<object, readonly Flats[]>();

  /** @throws CaravanError `invalid_request` when it is no schema, too deep or too large. */
  constructor(root: unknown) {
    this.#measure(root);
    this.#root = this.asSchema(root, 'the schema');
  }

  get root(): Schema {
    return this.#root;
  }

  /** @throws CaravanError naming the schema's place. */
  refuse(schema: object, message: string): never {
    const path = this.#paths.get(schema) ?? '';
    throw new CaravanError('invalid_request', `${path === '' ? 'the schema' : path}: ${message}`);
  }

  asSchema(value: unknown, place: string): Schema {
    if (typeof value === 'boolean' || isObject(value)) return value;
    throw new CaravanError('invalid_request', `${place}: must be an object or a boolean`);
  }

  /** A name that two conjunctions share exactly when they are of the same schemas. */
  nameOf(conjunction: Conjunction): string {
    const ids = conjunction.map((schema) => {
      if (typeof schema === 'boolean') return schema ? -1 : -2;
      let id = this.#ids.get(schema);
      if (id === undefined) this.#ids.set(schema, (id = this.#ids.size));
      return id;
    });
    return [...new Set(ids)].sort((a, b) => a - b).join('&');
  }

  pathOf(schema: Schema | undefined): string {
    return (typeof schema === 'object' && this.#paths.get(schema)) || 'the schema';
  }

  /** The alternatives of a conjunction; none when nothing can satisfy it. */
  expand(conjunction: Conjunction): readonly Flats[] {
    let all: readonly Flats[] = [[]];
    for (const schema of conjunction) all = this.#cross(all, this.#expandOne(schema, []), schema);
    return all;
  }

  #expandOne(schema: Schema, path: readonly object[]): readonly Flats[] {
    if (typeof schema === 'boolean') return schema ? [[]] : [];
    if (path.includes(schema)) {
      this.refuse(schema, '$ref leads back to itself without any progress');
    }
    if (path.length > MAX_REFERENCE_CHAIN) {
      this.refuse(schema, `more than ${MAX_REFERENCE_CHAIN} references and alternatives in a row`);
    }
    const known = this.#expanded.get(schema);
    if (known !== undefined) return known;
    for (const keyword of UNSUPPORTED) {
      if (Object.hasOwn(schema, keyword)) this.refuse(schema, `${keyword} is not supported`);
    }
    const below = [...path, schema];
    let all: readonly Flats[] = [[schema]];
    const reference = schema['$ref'];
    if (reference !== undefined) {
      all = this.#cross(all, this.#expandOne(this.#resolve(schema, reference), below), schema);
    }
    for (const part of this.#listOf(schema, 'allOf') ?? []) {
      all = this.#cross(all, this.#expandOne(part, below), schema);
    }
    for (const keyword of ['anyOf', 'oneOf'] as const) {
      const options = this.#listOf(schema, keyword);
      if (options === null) continue;
      const each = options.map((option) => this.#expandOne(option, below));
      if (keyword === 'oneOf') this.#checkDisjoint(schema, each);
      all = this.#cross(all, each.flat(), schema);
    }
    this.#expanded.set(schema, all);
    return all;
  }

  #cross(left: readonly Flats[], right: readonly Flats[], schema: Schema): readonly Flats[] {
    if (left.length * right.length > MAX_ALTERNATIVES && typeof schema === 'object') {
      this.refuse(schema, `has more than ${MAX_ALTERNATIVES} alternatives`);
    }
    return left.flatMap((a) => right.map((b) => [...new Set([...a, ...b])]));
  }

  #listOf(schema: SchemaObject, keyword: string): readonly Schema[] | null {
    const list = schema[keyword];
    if (list === undefined) return null;
    if (!Array.isArray(list) || list.length === 0) {
      return this.refuse(schema, `${keyword}: must be a list of schemas`);
    }
    return list.map((item) => this.asSchema(item, `${this.pathOf(schema)}.${keyword}`));
  }

  #resolve(schema: SchemaObject, reference: unknown): Schema {
    if (typeof reference !== 'string' || !/^#(\/|$)/.test(reference)) {
      return this.refuse(schema, `$ref ${JSON.stringify(reference)}: must be #, or begin with #/`);
    }
    let at: unknown = this.#root;
    for (const part of reference.split('/').slice(1)) {
      let key = part;
      try {
        key = decodeURIComponent(part);
      } catch {
        // A % that encodes nothing is a % of the name.
      }
      key = key.replaceAll('~1', '/').replaceAll('~0', '~');
      at =
        typeof at === 'object' && at !== null && Object.hasOwn(at, key) ? at[key as never] : null;
    }
    if (typeof at === 'boolean' || isObject(at)) return at;
    return this.refuse(schema, `$ref ${JSON.stringify(reference)}: there is no such schema`);
  }

  /** `oneOf` is `anyOf` where no value can satisfy two of its schemas: that must be seen from types or constants. */
  #checkDisjoint(schema: SchemaObject, options: readonly (readonly Flats[])[]): void {
    options.forEach((option, i) => {
      for (const other of options.slice(i + 1)) {
        for (const a of option) {
          for (const b of other) {
            if (!this.#areDisjoint(a, b)) {
              this.refuse(
                schema,
                'oneOf: two of its schemas do not differ in type or in a required constant; use anyOf',
              );
            }
          }
        }
      }
    });
  }

  #areDisjoint(a: Flats, b: Flats): boolean {
    const shared = this.typesOf(a).types.filter((type) => this.typesOf(b).types.includes(type));
    if (shared.length === 0) return true;
    const [valuesA, valuesB] = [this.valuesOf(a), this.valuesOf(b)];
    if (valuesA !== null && valuesB !== null) {
      return !valuesA.some((value) => valuesB.includes(value));
    }
    const others = valuesA === null ? this.typesOf(a).types : this.typesOf(b).types;
    const values = valuesA ?? valuesB;
    if (values?.every((text) => !others.includes(jsonTypeOf(JSON.parse(text)))) === true)
      return true;
    if (shared.join() !== 'object') return false;
    const required = requiredOf(a).filter((name) => requiredOf(b).includes(name));
    return required.some((name) => {
      const [ofA, ofB] = [a, b].map((flats) =>
        flats.flatMap((flat) => {
          const { properties } = flat;
          const property = isObject(properties) ? properties[name] : undefined;
          return isObject(property) ? [property] : [];
        }),
      );
      const [constantsA, constantsB] = [this.valuesOf(ofA!), this.valuesOf(ofB!)];
      if (constantsA === null || constantsB === null) return false;
      return !constantsA.some((value) => constantsB.includes(value));
    });
  }

  /** The types that an alternative allows. */
  typesOf(flats: Flats): { readonly types: readonly JsonType[]; readonly isInteger: boolean } {
    let types = ALL_TYPES;
    let isInteger = false;
    for (const flat of flats) {
      const { type } = flat;
      if (type === undefined) continue;
      const named: readonly unknown[] = Array.isArray(type) ? type : [type];
      const alien = named.find(
        (name) => name !== 'integer' && !ALL_TYPES.includes(name as JsonType),
      );
      if (alien !== undefined || named.length === 0) {
        this.refuse(
          flat,
          `type ${JSON.stringify(type)}: must be of ${ALL_TYPES.join(', ')}, integer`,
        );
      }
      if (named.includes('integer') && !named.includes('number')) isInteger = true;
      const allowed = new Set(named.map((name) => (name === 'integer' ? 'number' : name)));
      if (flat['nullable'] === true) allowed.add('null');
      types = types.filter((name) => allowed.has(name));
    }
    return { types, isInteger };
  }

  /** The values that `enum` and `const` leave, as compact JSON; null where there is neither. */
  valuesOf(flats: Flats): readonly string[] | null {
    let values: readonly string[] | null = null;
    const keep = (given: readonly unknown[]): void => {
      const texts = given.map((value) => JSON.stringify(value));
      values = values === null ? texts : values.filter((text) => texts.includes(text));
    };
    for (const flat of flats) {
      const list = flat['enum'];
      if (list !== undefined) {
        if (!Array.isArray(list) || list.length === 0) this.refuse(flat, 'enum: must be a list');
        keep(list as unknown[]);
      }
      if (Object.hasOwn(flat, 'const')) keep([flat['const']]);
    }
    return values;
  }

  /** A count that several schemas may give: the strictest. */
  countOf(flats: Flats, keyword: string): number | null {
    const counts = flats.flatMap((flat) => {
      const count = flat[keyword];
      if (count === undefined) return [];
      if (!Number.isSafeInteger(count) || (count as number) < 0) {
        this.refuse(flat, `${keyword} ${JSON.stringify(count)}: must be a count`);
      }
      return [count as number];
    });
    if (counts.length === 0) return null;
    return keyword.startsWith('min') ? Math.max(...counts) : Math.min(...counts);
  }

  /** Looks at every node once, without recursion: what is too deep must not reach a stack. */
  #measure(root: unknown): void {
    const stack: { value: unknown; path: string; depth: number }[] = [
      { value: root, path: '', depth: 1 },
    ];
    let nodes = 0;
    let characters = 0;
    for (let item = stack.pop(); item !== undefined; item = stack.pop()) {
      const { value, path, depth } = item;
      nodes += 1;
      if (typeof value === 'string') characters += value.length;
      if (characters > MAX_CHARACTERS) tooLarge(`has more than ${MAX_CHARACTERS} characters`);
      if (depth > MAX_DEPTH) tooLarge(`is more than ${MAX_DEPTH} levels deep`);
      if (typeof value !== 'object' || value === null) continue;
      this.#paths.set(value, path.slice(1));
      for (const [key, child] of Object.entries(value)) {
        characters += key.length;
        if (nodes + stack.length > MAX_NODES) tooLarge(`has more than ${MAX_NODES} values`);
        stack.push({ value: child, path: `${path}.${key.slice(0, 80)}`, depth: depth + 1 });
      }
    }
  }
}

/** The type of a JSON value. */
export function jsonTypeOf(value: unknown): JsonType {
  if (value === null) return 'null';
  return Array.isArray(value) ? 'array' : (typeof value as JsonType);
}

const tooLarge = (what: string): never => {
  throw new CaravanError('invalid_request', `the schema ${what}`);
};

export const isObject = (value: unknown): value is SchemaObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

export const requiredOf = (flats: Flats): readonly string[] =>
  flats.flatMap((flat) => {
    const { required } = flat;
    return Array.isArray(required) ? required.filter((name) => typeof name === 'string') : [];
  });
