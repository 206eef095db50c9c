/** One chat over HTTP, as any client of the gateway would: for `caravan up --ask`. */
import { CaravanError } from '../proto/errors.js';

/**
 * Streams the answer to `out` as it comes.
 *
 * @throws CaravanError `internal` with the gateway's own words when it refuses.
 */
export async function askOnce(
  url: string,
  question: string,
  out: NodeJS.WritableStream,
): Promise<void> {
  const response = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ messages: [{ role: 'user', content: question }], stream: true }),
  });
  if (!response.ok || response.body === null) {
    throw new CaravanError(
      'internal',
      `the gateway answered ${response.status}: ${await response.text()}`,
    );
  }
  out.write(`\n> ${question}\n\n`);
  let pending = '';
  for await (const bytes of response.body.pipeThrough(new TextDecoderStream())) {
    const lines = `${pending}${bytes}`.split('\n');
    pending = lines.pop() ?? '';
    for (const line of lines) out.write(contentOf(line));
  }
  out.write('\n\n');
}

/** The text of one line of the event stream. */
function contentOf(line: string): string {
  const data = /^data: (\{.*)$/.exec(line)?.[1];
  if (data === undefined) return '';
  const chunk = JSON.parse(data) as {
    choices?: { delta?: { content?: string } }[];
    error?: { message: string };
  };
  if (chunk.error !== undefined) throw new CaravanError('internal', chunk.error.message);
  return chunk.choices?.[0]?.delta?.content ?? '';
}
