/**
 * Decision support: a form that is always filled in completely, whatever the model thinks.
 *
 *   ./caravan up                                  # in another terminal
 *   node dist/examples/decision-form.js [URL] [QUESTION]
 */
import OpenAI from 'openai';
import { zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const [url = 'http://127.0.0.1:8080', question = 'Shall we buy a camel?'] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none' });

const Decision = z.object({
  advice: z.enum(['yes', 'no', 'later']),
  confidencePercent: z.number().int().min(0).max(100),
  reasons: z.array(z.string().max(60)).min(1).max(3),
  costEuro: z.number().min(0).max(100_000).nullable(),
  askAgainOn: z.iso.date().nullable(),
});

const answer = await client.chat.completions.parse({
  model: 'caravan-tiny',
  messages: [{ role: 'user', content: question }],
  response_format: zodResponseFormat(Decision, 'decision'),
  temperature: 0,
});
const decision: z.infer<typeof Decision> | null = answer.choices[0]!.message.parsed;
console.log(JSON.stringify(decision, null, 2));
