/** One chat over HTTP, as any client of the gateway would: for `caravan up --ask`. */
import { CaravanClient } from './client.js';

/**
 * Streams the answer to `out` as it comes.
 *
 * @throws CaravanError as the gateway says.
 */
export async function askOnce(
  url: string,
  apiKey: string | undefined,
  question: string,
  out: NodeJS.WritableStream,
): Promise<void> {
  const messages = [{ role: 'user', content: question }];
  const stream = new CaravanClient({ url, apiKey }).streamChat({ messages });
  out.write(`\n> ${question}\n\n`);
  for await (const { choices } of stream) out.write(choices[0]?.delta.content ?? '');
  out.write('\n\n');
}
