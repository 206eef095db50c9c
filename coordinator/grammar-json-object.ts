/**
 * Objects of a JSON Schema. An automaton over (property, members so far): a property that is not required may be passed over.
 *
 *   {  ──> name 0 ──"a":…──> after 1 ──,──> name 1 ──"b":…──> after 2 ──> }
 *             └─ a is optional ─> name 1 ──"b":…──> …
 *
 * The count goes no further than it matters: to 1, for the comma, or to what minProperties and maxProperties ask.
 */
import type { JsonWriter } from './grammar-json.js';
import { parseRegex } from './grammar-regex.js';
import { TextSet } from './grammar-text.js';
import { isObject, requiredOf, type Conjunction, type Flats, type Schema } from './json-schema.js';

const MAX_COUNTED = 64;

/** Members beyond the declared ones. */
interface Others {
  /** Null for any name. */
  readonly names: TextSet | null;
  readonly value: Conjunction;
}

interface Members {
  /** In order. */
  readonly declared: readonly {
    readonly name: string;
    readonly value: Conjunction;
    readonly isRequired: boolean;
  }[];
  readonly others: Others | null;
}

/** Writes the objects that satisfy all of these schemas. */
export function writeMembers(writer: JsonWriter, from: number, flats: Flats, to: number): void {
  const { builder, document } = writer;
  const { declared, others } = membersOf(writer, flats);
  const requiredCount = declared.filter(({ isRequired }) => isRequired).length;
  const least = Math.max(document.countOf(flats, 'minProperties') ?? 0, requiredCount);
  const most = document.countOf(flats, 'maxProperties');
  const isCounted =
    least > requiredCount || (most !== null && (others !== null || most < declared.length));
  const cap = isCounted ? Math.max(1, least, most === null ? 0 : most + 1) : 1;
  if (cap > MAX_COUNTED) {
    document.refuse(
      flats[0]!,
      `minProperties, maxProperties: at most ${MAX_COUNTED - 1} are counted`,
    );
  }
  // Names beyond the declared ones may repeat, and a repeated name is one member.
  if (others !== null && least > requiredCount + 1) {
    document.refuse(
      flats[0]!,
      'minProperties: more than one member of a name that is not declared cannot be asked for',
    );
  }
  const states = new Map<string, number>();
  const stateOf = (kind: 'after' | 'name', index: number, count: number): number => {
    const name = `${kind} ${index} ${count}`;
    let state = states.get(name);
    if (state === undefined) states.set(name, (state = builder.state()));
    return state;
  };
  const isFull = (count: number): boolean => isCounted && most !== null && count >= most;
  const last = declared.length;
  const firstClosable = declared.findLastIndex(({ isRequired }) => isRequired) + 1;
  const close = builder.state();
  const queue: (readonly [index: number, count: number])[] = [];
  const seen = new Set<string>();
  /** After a member (or the brace): another one, or the end. */
  const reach = (index: number, count: number): number => {
    const at = stateOf('after', index, count);
    const name = `${index} ${count}`;
    if (!seen.has(name)) {
      seen.add(name);
      queue.push([index, count]);
    }
    return at;
  };
  builder.epsilon(builder.text(from, '{'), reach(0, 0));
  const named = new Set<string>();
  const values = new Map<string, number>();
  for (let next = queue.pop(); next !== undefined; next = queue.pop()) {
    const [index, count] = next;
    const after = stateOf('after', index, count);
    if (index >= firstClosable && (!isCounted || count >= least)) writer.space(after, close);
    if (isFull(count)) continue;
    const comma = count === 0 ? after : builder.text(after, ',');
    writer.space(comma, stateOf('name', index, count));
    for (let i = index; i <= last && !named.has(`${i} ${count}`); i += 1) {
      named.add(`${i} ${count}`);
      writeName(i, count);
      if (declared[i]?.isRequired !== false) break;
      builder.epsilon(stateOf('name', i, count), stateOf('name', i + 1, count));
    }
  }
  builder.bytes(close, 0x7d, 0x7d, to);

  /** The names that may stand at a property's turn, each with its value. */
  function writeName(index: number, count: number): void {
    const begin = stateOf('name', index, count);
    const nextCount = Math.min(cap, count + 1);
    const property = declared[index];
    if (property !== undefined) {
      const key = `${index} ${nextCount}`;
      let first = values.get(key);
      if (first === undefined) {
        values.set(key, (first = builder.state()));
        const colon = builder.text(first, JSON.stringify(property.name.toWellFormed()));
        writer.value(writer.colon(colon), property.value, reach(index + 1, nextCount));
      }
      builder.epsilon(begin, first);
    } else if (others !== null) {
      const names = declared.map(({ name }) => name);
      const free = names.length === 0 ? null : TextSet.except(names);
      const keys =
        others.names === null ? free : free === null ? others.names : others.names.and(free);
      const colon = builder.state();
      writer.string(begin, keys, colon, 'canonical');
      writer.value(writer.colon(colon), others.value, reach(last, nextCount));
    }
  }
}

function membersOf(writer: JsonWriter, flats: Flats): Members {
  const { document } = writer;
  const required = new Set(requiredOf(flats));
  const names = new Set<string>();
  let isClosed = false;
  let isOpen = true;
  const otherValues: Schema[] = [];
  let isOtherGiven = false;
  let otherNames: TextSet | null = null;
  let onlyNames: readonly string[] | null = null;
  for (const flat of flats) {
    const { properties, additionalProperties, patternProperties, propertyNames } = flat;
    if (properties !== undefined) {
      if (!isObject(properties)) document.refuse(flat, 'properties: must be an object');
      for (const name of Object.keys(properties as object)) names.add(name);
      isOpen = false;
    }
    if (additionalProperties === false || flat['unevaluatedProperties'] === false) {
      isClosed = true;
    } else if (additionalProperties !== undefined) {
      isOtherGiven = true;
      otherValues.push(document.asSchema(additionalProperties, 'additionalProperties'));
    }
    if (propertyNames !== undefined && propertyNames !== true) {
      const keys = document.expand([document.asSchema(propertyNames, 'propertyNames')]);
      if (keys.length !== 1) document.refuse(flat, 'propertyNames: alternatives are not supported');
      const values = document.valuesOf(keys[0]!);
      if (values !== null) {
        onlyNames = values.flatMap((text) => {
          const value: unknown = JSON.parse(text);
          return typeof value === 'string' ? [value] : [];
        });
      }
      otherNames = values === null ? writer.textsOf(keys[0]!) : null;
    }
    if (patternProperties !== undefined) {
      const entries = isObject(patternProperties) ? Object.entries(patternProperties) : [];
      const isAlone = properties === undefined && isClosedOrAbsent(additionalProperties);
      if (entries.length !== 1 || !isAlone || flats.length > 1) {
        document.refuse(
          flat,
          'patternProperties: one pattern is supported, without properties and other members beside it',
        );
      }
      const [pattern, value] = entries[0]!;
      const texts = TextSet.of(parseRegex(pattern, 'part'));
      return {
        declared: [...required].map((name) => ({
          name,
          value: document.refuse(flat, `required ${name}: beside patternProperties`),
          isRequired: true,
        })),
        others: { names: texts, value: [document.asSchema(value, 'patternProperties')] },
      };
    }
  }
  for (const name of required) names.add(name);
  for (const name of onlyNames ?? []) names.add(name);
  if (otherNames !== null && names.size > 0) {
    document.refuse(flats[0]!, 'propertyNames: beside declared properties only enum is supported');
  }
  const valueOf = (name: string): Conjunction =>
    flats.flatMap((flat): Conjunction => {
      const { properties, additionalProperties: others } = flat;
      if (isObject(properties) && Object.hasOwn(properties, name)) {
        return [document.asSchema(properties[name], `${document.pathOf(flat)}.properties.${name}`)];
      }
      return others === undefined ? [] : [document.asSchema(others, 'additionalProperties')];
    });
  const declared = [...names]
    .filter((name) => onlyNames === null || onlyNames.includes(name) || required.has(name))
    .map((name) => {
      const isForbidden = onlyNames !== null && !onlyNames.includes(name);
      return {
        name,
        value: isForbidden ? [false] : valueOf(name),
        isRequired: required.has(name),
      };
    });
  const hasOthers = !isClosed && onlyNames === null && (isOpen || isOtherGiven);
  return { declared, others: hasOthers ? { names: otherNames, value: otherValues } : null };
}

const isClosedOrAbsent = (value: unknown): boolean => value === undefined || value === false;
