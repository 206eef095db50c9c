/** OpenAI's official client asks for answers of a shape, from the embedded model behind the whole of Caravan. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import OpenAI from 'openai';
import { LengthFinishReasonError } from 'openai/error';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';
import { serveModel } from './served-model.js';

const served = await serveModel(8);
after(() => served.stop());
const client = new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'caravan-tiny';
const messages = [{ role: 'user' as const, content: 'Tell me about a fox.' }];

const Animal = z.object({
  name: z.string().max(20),
  legs: z.number().int().min(0).max(8),
  colours: z.array(z.enum(['red', 'brown', 'white'])).max(3),
  home: z.object({ place: z.string().max(20), isFar: z.boolean() }).nullable(),
  kind: z.union([z.literal('wild'), z.literal('tame')]),
});

void test('chat.completions.parse gives objects of a zod schema', async () => {
  for (const seed of [1, 2, 3, 4]) {
    const { choices } = await client.chat.completions.parse({
      ...{ model, messages, seed, max_tokens: 300 },
      response_format: zodResponseFormat(Animal, 'animal'),
    });
    assert.equal(choices[0]!.finish_reason, 'stop');
    const parsed: z.infer<typeof Animal> = choices[0]!.message.parsed!;
    assert.deepEqual(Animal.parse(parsed), parsed);
  }
});

void test('a stream of a shaped answer is the whole one, and JSON at its end', async () => {
  const asked = {
    ...{ model, messages, seed: 9, max_tokens: 300 },
    response_format: zodResponseFormat(Animal, 'animal'),
  };
  const whole = await client.chat.completions.create(asked);
  let text = '';
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true })) {
    text += chunk.choices[0]?.delta.content ?? '';
  }
  assert.equal(text, whole.choices[0]!.message.content);
  Animal.parse(JSON.parse(text));
});

void test('too few tokens cut a shaped answer, and the client is told', async () => {
  await assert.rejects(
    client.chat.completions.parse({
      ...{ model, messages, seed: 1, max_tokens: 3 },
      response_format: zodResponseFormat(Animal, 'animal'),
    }),
    LengthFinishReasonError,
  );
});

void test('guided fields shape chats and completions', async () => {
  const ask = async (route: string, body: object): Promise<string> => {
    const response = await fetch(`${served.url}/v1/${route}`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({ model, max_tokens: 64, ...body }),
    });
    const { choices } = (await response.json()) as {
      choices: { text?: string; message?: { content: string }; finish_reason: string }[];
    };
    assert.equal(choices[0]!.finish_reason, 'stop');
    return choices[0]!.text ?? choices[0]!.message!.content;
  };
  assert.match(
    await ask('chat/completions', { messages, guided_choice: ['yes', 'no'] }),
    /^(yes|no)$/,
  );
  assert.match(
    await ask('completions', { prompt: 'Call', guided_regex: ' [0-9]{3}-[0-9]{4}' }),
    /^ \d{3}-\d{4}$/,
  );
  assert.match(
    await ask('completions', { prompt: 'A', guided_grammar: 'root ::= "a" root | "b"', seed: 3 }),
    /^a*b$/,
  );
  const json = await ask('completions', { prompt: 'B', guided_json: { type: 'boolean' } });
  assert.equal(typeof JSON.parse(json), 'boolean');
});
