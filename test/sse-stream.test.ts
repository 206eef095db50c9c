/**
 * What a streaming client sees of a job's journal: each token once, whole characters, ids to come back with; and
 * what becomes of the job when the client leaves. The test writes the journal as an engine would.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import type { Take } from '../coordinator/journal.js';
import { TextStream } from '../coordinator/text-stream.js';
import { sseEvents, startGateway, type SseEvent } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const { journal, tokenizer } = gateway;

const usage = (completionTokens: number) => ({ promptTokens: 3, completionTokens });
const jobOf = (response: Response): string => response.headers.get('x-caravan-job') ?? '';

interface Chunk {
  readonly choices: readonly {
    readonly text?: string;
    readonly delta?: { readonly role?: string; readonly content?: string };
    readonly finish_reason: string | null;
  }[];
  readonly usage?: Readonly<Record<string, number>> | null;
  readonly error?: { readonly message: string; readonly type: string; readonly code: string };
}

const chunkOf = ({ data }: SseEvent): Chunk => JSON.parse(data) as Chunk;
const textOf = (event: SseEvent): string => {
  if (event.data === '[DONE]') return '';
  const choice = chunkOf(event).choices[0];
  return choice?.text ?? choice?.delta?.content ?? '';
};

async function allEvents(response: Response): Promise<SseEvent[]> {
  const events: SseEvent[] = [];
  for await (const event of sseEvents(response)) events.push(event);
  return events;
}

const openCompletion = (body: object = {}): Promise<Response> =>
  gateway.post('/v1/completions', { prompt: [1, 5, 6], stream: true, ...body });

/** The text that each token releases. */
function textsOf(tokenIds: readonly number[], stop: readonly string[] = []) {
  const stream = new TextStream(tokenizer, { stop, isTextStart: false });
  const texts = tokenIds.map((id) => stream.push(id));
  return { texts, held: stream.end() };
}

/** Writes a whole answer, one append a token, and its ending. */
async function writeAll(take: Take, tokenIds: readonly number[]): Promise<string> {
  const { texts, held } = textsOf(tokenIds);
  for (const [i, id] of tokenIds.entries()) await journal.append(take, i, [id], [texts[i]!]);
  const ending = {
    status: 'completed',
    finishReason: 'stop',
    usage: usage(tokenIds.length),
  } as const;
  await journal.end(take, tokenIds.length, ending, held);
  return texts.join('') + held;
}

void test('Japanese across byte tokens comes in whole characters', async () => {
  const japanese = '砂漠を行く駱駝の群れ、🐪🐫。';
  const tokenIds = tokenizer.encode(japanese);
  assert.ok(tokenIds.length > 2 * Array.from(japanese).length, 'characters take several tokens');
  const response = await openCompletion();
  const text = await writeAll(await gateway.take(jobOf(response)), tokenIds);
  const events = await allEvents(response);
  assert.equal(text.trim(), japanese);
  assert.equal(events.map(textOf).join(''), text);
  for (const event of events) assert.ok(!event.data.includes('\u{fffd}'), event.data);
  assert.ok(events.length > 8, 'it was not held back to the end');
  assert.equal(events.at(-1)?.data, '[DONE]');
});

void test('a chat names its role first, its finish reason last, and its usage when asked', async () => {
  const response = await gateway.post('/v1/chat/completions', {
    messages: [{ role: 'user', content: [{ type: 'text', text: 'Hi' }] }],
    stream: true,
    stream_options: { include_usage: true },
  });
  assert.match(response.headers.get('content-type') ?? '', /^text\/event-stream/);
  await writeAll(await gateway.take(jobOf(response)), tokenizer.encode('Hello there'));
  const events = await allEvents(response);
  const chunks = events.slice(0, -1).map(chunkOf);
  assert.deepEqual(chunks[0]?.choices[0]?.delta, { role: 'assistant', content: '' });
  assert.equal(chunks.at(-2)?.choices[0]?.finish_reason, 'stop');
  assert.deepEqual(chunks.at(-1)?.choices, []);
  assert.equal(chunks.at(-1)?.usage?.['prompt_tokens'], 3);
  assert.ok(chunks.slice(0, -1).every(({ usage }) => usage === null));
  const job = jobOf(response);
  const again = await fetch(`${gateway.url}/v1/jobs/${job}/events?as=chat&usage=false`);
  assert.ok((await allEvents(again)).every(({ data }) => !data.includes('"usage"')));
});

void test('a client can come back at any event, and sees the rest once', async () => {
  const response = await openCompletion();
  const id = jobOf(response);
  const tokenIds = tokenizer.encode('A caravan walks 砂漠 by night');
  await writeAll(await gateway.take(id), tokenIds);
  const events = (await allEvents(response)).filter((event) => event.id !== null);
  assert.ok(events.length > 4);
  for (const [i, event] of events.entries()) {
    const headers = { 'last-event-id': event.id! };
    const again = await fetch(`${gateway.url}/v1/jobs/${id}/events`, { headers });
    const rest = (await allEvents(again)).filter((each) => each.id !== null);
    assert.deepEqual(
      rest.map((each) => [each.id, textOf(each)]),
      events.slice(i + 1).map((each) => [each.id, textOf(each)]),
      `after ${event.id ?? ''}`,
    );
  }
  const whole = await allEvents(await fetch(`${gateway.url}/v1/jobs/${id}/events?from=0`));
  assert.equal(whole.map(textOf).join(''), events.map(textOf).join(''));
});

void test('an open stream goes on over a take by another engine and a killed Redis', async () => {
  const response = await openCompletion();
  const id = jobOf(response);
  const tokenIds = tokenizer.encode('Slowly the llamas walk on.');
  const { texts } = textsOf(tokenIds);
  const first = await gateway.take(id);
  await journal.append(first, 0, tokenIds.slice(0, 3), texts.slice(0, 3));
  const events = sseEvents(response);
  const shown = (await events.next()).value as SseEvent;
  assert.equal(shown.id, '3-0');

  const second = await gateway.take(id);
  assert.equal((await journal.append(first, 3, [9], ['never'])).kind, 'stale');
  // What is not synchronised yet may be lost with Redis; the engine then writes it again.
  await gateway.redis.kill('SIGTERM');
  await gateway.redis.restart();
  await journal.append(second, 3, tokenIds.slice(3), texts.slice(3));
  const ending = {
    status: 'completed',
    finishReason: 'length',
    usage: usage(tokenIds.length),
  } as const;
  await journal.end(second, tokenIds.length, ending, '');
  let text = textOf(shown);
  for await (const event of events) text += textOf(event);
  assert.equal(text, texts.join(''));
});

void test('a job that fails in mid-stream ends it with an error event', async () => {
  const response = await openCompletion();
  const take = await gateway.take(jobOf(response));
  await journal.append(take, 0, [300], ['text']);
  const ending = { status: 'failed', code: 'out_of_memory', message: 'no memory' } as const;
  await journal.end(take, 1, ending, '');
  const events = await allEvents(response);
  assert.equal(textOf(events[0]!), 'text');
  const { error } = chunkOf(events.at(-1)!);
  assert.equal(error?.code, 'out_of_memory');
  assert.equal(error.type, 'server_error');
});

void test('a job that fails before a whole answer is an error with its status', async () => {
  const jobs = new Set(await gateway.jobIds());
  const answer = gateway.post('/v1/completions', { prompt: 'a' });
  const take = await gateway.take(await gateway.nextJob(jobs));
  await journal.end(take, 0, { status: 'expired' }, '');
  const response = await answer;
  assert.equal(response.status, 408);
  const { error } = (await response.json()) as Chunk;
  assert.equal(error?.code, 'expired');
});

/** The ending of a job, once it has one. */
async function endingOf(id: string): Promise<string> {
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(30_000))) {
    if (entry.kind === 'end') return entry.ending.status;
  }
  return 'none';
}

void test('a client that leaves cancels its waiting job, streamed or not', async () => {
  const leaving = new AbortController();
  const response = await gateway.post(
    '/v1/completions',
    { prompt: 'a', stream: true },
    leaving.signal,
  );
  const id = jobOf(response);
  leaving.abort();
  assert.equal(await endingOf(id), 'cancelled');

  const jobs = new Set(await gateway.jobIds());
  const alsoLeaving = new AbortController();
  const answer = gateway.post('/v1/completions', { prompt: 'a' }, alsoLeaving.signal);
  const unstreamed = await gateway.nextJob(jobs);
  alsoLeaving.abort();
  await assert.rejects(answer);
  assert.equal(await endingOf(unstreamed), 'cancelled');
  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  assert.match(
    metrics,
    /^caravan_http_requests_total\{route="\/v1\/completions",status="499"\} 1$/m,
  );
  assert.match(metrics, /^caravan_generated_tokens_total\{model="caravan-tiny"\} \d+$/m);
  assert.match(metrics, /^caravan_ttft_seconds_count\{model="caravan-tiny"\} \d+$/m);
});

void test('whoever only looks on does not take the job with him', async () => {
  const response = await openCompletion();
  const id = jobOf(response);
  const leaving = new AbortController();
  const look = await fetch(`${gateway.url}/v1/jobs/${id}/events`, { signal: leaving.signal });
  assert.equal(look.status, 200);
  leaving.abort();
  await writeAll(await gateway.take(id), tokenizer.encode('whole'));
  assert.equal((await allEvents(response)).at(-1)?.data, '[DONE]');
  assert.equal(await endingOf(id), 'completed');
});
