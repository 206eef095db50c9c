/** /v1/responses, /tokenize and /detokenize against the whole, by OpenAI's official client where it knows them. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import OpenAI from 'openai';
import { zodResponsesFunction, zodTextFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { checkOpenaiBody } from './openai-description.js';
import { serveModel } from './served-model.js';

const served = await serveModel(4);
after(() => served.stop());

const client = new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'caravan-tiny';
const input = 'Tell me a story about a fox.';

const post = (route: string, body: unknown): Promise<Response> =>
  fetch(`${served.url}${route}`, { method: 'POST', body: JSON.stringify(body) });

void test('a response is the answer of the same chat, streamed and whole, and can be asked for again', async () => {
  const settings = { model, input, temperature: 0, instructions: 'You are kind.' };
  const chat = await client.chat.completions.create({
    ...{ model, temperature: 0 },
    messages: [
      { role: 'system', content: settings.instructions },
      { role: 'user', content: input },
    ],
  });
  const whole = await client.responses.create(settings);
  assert.equal(whole.output_text, chat.choices[0]!.message.content);
  assert.equal(whole.status, 'completed');
  assert.equal(whole.usage!.output_tokens, chat.usage!.completion_tokens);
  const body: Partial<typeof whole> = { ...whole };
  // The client's own addition.
  delete body.output_text;
  checkOpenaiBody('Response', body);
  const again = await client.responses.retrieve(whole.id);
  assert.equal(again.output_text, whole.output_text);
  assert.deepEqual(again.usage, whole.usage);

  const types: string[] = [];
  let text = '';
  let last: OpenAI.Responses.Response | null = null;
  let number = 0;
  for await (const event of await client.responses.create({ ...settings, stream: true })) {
    checkOpenaiBody('ResponseStreamEvent', event);
    assert.equal(event.sequence_number, number);
    number += 1;
    if (types.at(-1) !== event.type) types.push(event.type);
    if (event.type === 'response.output_text.delta') text += event.delta;
    if (event.type === 'response.completed') last = event.response;
  }
  assert.deepEqual(types, [
    'response.created',
    'response.in_progress',
    'response.output_item.added',
    'response.content_part.added',
    'response.output_text.delta',
    'response.output_text.done',
    'response.content_part.done',
    'response.output_item.done',
    'response.completed',
  ]);
  assert.equal(text, whole.output_text);
  const { input_tokens_details: cached, ...counts } = last!.usage!;
  assert.deepEqual({ ...whole.usage, ...counts }, whole.usage);
  assert.ok(cached.cached_tokens < counts.input_tokens);
});

void test('previous_response_id continues the conversation, without its instructions', async () => {
  const settings = { model, temperature: 0, max_output_tokens: 30 };
  const first = await client.responses.create({ ...settings, input, instructions: 'Be brief.' });
  assert.equal(first.status, 'incomplete');
  assert.equal(first.incomplete_details?.reason, 'max_output_tokens');
  const second = await client.responses.create({
    ...settings,
    input: [{ role: 'user', content: [{ type: 'input_text', text: 'What is a llama?' }] }],
    previous_response_id: first.id,
  });
  const chat = await client.chat.completions.create({
    ...{ model, temperature: 0, max_completion_tokens: 30 },
    messages: [
      { role: 'user', content: input },
      { role: 'assistant', content: first.output_text },
      { role: 'user', content: 'What is a llama?' },
    ],
  });
  assert.equal(second.output_text, chat.choices[0]!.message.content);
  assert.equal(second.usage!.input_tokens, chat.usage!.prompt_tokens);
  assert.equal(second.previous_response_id, first.id);
  await client.responses.delete(first.id);
  await assert.rejects(client.responses.retrieve(first.id), OpenAI.NotFoundError);
  await assert.rejects(
    client.responses.create({ model, input, previous_response_id: first.id }),
    (error) => error instanceof OpenAI.NotFoundError && error.param === 'previous_response_id',
  );
  const unkept = await client.responses.create({ ...settings, input, store: false });
  await assert.rejects(client.responses.retrieve(unkept.id), OpenAI.NotFoundError);
});

void test('a response of a JSON schema parses, and bad fields are named as the client knows them', async () => {
  const schema = {
    ...{ type: 'object', additionalProperties: false, required: ['animal'] },
    properties: { animal: { type: 'string', enum: ['fox', 'llama'] } },
  };
  const format = { type: 'json_schema' as const, name: 'answer', schema, strict: true };
  const shaped = await client.responses.create({ model, input, text: { format } });
  const { animal } = JSON.parse(shaped.output_text) as { animal: string };
  assert.ok(animal === 'fox' || animal === 'llama');
  for (const [fields, param] of [
    [{}, 'input'],
    [{ input: 'a', temperature: 3 }, 'temperature'],
    [{ input: [{ role: 'assistant', content: 'a' }] }, 'input'],
    [{ input: 'a', tools: [{ type: 'function' }] }, 'tools.0.name'],
    [{ input: 'a', tools: [{ type: 'web_search' }] }, 'tools.0.type'],
    [{ input: 'a', tool_choice: 'required' }, 'tool_choice'],
    [{ input: [{ type: 'function_call_output', call_id: 'c', output: 'a' }] }, 'input'],
    [{ input: 'a', max_output_tokens: 0 }, 'max_output_tokens'],
    [{ input: 'a', background: true }, 'background'],
    [{ input: 'walked '.repeat(600) }, 'input'],
  ] as const) {
    const response = await post('/v1/responses', { model, ...fields });
    const { error } = (await response.json()) as { error: { param: string; message: string } };
    assert.equal(response.status, 400, error.message);
    assert.equal(error.param, param, error.message);
  }
});

void test('a client that leaves a response takes its job with it', async () => {
  const stream = await client.responses.create({ model, input, stream: true, temperature: 1 });
  let jobId = '';
  for await (const event of stream) {
    if (event.type === 'response.created') jobId = event.response.id.replace('resp_', 'job_');
    if (event.type === 'response.output_text.delta') break;
  }
  stream.controller.abort();
  const events = await (await fetch(`${served.url}/v1/jobs/${jobId}/events`)).text();
  assert.match(events, /the job was cancelled|"finish_reason":"stop"/);
});

void test('texts become tokens and tokens texts', async () => {
  const prompt = 'A llama 駱駝 walks.';
  const response = await post('/tokenize', { prompt });
  const {
    tokens,
    count,
    max_model_len: limit,
  } = (await response.json()) as {
    tokens: number[];
    count: number;
    max_model_len: number;
  };
  assert.equal(tokens[0], 1);
  assert.equal(count, tokens.length);
  assert.equal(limit, 512);
  const bare = await post('/tokenize', { prompt, add_special_tokens: false });
  assert.deepEqual(((await bare.json()) as { tokens: number[] }).tokens, tokens.slice(1));
  const back = await post('/detokenize', { tokens });
  assert.deepEqual(await back.json(), { prompt });
  const chat = await post('/tokenize', { messages: [{ role: 'user', content: input }] });
  const asked = await client.chat.completions.create({
    ...{ model, max_completion_tokens: 1 },
    messages: [{ role: 'user', content: input }],
  });
  assert.equal(((await chat.json()) as { count: number }).count, asked.usage!.prompt_tokens);
  for (const [route, body, param] of [
    ['/tokenize', {}, 'prompt'],
    ['/tokenize', { prompt: 7 }, 'prompt'],
    ['/detokenize', { tokens: [99_999] }, 'tokens'],
    ['/detokenize', { tokens: 'a' }, 'tokens'],
  ] as const) {
    const refused = await post(route, body);
    assert.equal(refused.status, 400);
    assert.equal(((await refused.json()) as { error: { param: string } }).error.param, param);
  }
});

const weather = zodResponsesFunction({
  name: 'weather',
  description: 'How the weather is.',
  parameters: z.object({ place: z.enum(['Rome', 'Oslo']), days: z.number().int().min(1).max(5) }),
});

void test('a response calls functions, whole and in events, and goes on with their outputs', async () => {
  const tools = [weather];
  const settings = { model, input: 'How is the weather?', tools, seed: 4 } as const;
  const called = { ...settings, tool_choice: 'required' as const, parallel_tool_calls: false };
  const whole = await client.responses.create(called);
  const body: Partial<typeof whole> = { ...whole };
  delete body.output_text;
  checkOpenaiBody('Response', body);
  const [call, ...others] = whole.output;
  assert.ok(call?.type === 'function_call' && others.length === 0);
  const { place, days } = JSON.parse(call.arguments) as { place: string; days: number };
  assert.ok(['Rome', 'Oslo'].includes(place) && days >= 1 && days <= 5);
  assert.equal(whole.tool_choice, 'required');
  assert.equal((whole.tools[0] as { name: string }).name, 'weather');

  const types: string[] = [];
  let given = '';
  let last: OpenAI.Responses.Response | null = null;
  for await (const event of await client.responses.create({ ...called, stream: true })) {
    checkOpenaiBody('ResponseStreamEvent', event);
    if (types.at(-1) !== event.type) types.push(event.type);
    if (event.type === 'response.function_call_arguments.delta') given += event.delta;
    if (event.type === 'response.function_call_arguments.done')
      assert.equal(event.arguments, given);
    if (event.type === 'response.completed') last = event.response;
  }
  assert.deepEqual(types, [
    'response.created',
    'response.in_progress',
    'response.output_item.added',
    'response.function_call_arguments.delta',
    'response.function_call_arguments.done',
    'response.output_item.done',
    'response.completed',
  ]);
  assert.equal(given, call.arguments);
  assert.ok(last?.output[0]?.type === 'function_call');
  assert.equal(last.output[0].call_id, `call_${last.id.replace('resp_', '')}_0_0`);

  const output = { type: 'function_call_output', call_id: call.call_id, output: 'sunny' } as const;
  const rest = { model, temperature: 0, max_output_tokens: 20 };
  const next = await client.responses.create({
    ...{ ...rest, input: [output], previous_response_id: whole.id },
  });
  assert.equal(next.output[0]!.type, 'message');
  // The same conversation, told anew.
  const { call_id, name, arguments: said } = call;
  const told = await client.responses.create({
    ...rest,
    input: [
      { role: 'user', content: settings.input },
      { type: 'function_call', call_id, name, arguments: said },
      output,
    ],
  });
  assert.equal(next.output_text, told.output_text);
  assert.equal(next.usage!.input_tokens, told.usage!.input_tokens);
  const retrieved = await client.responses.retrieve(whole.id);
  assert.deepEqual(retrieved.output, whole.output);
});

void test('several functions, a named one, none, and a text are what the choice says', async () => {
  const parameters = {
    ...{ type: 'object', required: ['n'], additionalProperties: false },
    properties: { n: { type: 'integer', minimum: 0, maximum: 9 } },
  };
  const tools = ['count', 'forecast'].map((name) => ({
    ...{ type: 'function' as const, name, parameters, strict: true },
  }));
  const settings = { model, input: 'Hello', tools, seed: 2 };
  const named = await client.responses.create({
    ...{ ...settings, tool_choice: { type: 'function', name: 'forecast' } },
  });
  assert.ok(named.output[0]?.type === 'function_call' && named.output[0].name === 'forecast');
  const none = await client.responses.create({ ...settings, tool_choice: 'none' });
  assert.deepEqual(
    none.output.map(({ type }) => type),
    ['message'],
  );
  let streamed = '';
  const auto = await client.responses.create({ ...settings, temperature: 0 });
  const again = { ...settings, temperature: 0, stream: true as const };
  for await (const event of await client.responses.create(again)) {
    checkOpenaiBody('ResponseStreamEvent', event);
    if (event.type === 'response.output_text.delta') streamed += event.delta;
  }
  assert.equal(streamed, auto.output_text);
});

void test('a zod schema is parsed by the official client', async () => {
  const animal = z.object({
    animal: z.enum(['fox', 'llama']),
    legs: z.number().int().min(0).max(9),
  });
  const parsed = await client.responses.parse({
    ...{ model, input, text: { format: zodTextFormat(animal, 'animal') } },
  });
  assert.deepEqual(animal.parse(parsed.output_parsed), parsed.output_parsed);
});
