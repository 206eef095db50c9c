/** Arrays of a JSON Schema: a chain over the items so far, which loops where their number no longer matters. */
import type { JsonWriter } from './grammar-json.js';
import type { Conjunction, Flats } from './json-schema.js';

/** Writes the arrays that satisfy all of these schemas. */
export function writeItems(writer: JsonWriter, from: number, flats: Flats, to: number): void {
  const { builder, document } = writer;
  const unique = flats.find((flat) => flat['uniqueItems'] === true);
  const most = document.countOf(flats, 'maxItems');
  if (unique !== undefined && (most === null || most > 1)) {
    document.refuse(unique, 'uniqueItems is not supported');
  }
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
