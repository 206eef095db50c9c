/**
 * A customer-service assistant with a system prompt and tools: it looks an order up before it answers.
 *
 *   ./caravan up                                  # in another terminal
 *   node dist/examples/customer-service.js [URL] [QUESTION]
 */
import OpenAI from 'openai';
import type { ChatCompletionMessageParam, ChatCompletionTool } from 'openai/resources';

const [url = 'http://127.0.0.1:8080', question = 'Where is my lamp?'] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none' });
const model = 'caravan-tiny';

const orders = new Map([
  ['lamp', 'on its way'],
  ['rug', 'not paid'],
]);

/** What the assistant can do, by name. Arguments have the shape that the description below says. */
const actions = {
  order: ({ item }: { item: string }): string => `${item}: ${orders.get(item) ?? 'not ordered'}`,
  call_back: ({ hour }: { hour: number }): string => `we call at ${hour} o'clock`,
};

const describe = (name: keyof typeof actions, properties: object): ChatCompletionTool => ({
  type: 'function',
  function: { name, parameters: { type: 'object', properties, required: Object.keys(properties) } },
});

const tools = [
  describe('order', { item: { enum: [...orders.keys()] } }),
  describe('call_back', { hour: { type: 'integer', minimum: 9, maximum: 17 } }),
];

const messages: ChatCompletionMessageParam[] = [
  { role: 'system', content: 'You serve a shop. Be kind and brief.' },
  { role: 'user', content: question },
];

const asked = { model, tools, temperature: 0, max_completion_tokens: 80 };
const first = await client.chat.completions.create({
  ...{ ...asked, messages },
  tool_choice: 'required',
  parallel_tool_calls: false,
});
const { message } = first.choices[0]!;
messages.push(message);
for (const call of message.tool_calls ?? []) {
  if (call.type !== 'function') continue;
  const { name, arguments: given } = call.function;
  const action = actions[name as keyof typeof actions] as (given: unknown) => string;
  const result = action(JSON.parse(given));
  console.log(`${name}(${given}) = ${result}`);
  messages.push({ role: 'tool', tool_call_id: call.id, content: result });
}
const answer = await client.chat.completions.create({ ...asked, messages, tool_choice: 'none' });
console.log(`assistant: ${answer.choices[0]!.message.content ?? ''}`);
