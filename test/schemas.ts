/**
 * 200 JSON Schemas that cover every keyword that Caravan follows. Where values cannot be made up from the keywords alone
 * (patterns, formats), `examples` lists some.
 */
type Schema = Readonly<Record<string, unknown>>;

const text = (most: number, least = 0): Schema => ({
  type: 'string',
  ...(least > 0 ? { minLength: least } : {}),
  maxLength: most,
});
const whole = (minimum: number, maximum: number): Schema => ({ type: 'integer', minimum, maximum });
const list = (items: unknown, maxItems: number, minItems = 0): Schema => ({
  type: 'array',
  items,
  minItems,
  maxItems,
});
const record = (properties: Schema, required = Object.keys(properties)): Schema => ({
  type: 'object',
  properties,
  required,
  additionalProperties: false,
});
const pattern = (source: string, examples: readonly string[]): Schema => ({
  type: 'string',
  pattern: source,
  examples,
});
const format = (name: string, examples: readonly string[]): Schema => ({
  type: 'string',
  format: name,
  examples,
});

/** Texts: lengths, in all of Unicode. 25. */
const texts: Schema[] = [
  ...[0, 1, 2, 3, 5, 8, 13, 21, 34].map((most) => text(most)),
  ...(
    [
      [1, 1],
      [2, 2],
      [3, 5],
      [4, 4],
      [5, 12],
      [8, 8],
      [10, 20],
      [20, 30],
    ] as const
  ).map(([least, most]) => text(most, least)),
  { type: ['string', 'null'], maxLength: 6 },
  { type: 'string', maxLength: 6, nullable: true },
  { type: ['string', 'integer'], maxLength: 4, minimum: 0, maximum: 99 },
  { type: ['boolean', 'string'], maxLength: 3, description: 'ja oder „nein“' },
  { anyOf: [text(3), { type: 'null' }] },
  { allOf: [text(9, 2), { minLength: 4 }] },
  { allOf: [{ type: 'string' }, { maxLength: 7 }, { minLength: 1 }] },
  { type: 'string', maxLength: 5, title: 'Ein Wort', default: 'ab', examples: ['ab', 'é', '漢字'] },
];

/** Patterns. 30. */
const patterns: Schema[] = [
  pattern('^[a-z]{1,8}$', ['a', 'abcdefgh', 'xyz']),
  pattern('^[A-Z][a-z]{0,5}( [A-Z][a-z]{0,5})?$', ['A', 'Ada Love', 'Zoe']),
  pattern('^\\d{3}-\\d{4}$', ['123-4567', '000-0000']),
  pattern('^(\\+49|0)[1-9][0-9]{2,6}$', ['0301234', '+491234']),
  pattern('^#[0-9a-fA-F]{6}$', ['#00ffAA', '#123456']),
  pattern('^v?\\d{1,2}\\.\\d{1,2}\\.\\d{1,2}$', ['v1.2.3', '10.0.12']),
  pattern('^(yes|no|maybe)$', ['yes', 'no', 'maybe']),
  pattern('^(?:ab|cd){1,3}$', ['ab', 'abcd', 'cdcdab']),
  pattern('^(?<year>\\d{4})/(?<month>\\d{2})$', ['2024/01', '1999/12']),
  pattern('^[^"\\\\]{1,6}$', ['abc', 'é漢', '💡']),
  pattern('^"[a-z]{1,3}"$', ['"a"', '"abc"']),
  pattern('^\\\\[nrt]$', ['\\n', '\\t']),
  pattern('^\\w{2,5}$', ['ab', 'A_1', '____']),
  pattern('^\\W\\S\\s$', ['- \t'.replace(' ', 'x'), '!é ']),
  pattern('^.{3}$', ['abc', 'éà漢', '💡💡💡']),
  pattern('^[\\u00e0-\\u00ff]{1,4}$', ['é', 'àéîõ']),
  pattern('^\\u{1F600}+?\\u{1F4A1}?$', ['😀', '😀😀💡']),
  pattern('^[\\u4e00-\\u9fff]{2,4}$', ['漢字', '日本語']),
  pattern('^\\p{Lu}\\p{Ll}{1,4}$', ['Éa', 'Ωμ', 'Abcd']),
  pattern('^[-+]?[0-9]{1,3}([.,][0-9]{1,2})?$', ['-1', '+12,5', '999.99']),
  pattern('^[a\\-z\\]]{1,4}$', ['a-', ']z', '-']),
  pattern('^a?b*c{2}d{0,2}$', ['cc', 'abbccdd', 'bcc']),
  { ...pattern('^[a-z]+$', ['abc', 'zzzz']), minLength: 3, maxLength: 6 },
  { ...pattern('a', ['a', 'bac', '"a"']), maxLength: 5 },
  { ...pattern('^x', ['x', 'xyz']), maxLength: 4 },
  { ...pattern('z$', ['z', 'abz']), maxLength: 4 },
  { ...pattern('^a|b$', ['ax', 'xb', 'ab']), maxLength: 3 },
  { ...pattern('', ['', 'abc']), maxLength: 3 },
  {
    allOf: [pattern('^[a-m]+$', ['ab']), { pattern: '^[h-z]{1,4}$' }],
    examples: ['h', 'im', 'klmh'],
  },
  { ...pattern('^\\x41\\t\\n\\f\\v\\0$', ['A\t\n\f\v\0']) },
];

/** Formats. 20. */
const uuid = '123e4567-e89b-12d3-a456-426614174000';
const formats: Schema[] = [
  format('date', ['2024-02-29', '1999-12-31', '2000-02-29', '2023-02-28', '2021-04-30']),
  format('time', ['00:00:00Z', '23:59:59.5+02:00', '12:30:00-11:30']),
  format('date-time', ['2024-02-29T23:59:59Z', '1970-01-01T00:00:00.000+14:00']),
  format('duration', ['P1D', 'PT5M', 'P1Y2M3DT4H5M6S', 'P2W', 'PT1H30M']),
  format('email', ['a@example.org', 'first.last@sub.example.com', "o'neil+x@ex-ample.net"]),
  format('hostname', ['localhost', 'a-b.example.org', 'x1.y2']),
  format('ipv4', ['0.0.0.0', '255.255.255.255', '192.168.1.10']),
  format('ipv6', ['::', '::1', '2001:db8::ff00:42:8329', '1:2:3:4:5:6:7:8', '1::8']),
  format('uuid', [uuid, uuid.toUpperCase()]),
  format('uri', ['https://example.org/a/b-c', 'ftp://x.y:21/']),
  record({ id: format('uuid', [uuid]) }),
  record({ from: format('date', ['2024-01-01']), to: format('date', ['2024-12-31']) }),
  record({ at: format('time', ['01:02:03Z']) }),
  record({ address: format('ipv4', ['10.0.0.1']), port: whole(1, 65535) }),
  list(format('date', ['2024-01-01', '2020-02-29']), 2),
  list(format('ipv4', ['1.2.3.4']), 2, 1),
  { anyOf: [format('ipv4', ['127.0.0.1']), format('uuid', [uuid])] },
  { ...format('hostname', ['a.b', 'abc']), maxLength: 8 },
  { ...format('email', ['a@b.cc']), maxLength: 12 },
  { anyOf: [format('date', ['2024-01-01']), { type: 'null' }] },
];

/** Numbers. 40. */
const ranges = [
  ...([
    [0, 9],
    [1, 10],
    [5, 120],
    [-5, 5],
    [-120, -7],
    [99, 101],
    [0, 0],
    [1, 31],
  ] as const),
  ...([
    [1900, 2100],
    [-1, 0],
    [10, 1000],
    [-999, 999],
    [7, 70000],
    [123456, 123460],
  ] as const),
];
const numbers: Schema[] = [
  { type: 'integer' },
  { type: 'number' },
  ...ranges.map(([low, high]) => whole(low, high)),
  { type: 'integer', minimum: 0 },
  { type: 'integer', maximum: 0 },
  { type: 'integer', exclusiveMinimum: 3, exclusiveMaximum: 6 },
  { type: 'integer', minimum: 0.5, maximum: 4.5 },
  { type: 'integer', multipleOf: 5, minimum: 0, maximum: 100 },
  { type: 'integer', multipleOf: 7 },
  { type: 'integer', multipleOf: 12, minimum: -60, maximum: 600 },
  { type: 'integer', allOf: [{ multipleOf: 4 }, { multipleOf: 6 }], minimum: 0, maximum: 120 },
  { type: 'number', minimum: 0, maximum: 1 },
  { type: 'number', exclusiveMinimum: 0, exclusiveMaximum: 1 },
  { type: 'number', minimum: -1.5, maximum: 2.25 },
  { type: 'number', minimum: -273.15 },
  { type: 'number', maximum: 0.001 },
  { type: 'number', exclusiveMaximum: -0.5, minimum: -3 },
  { type: 'number', minimum: 99.5, maximum: 1000.25 },
  { type: 'number', multipleOf: 0.5, minimum: 0, maximum: 20 },
  { type: 'number', multipleOf: 0.25 },
  { type: 'number', minimum: 1e-7, maximum: 1e-3 },
  { type: 'number', minimum: 10, allOf: [{ maximum: 20 }, { exclusiveMaximum: 15 }] },
  { type: ['number', 'null'], minimum: 3, maximum: 4 },
  { type: ['integer', 'boolean'], minimum: 10, maximum: 12 },
  { anyOf: [whole(1, 3), whole(100, 103)] },
  { allOf: [{ type: 'number' }, { type: 'integer' }], minimum: 0, maximum: 50 },
  { type: 'number', minimum: 0.1, maximum: 0.30000000000000004 },
];

/** Constants and alternatives. 25. */
const choices: Schema[] = [
  { enum: ['red', 'green', 'blue'] },
  { enum: ['', 'a', 'ab', 'abc'] },
  { enum: ['quote " and \\', 'tab\t', 'line\nend', '\u0001'] },
  { enum: ['é', '漢字', '💡', 'ß'] },
  { enum: [1, 2, 3, -4, 0.5, 1e21] },
  { enum: [null, true, false] },
  { enum: ['a', 1, null, true, [1, 'x'], { k: 'v' }] },
  { enum: [[], {}, [[]], { a: {} }] },
  { type: 'string', enum: ['a', 1, 'b', null] },
  { type: 'integer', enum: [1, 2.5, 3] },
  { const: 'only' },
  { const: 42 },
  { const: null },
  { const: { a: [1, 2, { b: 'c' }] } },
  { allOf: [{ enum: [1, 2, 3, 4] }, { enum: [3, 4, 5] }] },
  { type: 'boolean' },
  { type: 'null' },
  { anyOf: [{ type: 'boolean' }, whole(0, 9), text(2)] },
  { anyOf: [{ const: 'a' }, { enum: ['b', 'c'] }] },
  { oneOf: [{ type: 'null' }, whole(1, 6), { enum: ['x', 'y'] }] },
  { oneOf: [{ enum: ['a', 'b'] }, { enum: ['c'] }] },
  {
    oneOf: [
      record({ kind: { const: 'circle' }, radius: whole(1, 99) }),
      record({ kind: { const: 'square' }, side: whole(1, 99) }),
    ],
  },
  { anyOf: [record({ a: whole(0, 9) }), record({ b: text(3) })] },
  { anyOf: [{ anyOf: [{ const: 1 }, { const: 2 }] }, { anyOf: [{ const: 3 }] }] },
  { enum: Array.from({ length: 300 }, (_, i) => `item-${i}`) },
];

/** Objects. 30. */
const objects: Schema[] = [
  record({}),
  record({ a: whole(0, 9) }),
  record({ a: whole(0, 9), b: text(4), c: { type: 'boolean' } }),
  record({ a: whole(0, 9), b: text(4), c: { type: 'boolean' } }, []),
  record({ a: whole(0, 9), b: text(4), c: { type: 'boolean' } }, ['b']),
  record({ a: { type: 'null' }, b: { type: 'null' }, c: { type: 'null' } }, ['a']),
  record({ a: { type: 'null' }, b: { type: 'null' }, c: { type: 'null' } }, ['c']),
  record({ 'with space': whole(0, 9), 'quote"': whole(0, 9), 'back\\slash': whole(0, 9) }),
  record({ é: whole(0, 9), 漢字: whole(0, 9), '💡': { type: 'boolean' }, '': { type: 'null' } }),
  record({ 'line\nend': whole(0, 9), 'tab\t': whole(0, 9) }, ['tab\t']),
  record({ a: record({ b: record({ c: whole(0, 9) }) }) }),
  record({ name: text(10), address: record({ street: text(10), number: whole(1, 200) }) }),
  record({ a: record({ x: { type: 'null' } }, []), b: record({ y: { type: 'null' } }, []) }, []),
  { ...record({ a: whole(0, 9), b: whole(0, 9), c: whole(0, 9) }, []), minProperties: 1 },
  { ...record({ a: whole(0, 9), b: whole(0, 9), c: whole(0, 9) }, []), minProperties: 2 },
  { ...record({ a: whole(0, 9), b: whole(0, 9), c: whole(0, 9) }, []), maxProperties: 1 },
  { ...record({ a: whole(0, 9), b: whole(0, 9), c: whole(0, 9) }, ['b']), maxProperties: 2 },
  { type: 'object', additionalProperties: whole(0, 9), propertyNames: text(3), maxProperties: 2 },
  {
    type: 'object',
    additionalProperties: { type: 'boolean' },
    propertyNames: text(4, 1),
    maxProperties: 3,
  },
  {
    ...{ type: 'object', properties: { id: whole(0, 9) }, required: ['id'] },
    ...{ additionalProperties: false, description: 'nichts sonst' },
  },
  { type: 'object', propertyNames: { enum: ['x', 'y'] }, additionalProperties: whole(0, 9) },
  {
    ...{ type: 'object', propertyNames: { type: 'string', enum: ['x', 'y'] } },
    ...{ additionalProperties: { type: 'boolean' }, required: ['x', 'y'] },
  },
  {
    type: 'object',
    patternProperties: { '^x-[a-z]{1,3}$': whole(0, 9) },
    additionalProperties: false,
    maxProperties: 2,
    examples: [{}, { 'x-a': 1 }, { 'x-abc': 2, 'x-b': 3 }],
  },
  { properties: { a: whole(0, 9) }, required: ['a'], type: 'object' },
  {
    type: 'object',
    properties: { a: whole(0, 9), b: false },
    required: ['a'],
    additionalProperties: false,
  },
  {
    type: 'object',
    allOf: [
      { properties: { a: whole(0, 9) }, required: ['a'] },
      { properties: { b: text(3) }, required: ['b'] },
    ],
  },
  {
    allOf: [record({ a: { type: 'integer' } }), { properties: { a: { minimum: 3, maximum: 5 } } }],
  },
  { type: ['object', 'null'], properties: { a: whole(0, 9) }, additionalProperties: false },
  { type: 'object', properties: { a: whole(0, 9) }, unevaluatedProperties: false },
  record(Object.fromEntries(Array.from({ length: 30 }, (_, i) => [`p${i}`, { type: 'boolean' }])), [
    'p7',
  ]),
];

/** Arrays. 15. */
const arrays: Schema[] = [
  list(whole(0, 9), 3),
  list(whole(0, 9), 3, 3),
  list(text(3), 2, 1),
  list({ type: 'boolean' }, 0),
  list({ type: 'boolean' }, 5),
  list(list(whole(0, 9), 2), 2),
  list(record({ a: whole(0, 9), b: { type: 'boolean' } }), 3),
  list({ enum: ['x', 'y'] }, 4, 2),
  list({ anyOf: [{ type: 'null' }, whole(0, 9)] }, 3),
  { type: 'array', prefixItems: [whole(0, 9), text(3)], minItems: 2, maxItems: 2 },
  {
    type: 'array',
    prefixItems: [whole(0, 9), text(3)],
    items: { type: 'boolean' },
    minItems: 2,
    maxItems: 4,
  },
  { type: 'array', prefixItems: [{ const: 'a' }, { const: 'b' }], items: false, minItems: 1 },
  { type: 'array', items: { enum: ['a', 'b', 1, null] }, uniqueItems: true, minItems: 1 },
  { type: ['array', 'string'], items: whole(0, 9), maxItems: 2, maxLength: 3 },
  record({ tags: list(text(5), 3), counts: list(whole(0, 9), 2) }),
];

/** References and recursion. 15; each level is optional, or ends with a good chance. */
const chain = (least: Schema): Schema => ({
  $defs: {
    node: record({ value: least, next: { anyOf: [{ type: 'null' }, { $ref: '#/$defs/node' }] } }),
  },
  $ref: '#/$defs/node',
});
const references: Schema[] = [
  chain(whole(0, 9)),
  chain(text(3)),
  chain({ type: 'boolean' }),
  { $defs: { a: whole(0, 9) }, $ref: '#/$defs/a' },
  { $defs: { a: whole(0, 9) }, ...list({ $ref: '#/$defs/a' }, 3) },
  {
    $defs: { 'a/b': whole(0, 9), 'c~d': text(2), 'e f': { type: 'boolean' } },
    ...record({
      x: { $ref: '#/$defs/a~1b' },
      y: { $ref: '#/$defs/c~0d' },
      z: { $ref: '#/$defs/e%20f' },
    }),
  },
  {
    $defs: { a: { $ref: '#/$defs/b' }, b: { $ref: '#/$defs/c' }, c: whole(3, 4) },
    $ref: '#/$defs/a',
  },
  { $defs: { base: { type: 'integer', minimum: 0 } }, $ref: '#/$defs/base', maximum: 20 },
  {
    $defs: { p: record({ x: whole(0, 9), y: whole(0, 9) }) },
    ...record({ from: { $ref: '#/$defs/p' }, to: { $ref: '#/$defs/p' } }),
  },
  { anyOf: [whole(0, 9), list({ $ref: '#' }, 1)] },
  { anyOf: [{ type: 'null' }, { type: 'boolean' }, record({ not_: { $ref: '#' } })] },
  {
    type: 'object',
    properties: { leaf: whole(0, 9), left: { $ref: '#/properties/leaf' } },
    required: ['leaf', 'left'],
    additionalProperties: false,
  },
  {
    $defs: {
      even: { anyOf: [{ const: 0 }, { const: 'e' }, list({ $ref: '#/$defs/odd' }, 1, 1)] },
      odd: { anyOf: [{ const: 1 }, { const: 'o' }, list({ $ref: '#/$defs/even' }, 1, 1)] },
    },
    $ref: '#/$defs/even',
  },
  {
    $defs: { t: record({ label: text(3), children: list({ $ref: '#/$defs/t' }, 1) }) },
    $ref: '#/$defs/t',
  },
  {
    $defs: { s: { anyOf: [{ type: 'string', maxLength: 3 }, { type: 'null' }] } },
    ...record({ a: { $ref: '#/$defs/s' }, b: { $ref: '#/$defs/s' } }, ['a']),
  },
];

export const schemas: readonly Schema[] = [
  ...texts,
  ...patterns,
  ...formats,
  ...numbers,
  ...choices,
  ...objects,
  ...arrays,
  ...references,
];
