/** Calls of tools as text: which there can be, and what is read from them, in pieces of any size. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { compileGrammar, type CallsSpec } from '../coordinator/grammar.js';
import { foldTools, offeredTools, type ToolMessage } from '../coordinator/openai-tools.js';
import { ToolCallReader, type AnswerDelta, type CallStyle } from '../coordinator/tool-calls.js';
import { Random } from './random.js';
import { assertRefused } from './refusal.js';

const weather = {
  type: 'function' as const,
  function: {
    name: 'weather',
    description: 'Of a town',
    parameters: {
      $defs: { town: { type: 'string', maxLength: 20 } },
      type: 'object',
      properties: { town: { $ref: '#/$defs/town' }, days: { type: 'integer', minimum: 1 } },
      required: ['town'],
    },
  },
};
const now = { type: 'function' as const, function: { name: 'now' } };

const grammarOf = (body: object, style: CallStyle = 'array'): CallsSpec =>
  offeredTools({ tools: [weather, now], ...body }, style)!.grammar;

function accepts(spec: CallsSpec, text: string): boolean {
  const machine = compileGrammar(spec);
  return machine.run(machine.start, Buffer.from(text))?.isAccepting ?? false;
}

const oneCall = '{"name": "weather", "arguments": {"town": "Ulm \\"{[", "days": 3}}';
const bareCall = '{"name":"now","arguments":{}}';

void test('answers are calls of the offered tools with their arguments, or text where that is allowed', () => {
  const auto = grammarOf({});
  for (const text of [
    `[${oneCall}]`,
    ` [${bareCall}, ${oneCall}]`,
    'Hello [1] {',
    ' Sunny.',
    '漢字',
  ]) {
    assert.ok(accepts(auto, text), text);
  }
  const wrong = [
    ...['[]', '[', '[text', `[${oneCall}`, `[${oneCall}] and so`, `[${bareCall} ${bareCall}]`],
    '[{"name":"other","arguments":{}}]',
    '[{"name":"weather","arguments":{}}]',
    '[{"name":"weather","arguments":{"town":7}}]',
    '[{"name":"weather","arguments":{"town":"Ulm","days":0}}]',
  ];
  for (const text of wrong) assert.ok(!accepts(auto, text), text);
  const required = grammarOf({ tool_choice: 'required', parallel_tool_calls: false });
  assert.ok(accepts(required, `[${oneCall}]`));
  assert.ok(!accepts(required, `[${bareCall}, ${oneCall}]`), 'one at a time');
  assert.ok(!accepts(required, 'Hello'));
  const named = grammarOf({ tool_choice: { type: 'function', function: { name: 'now' } } });
  assert.ok(accepts(named, `[${bareCall}]`) && !accepts(named, `[${oneCall}]`));
  const tags = grammarOf({}, 'tags');
  assert.ok(
    accepts(tags, `<tool_call>\n${oneCall}\n</tool_call>\n<tool_call>\n${bareCall}\n</tool_call>`),
  );
  assert.ok(accepts(tags, '[no call]') && !accepts(tags, '<b>'));
});

/** Neighbouring pieces of one kind as one. */
function joined(deltas: readonly AnswerDelta[]): unknown[] {
  const whole: { kind: string; index?: number; name?: string; text?: string }[] = [];
  for (const delta of deltas) {
    const last = whole.at(-1);
    const isSame = last?.kind === delta.kind && delta.kind !== 'call';
    if (isSame) last.text = `${last.text!}${delta.text}`;
    else whole.push({ ...delta });
  }
  return whole;
}

void test('calls are read the same from pieces of any size', () => {
  const random = new Random(77);
  const call = (index: number, name: string, text: string) => [
    { kind: 'call', index, name },
    { kind: 'arguments', index, text },
  ];
  const town = '{"town": "Ulm \\"{[", "days": 3}';
  const cases: [CallStyle, string, unknown[]][] = [
    ['array', `[${oneCall}]`, call(0, 'weather', town)],
    [
      'array',
      ` [${bareCall},\n  ${oneCall} ]`,
      [...call(0, 'now', '{}'), ...call(1, 'weather', town)],
    ],
    ['array', '  Hello [x] {"name"', [{ kind: 'content', text: '  Hello [x] {"name"' }]],
    ['array', '   ', [{ kind: 'content', text: '   ' }]],
    ['array', '[{"name": "weather", "arguments": {"town": "U', call(0, 'weather', '{"town": "U')],
    ['tags', `<tool_call>\n${oneCall}\n</tool_call>`, call(0, 'weather', town)],
    ['tags', '[1]', [{ kind: 'content', text: '[1]' }]],
  ];
  for (const [style, text, expected] of cases) {
    for (let run = 0; run < 50; run += 1) {
      const reader = new ToolCallReader(style);
      const deltas: AnswerDelta[] = [];
      for (let at = 0; at < text.length;) {
        const size = 1 + random.below(run === 0 ? text.length : 9);
        deltas.push(...reader.push(text.slice(at, at + size)));
        at += size;
      }
      deltas.push(...reader.end());
      assert.deepEqual(joined(deltas), expected, text);
    }
  }
});

void test('a dialog with calls and results becomes turns that Llama 2 knows', () => {
  const messages: ToolMessage[] = [
    { role: 'user', content: 'Rain?' },
    {
      ...{ role: 'assistant', content: null },
      tool_calls: [
        { id: 'c1', type: 'function', function: { name: 'weather', arguments: '{"town":"Ulm"}' } },
        { id: 'c2', type: 'function', function: { name: 'now', arguments: '{}' } },
      ],
    },
    { role: 'tool', content: 'wet', tool_call_id: 'c1' },
    { role: 'tool', content: '12:00', tool_call_id: 'c2' },
    { role: 'user', content: 'So?' },
  ];
  const folded = foldTools(messages, offeredTools({ tools: [weather, now] }, 'array'));
  assert.deepEqual(
    folded.map(({ role }) => role),
    ['system', 'user', 'assistant', 'user'],
  );
  assert.match(folded[0]!.content!, /"name":"weather","description":"Of a town"/);
  assert.equal(
    folded[2]!.content,
    '[{"name": "weather", "arguments": {"town":"Ulm"}}, {"name": "now", "arguments": {}}]',
  );
  assert.equal(folded[3]!.content, 'Result of weather: wet\nResult of now: 12:00\nSo?');
});

void test('tools that cannot be followed are refused with their field', () => {
  const cases: [object, RegExp][] = [
    [{ tools: [], tool_choice: 'required' }, /tool_choice: needs tools/],
    [{ tools: [now, now] }, /tools: now is there twice/],
    [
      { tool_choice: { type: 'function', function: { name: 'x' } } },
      /x is none of the tools: weather, now/,
    ],
    [
      { tools: [{ ...now, function: { name: 'f', parameters: { type: 'string' } } }] },
      /of type object/,
    ],
  ];
  for (const [body, message] of cases) {
    assertRefused(() => grammarOf(body), message);
  }
});
