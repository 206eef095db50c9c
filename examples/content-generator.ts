/**
 * A content generator that is fed from the batch queue: product texts for a shop, written overnight, when nobody else needs the
 * engines, each in a shape that the shop can use at once.
 *
 *   ./caravan up                                       # in another terminal
 *   node dist/examples/content-generator.js [URL]
 */
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanClient, type ChatCompletion } from 'caravan/client';
import { z } from 'zod';

const [url = 'http://127.0.0.1:8080'] = process.argv.slice(2);
const client = new CaravanClient({ url });

const products = ['a copper lamp', 'a woven rug', 'a camel saddle'];
const Text = z.object({ title: z.string().min(1).max(30), text: z.string().min(1).max(120) });

const lines = products.map((product, i) => ({
  custom_id: product,
  method: 'POST',
  url: '/v1/chat/completions',
  body: {
    messages: [{ role: 'user', content: `Tell me about ${product}.` }],
    response_format: {
      type: 'json_schema',
      json_schema: { name: 'text', schema: z.toJSONSchema(Text) },
    },
    seed: i,
    max_tokens: 200,
  },
}));
const content = new Blob(lines.map((line) => `${JSON.stringify(line)}\n`));
const { id } = await client.upload(content, 'products.jsonl');
const order = { input_file_id: id, endpoint: '/v1/chat/completions', completion_window: '24h' };
let batch = await client.createBatch(order);
while (!['completed', 'failed', 'expired', 'cancelled'].includes(batch.status)) {
  await delay(200);
  batch = await client.batch(batch.id);
}
const { completed, total } = batch.request_counts;
console.log(`${batch.status}: ${completed} of ${total}`);

let results = '';
const decoder = new TextDecoder();
for await (const piece of client.fileContent(batch.output_file_id!)) {
  results += decoder.decode(piece, { stream: true });
}
for (const line of results.trim().split('\n')) {
  const { custom_id: product, response } = JSON.parse(line) as {
    custom_id: string;
    response: { body: ChatCompletion };
  };
  const { title, text } = Text.parse(JSON.parse(response.body.choices[0]!.message.content!));
  console.log(`${product}: ${JSON.stringify(title)}, ${JSON.stringify(text)}`);
}
