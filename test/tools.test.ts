/**
 * OpenAI's official client calls tools with the embedded model, which knows nothing of them: that calls are well-formed and
 * fit their schemas is the grammar's doing.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import OpenAI from 'openai';
import { readFolderTokenizer } from '../model/tokenizer-files.js';
import { openTokenizer } from '../model/tokenizer.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { checkOpenaiBody } from './openai-description.js';
import { serveModel } from './served-model.js';

const served = await serveModel(8);
after(() => served.stop());
const client = new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'caravan-tiny';

/** What makes every token that begins with [ likely: a model that has learnt to call. */
const tokenizer = openTokenizer(readFolderTokenizer(embeddedModelPath()));
const eager: Record<string, number> = {};
for (let id = 0; id < tokenizer.vocabSize; id += 1) {
  if (Buffer.from(tokenizer.tokenBytes(id)).toString().trim().startsWith('[')) eager[id] = 100;
}

const find = {
  name: 'find',
  description: 'Finds animals.',
  parameters: {
    type: 'object',
    properties: {
      animal: { enum: ['fox', 'owl'] },
      count: { type: 'integer', minimum: 1, maximum: 9 },
    },
    required: ['animal'],
    additionalProperties: false,
  },
};
const tools = [
  { type: 'function' as const, function: find },
  { type: 'function' as const, function: { name: 'stop' } },
];
const messages = [{ role: 'user' as const, content: 'A fox?' }];

function checkCall(name: string, given: string): void {
  const value = JSON.parse(given) as { animal?: string; count?: number };
  if (name === 'stop') assert.equal(typeof value, 'object');
  else {
    assert.equal(name, 'find');
    assert.ok(['fox', 'owl'].includes(value.animal!), given);
    assert.ok(value.count === undefined || (value.count >= 1 && value.count <= 9), given);
  }
}

void test('a required call names a tool and fits its schema, streamed and whole', async () => {
  for (const seed of [1, 2, 3]) {
    const asked = {
      ...{ model, messages, tools, seed, max_tokens: 250, parallel_tool_calls: false },
      tool_choice: 'required' as const,
    };
    const onlyFind = { ...asked, tools: [tools[0]!] };
    const whole = await client.chat.completions.create(onlyFind);
    checkOpenaiBody('CreateChatCompletionResponse', whole);
    const { message, finish_reason: reason } = whole.choices[0]!;
    assert.equal(reason, 'tool_calls');
    assert.equal(message.content, null);
    assert.equal(message.tool_calls!.length, 1);
    const call = message.tool_calls![0]!;
    assert.equal(call.type, 'function');
    checkCall(call.function.name, call.function.arguments);

    const runner = client.chat.completions.stream(onlyFind);
    let pieces = 0;
    runner.on('chunk', (chunk) => {
      checkOpenaiBody('CreateChatCompletionStreamResponse', chunk);
      pieces += chunk.choices[0]?.delta.tool_calls?.length ?? 0;
    });
    const streamed = (await runner.finalChatCompletion()).choices[0]!;
    assert.equal(streamed.finish_reason, 'tool_calls');
    assert.deepEqual(
      streamed.message.tool_calls!.map((each) => 'function' in each && each.function.arguments),
      [call.function.arguments],
    );
    assert.ok(pieces > 2, 'arguments come in pieces');
  }
});

void test('a named tool is called, none is called where none may be, and text stays text', async () => {
  const few = { model, messages, tools, seed: 4, max_tokens: 200 };
  const named = await client.chat.completions.create({
    ...few,
    tool_choice: { type: 'function', function: { name: 'find' } },
  });
  assert.equal(named.choices[0]!.message.tool_calls!.length, 1);
  for (const choice of ['none', 'auto'] as const) {
    const plain = await client.chat.completions.create({
      ...{ ...few, temperature: 0 },
      tool_choice: choice,
    });
    const { message, finish_reason: reason } = plain.choices[0]!;
    assert.equal(message.tool_calls, undefined);
    assert.ok(message.content!.length > 5);
    assert.notEqual(reason, 'tool_calls');
  }
});

void test('runTools goes round: call, result, call', async () => {
  const given: string[] = [];
  const runner = client.chat.completions.runTools(
    {
      ...{ model, messages, seed: 6, max_tokens: 150, parallel_tool_calls: false },
      logit_bias: eager,
      tools: [
        {
          type: 'function' as const,
          function: {
            ...find,
            parse: JSON.parse as (text: string) => { animal: string },
            function: ({ animal }: { animal: string }) => {
              given.push(animal);
              return `${animal} found`;
            },
          },
        },
      ],
    },
    { maxChatCompletions: 2 },
  );
  await runner.done();
  assert.equal(given.length, 2);
  assert.deepEqual(
    runner.messages.map(({ role }) => role),
    ['user', 'assistant', 'tool', 'assistant', 'tool'],
  );
});
