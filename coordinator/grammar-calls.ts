/** The texts of an answer that may call tools: see tool-calls. */
import { ANY, complement, intersection } from './grammar-expression.js';
import type { CallsSpec } from './grammar.js';
import { JsonWriter } from './grammar-json.js';
import type { Nfa } from './grammar-nfa.js';
import { writeClass } from './grammar-text.js';
import { SchemaDocument } from './json-schema.js';
import { CALL_OPENERS } from './tool-calls.js';

/** @throws CaravanError `invalid_request`. */
export function compileCalls({ style, schema, calls, orText }: CallsSpec): Nfa {
  const document = new SchemaDocument(schema);
  const writer = new JsonWriter(document);
  const { builder } = writer;
  const rule = builder.rule('the answer');
  const start = builder.state();
  builder.epsilon(rule.start, start);
  builder.bytes(rule.start, 0x20, 0x20, start);
  let at = style === 'array' ? builder.text(start, '[') : start;
  for (let i = 0; i < calls; i += 1) {
    const begin = style === 'array' ? at : builder.text(at, '<tool_call>\n');
    const end = builder.state();
    writer.value(begin, [document.root], end);
    if (style === 'array') {
      builder.bytes(end, 0x5d, 0x5d, rule.end);
      at = builder.state();
      writer.space(builder.text(end, ','), at);
    } else {
      const closed = builder.text(end, '\n</tool_call>');
      builder.epsilon(closed, rule.end);
      at = builder.text(closed, '\n');
    }
  }
  if (orText) {
    const opener = CALL_OPENERS[style].codePointAt(0)!;
    const spaces = [
      [0x09, 0x0d],
      [0x20, 0x20],
      [0x85, 0x85],
      [0xa0, 0xa0],
      [0x1680, 0x1680],
      [0x2000, 0x200a],
      [0x2028, 0x2029],
      [0x202f, 0x202f],
      [0x205f, 0x205f],
      [0x3000, 0x3000],
      [0xfeff, 0xfeff],
    ] as const;
    const plain = complement([[opener, opener], ...spaces]);
    const free = builder.state();
    writeClass(builder, rule.start, plain, free, 'plain');
    writeClass(builder, rule.start, intersection(spaces, ANY), rule.start, 'plain');
    writeClass(builder, free, ANY, free, 'plain');
    builder.epsilon(free, rule.end);
  }
  return writer.close(rule);
}
