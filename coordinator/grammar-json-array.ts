/** Arrays of a JSON Schema: a chain over the items so far, which loops where their number no longer matters. */
import type { JsonWriter } from './grammar-json.js';
import type { Conjunction, Flats } from './json-schema.js';

/** Subsets of values are states of the automaton: each value more doubles them. */
const MAX_UNIQUE_VALUES = 8;

/** Writes the arrays that satisfy all of these schemas. */
export function writeItems(writer: JsonWriter, from: number, flats: Flats, to: number): void {
  const { builder, document } = writer;
  const unique = flats.find((flat) => flat['uniqueItems'] === true);
  const most = document.countOf(flats, 'maxItems');
  const prefixes = flats.map((flat) => {
    const { prefixItems } = flat;
    if (prefixItems === undefined) return [];
    if (!Array.isArray(prefixItems)) return document.refuse(flat, 'prefixItems: must be a list');
    return prefixItems.map((item) => document.asSchema(item, 'prefixItems'));
  });
  const prefixCount = Math.max(0, ...prefixes.map(({ length }) => length));
  /** What the item at an index must satisfy. */
  const itemAt = (index: number): Conjunction =>
    flats.flatMap((flat, i): Conjunction => {
      const own = prefixes[i]!;
      if (index < own.length) return [own[index]!];
      const { items } = flat;
      if (Array.isArray(items)) document.refuse(flat, 'items: a list is prefixItems since 2020-12');
      return items === undefined ? [] : [document.asSchema(items, 'items')];
    });
  const asked = document.countOf(flats, 'minItems');
  if (unique !== undefined && (most === null || most > 1)) {
    const values = prefixCount > 0 ? null : writer.finiteValues(itemAt(0));
    if (values === null || values.length > MAX_UNIQUE_VALUES) {
      return document.refuse(
        unique,
        `uniqueItems: needs items of an enum of at most ${MAX_UNIQUE_VALUES} values, or maxItems 1`,
      );
    }
    writeSubsets(writer, from, values, { least: asked ?? 0, most: most ?? values.length }, to);
    return;
  }
  // Tuples are whole, and nothing follows them, unless the schema says otherwise.
  const least = asked ?? prefixCount;
  const isTuple = prefixCount > 0 && flats.every(({ items }) => items === undefined);
  const limit = isTuple && most === null ? Math.max(prefixCount, least) : most;
  if (limit !== null && limit < least) return;

  const first = builder.text(from, '[');
  const close = builder.state();
  builder.bytes(close, 0x5d, 0x5d, to);
  if (least === 0) writer.space(first, close);
  const chainLength = limit ?? Math.max(1, least, prefixCount + 1);
  let before = first;
  for (let index = 0; index < chainLength; index += 1) {
    const start = builder.state();
    writer.space(before, start);
    const after = builder.state();
    writer.value(start, itemAt(index), after);
    if (index + 1 >= least) writer.space(after, close);
    const isLoop = limit === null && index === chainLength - 1;
    if (isLoop) builder.bytes(after, 0x2c, 0x2c, before === first ? commaLoop(start) : before);
    else if (index + 1 < chainLength) before = builder.text(after, ',');
  }

  /** With one item in the chain, what follows its comma is the space before the next. */
  function commaLoop(start: number): number {
    const next = builder.state();
    writer.space(next, start);
    return next;
  }
}

/** Arrays of values that are all different, in any order: a place for each set of values that have been. */
function writeSubsets(
  writer: JsonWriter,
  from: number,
  values: readonly string[],
  { least, most }: { readonly least: number; readonly most: number },
  to: number,
): void {
  const { builder } = writer;
  if (least > values.length || most < least) return;
  const close = builder.state();
  builder.bytes(close, 0x5d, 0x5d, to);
  const first = builder.text(from, '[');
  if (least === 0) writer.space(first, close);
  /** Where the next item begins, after `[` or a comma, by the set of those before. */
  const places = new Map<number, number>();
  const placeOf = (set: number): number => {
    let place = places.get(set);
    if (place === undefined) places.set(set, (place = builder.state()));
    return place;
  };
  writer.space(first, placeOf(0));
  for (let set = 0; set < 1 << values.length; set += 1) {
    const count = bitCount(set);
    if (count >= most) continue;
    values.forEach((value, i) => {
      const bit = 1 << i;
      if ((set & bit) !== 0) return;
      const after = builder.state();
      builder.oneOf(placeOf(set), [value], after);
      if (count + 1 >= least) writer.space(after, close);
      if (count + 1 < most && count + 1 < values.length) {
        writer.space(builder.text(after, ','), placeOf(set | bit));
      }
    });
  }
}

function bitCount(bits: number): number {
  let count = 0;
  for (let rest = bits; rest > 0; rest &= rest - 1) count += 1;
  return count;
}
