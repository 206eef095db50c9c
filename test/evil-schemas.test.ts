/** Schemas that would take too much, or ask for what cannot be followed: refused by name, before anything is queued. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const messages = [{ role: 'user', content: 'a \\" [' }];

interface Refusal {
  readonly param: string | null;
  readonly message: string;
}

async function refusalOf(response: Response): Promise<Refusal> {
  assert.equal(response.status, 400);
  return ((await response.json()) as { error: Refusal }).error;
}

void test('keywords that cannot be followed are refused by name', async () => {
  for (const keyword of [
    ...['not', 'if', 'then', 'else', 'dependentRequired', 'dependentSchemas'],
    ...['contains', 'minContains', 'maxContains', 'unevaluatedItems', '$dynamicRef'],
  ]) {
    const schema = { type: 'object', properties: { a: { [keyword]: {} } } };
    const json_schema = { name: 'a', schema };
    const body = { messages, response_format: { type: 'json_schema', json_schema } };
    const { param, message } = await refusalOf(await gateway.post('/v1/chat/completions', body));
    assert.equal(param, 'response_format');
    assert.equal(message, `response_format: properties.a: ${keyword} is not supported`);
  }
});

const subsets = (count: number) => ({
  ...{ type: 'array', uniqueItems: true },
  items: { enum: Array.from({ length: count }, (_, i) => i) },
});

void test('schemas that would take too much are refused with the limit', async () => {
  const many = (count: number): number[] => Array.from({ length: count }, (_, i) => i);
  const cases: readonly (readonly [schema: unknown, message: RegExp])[] = [
    [{ enum: many(10_001) }, /more than 10000 values in enum/],
    [{ enum: many(30_000) }, /more than 20000 values/],
    [{ const: 'x'.repeat(600_000) }, /more than 524288 characters/],
    [{ type: 'string', pattern: '^(a?){3000}a{3000}$' }, /ambiguous/],
    [{ type: 'string', pattern: '(((a{100}){100}){100}){100}' }, /states|repeats too much/],
    [{ anyOf: many(300).map((i) => ({ const: `${i}` })) }, /more than 256 alternatives/],
    [subsets(9), /uniqueItems: needs items of an enum of at most 8 values/],
    [{ type: 'array', items: {}, uniqueItems: true }, /uniqueItems: needs items of an enum/],
  ];
  for (const [schema, message] of cases) {
    const body = { messages, guided_json: schema };
    const refusal = await refusalOf(await gateway.post('/v1/chat/completions', body));
    assert.equal(refusal.param, 'guided_json');
    assert.match(refusal.message, message);
  }
  assert.deepEqual(await gateway.jobIds(), []);
});

void test('a pattern that would keep a backtracking matcher busy for years is an automaton like others', async () => {
  for (const schema of [{ type: 'string', pattern: '^(a+)+$' }, subsets(8)]) {
    const before = new Set(await gateway.jobIds());
    const leaving = new AbortController();
    const body = { messages, guided_json: schema };
    const asked = gateway.post('/v1/chat/completions', body, leaving.signal);
    await gateway.nextJob(before);
    leaving.abort();
    await assert.rejects(asked);
  }
});

void test('JSON of ten thousand levels is refused, wherever it stands', async () => {
  const deep = `${'{"items":'.repeat(10_000)}true${'}'.repeat(10_000)}`;
  const named = '"name":"a"';
  const jobs = new Set(await gateway.jobIds());
  for (const [route, body] of [
    [
      'chat/completions',
      `"response_format":{"type":"json_schema","json_schema":{${named},"schema":@}}`,
    ],
    ['chat/completions', `"guided_json":${JSON.stringify(deep)}`],
    ['chat/completions', `"tools":[{"type":"function","function":{${named},"parameters":@}}]`],
    ['chat/completions', '"unknown":@'],
    [
      'responses',
      `"input":"a","tool_choice":"none","tools":[{"type":"function",${named},"parameters":@}]`,
    ],
    ['batches', '"metadata":@'],
  ] as const) {
    const text = `{"messages":${JSON.stringify(messages)},${body.replace('@', deep)}}`;
    const response = await fetch(`${gateway.url}/v1/${route}`, { method: 'POST', body: text });
    assert.match((await refusalOf(response)).message, /more than 3000 levels deep/);
  }
  assert.deepEqual(
    (await gateway.jobIds()).filter((id) => !jobs.has(id)),
    [],
  );
});
