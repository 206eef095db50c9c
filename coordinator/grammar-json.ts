/**
 * A JSON Schema as a grammar: one rule for each set of schemas that must hold of one value.
 *
 * Properties come in the schema's order. Between tokens of JSON stands nothing, one space, or a new line with at most 16
 * spaces or 4 tabs of indentation; after a colon nothing or one space: whitespace cannot go on for ever.
 */
import { CaravanError } from '../proto/errors.js';
import { writeMembers } from './grammar-json-object.js';
import { writeItems } from './grammar-json-array.js';
import { NfaBuilder, type Nfa, type Rule } from './grammar-nfa.js';
import { writeNumber, type Bound } from './grammar-number.js';
import { ANY } from './grammar-expression.js';
import { formatExpression, FORMATS } from './grammar-format.js';
import { parseRegex } from './grammar-regex.js';
import { SHORT_LENGTH, TextSet, writeClass, type Spelling } from './grammar-text.js';
import {
  jsonTypeOf,
  SchemaDocument,
  type Conjunction,
  type Flats,
  type JsonType,
} from './json-schema.js';

const MAX_RULES = 5_000;
const MAX_VALUES = 10_000;

/** The grammar of the JSON texts that satisfy a schema. @throws CaravanError `invalid_request`. */
export function compileJsonSchema(schema: unknown): Nfa {
  const document = new SchemaDocument(schema);
  const writer = new JsonWriter(document);
  return writer.finish([document.root]);
}

/** Writes values into a grammar. */
export class JsonWriter {
  readonly builder = new NfaBuilder();
  readonly document: SchemaDocument;
  readonly #rules = new Map<string, Rule>();
  readonly #waiting: { rule: Rule; conjunction: Conjunction }[] = [];
  #space: Rule | null = null;
  #character: Rule | null = null;
  #valueCount = 0;

  constructor(document: SchemaDocument) {
    this.document = document;
  }

  /** Nothing that stands before the value is part of it but one space: a model's first word may bring it. */
  finish(conjunction: Conjunction): Nfa {
    const { builder } = this;
    const start = builder.rule('the schema');
    const at = builder.state();
    builder.epsilon(start.start, at);
    builder.bytes(start.start, 0x20, 0x20, at);
    this.value(at, conjunction, start.end);
    return this.close(start);
  }

  /** Writes the rules that were called, and ends. */
  close(start: Rule): Nfa {
    for (let next = this.#waiting.pop(); next !== undefined; next = this.#waiting.pop()) {
      this.#writeRule(next.rule, next.conjunction);
    }
    return this.builder.finish(start);
  }

  /** A value that satisfies all schemas: a call of their rule. */
  value(from: number, conjunction: Conjunction, to: number): void {
    const { document, builder } = this;
    if (conjunction.includes(false)) return;
    const schemas = conjunction.filter((schema) => schema !== true);
    const name = document.nameOf(schemas);
    let rule = this.#rules.get(name);
    if (rule === undefined) {
      if (this.#rules.size >= MAX_RULES) {
        throw new CaravanError('invalid_request', `the schema needs more than ${MAX_RULES} rules`);
      }
      rule = builder.rule(document.pathOf(schemas[0]));
      this.#rules.set(name, rule);
      this.#waiting.push({ rule, conjunction: schemas });
    }
    builder.call(from, rule, to);
  }

  /** Whitespace where a person might break the line. */
  space(from: number, to: number): void {
    const { builder } = this;
    if (this.#space === null) {
      this.#space = builder.rule('whitespace');
      const { start, end } = this.#space;
      builder.epsilon(start, end);
      builder.bytes(start, 0x20, 0x20, end);
      for (const [byte, most] of [
        [0x20, 16],
        [0x09, 4],
      ] as const) {
        let at = builder.state();
        builder.bytes(start, 0x0a, 0x0a, at);
        for (let i = 0; i < most; i += 1) {
          const next = builder.state();
          builder.epsilon(at, end);
          builder.bytes(at, byte, byte, next);
          at = next;
        }
        builder.epsilon(at, end);
      }
    }
    builder.call(from, this.#space, to);
  }

  /** `: `, with or without the space. @returns where the value begins. */
  colon(from: number): number {
    const { builder } = this;
    const at = builder.text(from, ':');
    const after = builder.state();
    builder.epsilon(at, after);
    builder.bytes(at, 0x20, 0x20, after);
    return after;
  }

  /** The texts that keywords of strings allow; null for all. */
  textsOf(flats: Flats): TextSet | null {
    const { document } = this;
    let texts: TextSet | null = null;
    const meet = (more: TextSet): void => {
      texts = texts === null ? more : texts.and(more);
    };
    const [least, most] = [
      document.countOf(flats, 'minLength') ?? 0,
      document.countOf(flats, 'maxLength'),
    ];
    for (const flat of flats) {
      const { pattern, format } = flat;
      if (pattern !== undefined) {
        if (typeof pattern !== 'string') document.refuse(flat, 'pattern: must be a text');
        meet(
          this.#within(flat, 'pattern', () => TextSet.of(parseRegex(pattern as string, 'part'))),
        );
      }
      if (format !== undefined) {
        const expression = typeof format === 'string' ? formatExpression(format) : null;
        if (expression === null) {
          const known = FORMATS.join(', ');
          document.refuse(flat, `format ${JSON.stringify(format)}: must be one of ${known}`);
        }
        meet(TextSet.of(expression!));
      }
    }
    if (least > 0 || most !== null) {
      if (most !== null && most < least) return TextSet.of({ kind: 'choice', options: [] });
      const first = flats.find((flat) => 'minLength' in flat || 'maxLength' in flat)!;
      meet(this.#within(first, 'minLength, maxLength', () => TextSet.ofLength(least, most)));
    }
    return texts;
  }

  /** A JSON string of these texts. */
  string(from: number, texts: TextSet | null, to: number, spelling: Spelling): void {
    const { builder } = this;
    const first = builder.text(from, '"');
    const last = builder.state();
    const set = texts ?? TextSet.ofLength(0, null);
    const isLong = spelling === 'json' && set.edges.length > 3 * SHORT_LENGTH;
    set.write(builder, first, last, spelling, isLong ? this.#anyCharacter() : null);
    builder.bytes(last, 0x22, 0x22, to);
  }

  #anyCharacter(): Rule {
    if (this.#character === null) {
      this.#character = this.builder.rule('character');
      writeClass(this.builder, this.#character.start, ANY, this.#character.end, 'json');
    }
    return this.#character;
  }

  #writeRule({ start, end }: Rule, conjunction: Conjunction): void {
    const { document, builder } = this;
    for (const flats of document.expand(conjunction)) {
      const { types, isInteger } = document.typesOf(flats);
      const values = document.valuesOf(flats);
      if (values !== null) {
        this.#values(start, flats, values, end);
        continue;
      }
      for (const type of types) {
        switch (type) {
          case 'null':
            builder.oneOf(start, ['null'], end);
            break;
          case 'boolean':
            builder.oneOf(start, ['true', 'false'], end);
            break;
          case 'string':
            this.string(start, this.textsOf(flats), end, 'json');
            break;
          case 'number':
            writeNumber(builder, start, end, { ...this.#numberRule(flats), isInteger });
            break;
          case 'object':
            writeMembers(this, start, flats, end);
            break;
          case 'array':
            writeItems(this, start, flats, end);
            break;
        }
      }
    }
  }

  #values(from: number, flats: Flats, values: readonly string[], to: number): void {
    const allowed = this.#allowed(flats, values);
    this.#valueCount += allowed.length;
    if (this.#valueCount > MAX_VALUES) {
      throw new CaravanError(
        'invalid_request',
        `the schema has more than ${MAX_VALUES} values in enum`,
      );
    }
    this.builder.oneOf(from, allowed, to);
  }

  /** All values that satisfy these schemas, as compact JSON; null where `enum`, `const` and types do not name them. */
  finiteValues(conjunction: Conjunction): readonly string[] | null {
    const { document } = this;
    const all = new Set<string>();
    for (const flats of document.expand(conjunction)) {
      const { types } = document.typesOf(flats);
      const values = document.valuesOf(flats);
      const isNamed = values !== null || types.every((type) => type in CONSTANTS);
      if (!isNamed) return null;
      const named = values ?? types.flatMap((type) => CONSTANTS[type] ?? []);
      for (const text of this.#allowed(flats, named)) all.add(text);
    }
    return [...all];
  }

  /** The values that fit the types beside them. */
  #allowed(flats: Flats, values: readonly string[]): readonly string[] {
    const { document } = this;
    const { types, isInteger } = document.typesOf(flats);
    const beside = flats.find((flat) =>
      VALUE_RULES.some((keyword) => Object.hasOwn(flat, keyword)),
    );
    if (beside !== undefined) {
      document.refuse(beside, 'enum or const beside other rules for its values is not supported');
    }
    return values.filter((text) => {
      const value: unknown = JSON.parse(text);
      if (typeof value === 'number' && isInteger && !Number.isInteger(value)) return false;
      return types.includes(jsonTypeOf(value));
    });
  }

  #numberRule(flats: Flats) {
    const { document } = this;
    let low: Bound | null = null;
    let high: Bound | null = null;
    const multipleOf: number[] = [];
    for (const flat of flats) {
      const numberOf = (keyword: string): number | null => {
        const value = flat[keyword];
        if (value === undefined) return null;
        if (typeof value !== 'number') document.refuse(flat, `${keyword}: must be a number`);
        return value as number;
      };
      for (const [keyword, isExclusive] of [
        ['minimum', false],
        ['exclusiveMinimum', true],
      ] as const) {
        const value = numberOf(keyword);
        const isStricter: boolean =
          value !== null &&
          (low === null || value > low.value || (value === low.value && isExclusive));
        if (isStricter) low = { value: value!, isExclusive };
      }
      for (const [keyword, isExclusive] of [
        ['maximum', false],
        ['exclusiveMaximum', true],
      ] as const) {
        const value = numberOf(keyword);
        const isStricter: boolean =
          value !== null &&
          (high === null || value < high.value || (value === high.value && isExclusive));
        if (isStricter) high = { value: value!, isExclusive };
      }
      const step = numberOf('multipleOf');
      if (step !== null && step <= 0) document.refuse(flat, 'multipleOf: must be above 0');
      if (step !== null) multipleOf.push(step);
    }
    return { low: low, high: high, multipleOf };
  }

  /** Names the place of a refusal. */
  #within<T>(flat: Flats[number], keyword: string, make: () => T): T {
    try {
      return make();
    } catch (thrown) {
      if (!(thrown instanceof CaravanError)) throw thrown;
      return this.document.refuse(flat, `${keyword}: ${thrown.message}`);
    }
  }
}

/** The values of types that have few. */
const CONSTANTS: Readonly<Partial<Record<JsonType, readonly string[]>>> = {
  null: ['null'],
  boolean: ['true', 'false'],
};

/** Keywords that say more of a value than its type. */
const VALUE_RULES = [
  ...['minLength', 'maxLength', 'pattern', 'format', 'minimum', 'maximum', 'exclusiveMinimum'],
  ...['exclusiveMaximum', 'multipleOf', 'properties', 'required', 'items', 'prefixItems'],
  ...['minItems', 'maxItems', 'additionalProperties', 'minProperties', 'maxProperties'],
];
