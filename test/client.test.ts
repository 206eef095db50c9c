/** `import { CaravanClient } from 'caravan/client'` against the whole; every body that goes or comes is held to /openapi.json. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Validator } from '@seriousme/openapi-schema-validator';
import { CaravanClient, CaravanError, type Batch, type ChatCompletion } from 'caravan/client';
import { ApiDescription } from './api-description.js';
import { serveModel } from './served-model.js';

const served = await serveModel(4);
after(() => served.stop());

const api = await ApiDescription.fetch(served.url);
const client = new CaravanClient({ url: served.url, fetch: api.checkedFetch });
const messages = [{ role: 'user', content: 'Tell me a story about a fox.' }];

const isCode =
  (code: string, param: string | null = null) =>
  (error: unknown): boolean => {
    assert.ok(error instanceof CaravanError, String(error));
    assert.equal(error.code, code, error.message);
    assert.equal(error.param, param);
    return true;
  };

void test('the description is well-formed OpenAPI 3.1', async () => {
  const { valid, errors } = await new Validator().validate(structuredClone(api.document) as never);
  assert.ok(valid, JSON.stringify(errors));
  assert.equal(api.document.openapi, '3.1.0');
  assert.ok(!JSON.stringify(api.document).includes('$defs'));
});

void test('a chat is streamed in pieces that make the whole answer, with logprobs and usage', async () => {
  const body = { messages, temperature: 0, max_tokens: 40, logprobs: true, top_logprobs: 2, n: 2 };
  const whole = await client.chat(body);
  const stream = client.streamChat({ ...body, stream_options: { include_usage: true } });
  const texts = ['', ''];
  let tokenCount = 0;
  let usage: ChatCompletion['usage'] | null = null;
  for await (const chunk of stream) {
    for (const { index, delta, logprobs } of chunk.choices) {
      texts[index] = `${texts[index]!}${delta.content ?? ''}`;
      tokenCount += logprobs?.content.length ?? 0;
    }
    usage ??= chunk.usage ?? null;
  }
  assert.deepEqual(
    texts,
    whole.choices.map(({ message }) => message.content),
  );
  assert.equal(
    tokenCount,
    whole.choices.reduce((sum, { logprobs }) => sum + logprobs!.content.length, 0),
  );
  const { prompt_tokens_details: cached, ...counts } = usage!;
  assert.deepEqual({ ...whole.usage, ...counts }, whole.usage);
  assert.ok(cached.cached_tokens < counts.prompt_tokens);
  assert.match(stream.jobId!, /^job_/);
});

void test('a completion is streamed in pieces that make the whole text, with its prompt', async () => {
  const body = { prompt: 'The llama', temperature: 0, max_tokens: 20, echo: true, logprobs: 1 };
  const whole = await client.complete(body);
  let text = '';
  for await (const { choices } of client.streamComplete(body)) text += choices[0]?.text ?? '';
  assert.equal(text, whole.choices[0]!.text);
  assert.ok(text.startsWith('The llama'));
});

void test('tools are called, whole and in pieces', async () => {
  const parameters = {
    type: 'object',
    properties: { n: { type: 'integer', maximum: 9 } },
    required: ['n'],
  };
  const tools = [{ type: 'function' as const, function: { name: 'count', parameters } }];
  const body = {
    messages,
    tools,
    tool_choice: 'required' as const,
    parallel_tool_calls: false,
    seed: 4,
  };
  const whole = await client.chat(body);
  const [call] = whole.choices[0]!.message.tool_calls!;
  let given = '';
  for await (const { choices } of client.streamChat(body)) {
    const added = choices[0]?.delta.tool_calls ?? [];
    assert.ok(added.length < 2, 'one entry a call');
    given += added[0]?.function.arguments ?? '';
  }
  assert.equal(given, call!.function.arguments);
  assert.equal(call!.function.name, 'count');
});

void test('a response is remembered, continued and deleted', async () => {
  const first = await client.respond({ input: 'Hello', max_output_tokens: 8, temperature: 0 });
  assert.deepEqual(await client.response(first.id), first);
  let text = '';
  let last = '';
  const next = { input: 'And?', previous_response_id: first.id, max_output_tokens: 8 };
  for await (const event of client.streamResponse(next)) {
    if (event.type === 'response.output_text.delta') text += event.delta;
    last = event.type;
  }
  assert.match(last, /^response\.(completed|incomplete)$/);
  assert.ok(text !== '');
  assert.deepEqual(await client.deleteResponse(first.id), {
    ...{ id: first.id, object: 'response', deleted: true },
  });
  await assert.rejects(client.response(first.id), isCode('not_found'));
});

void test('a file becomes a batch, and its results come back', async () => {
  const lines = [1, 2, 3].map((i) =>
    JSON.stringify({
      ...{ custom_id: `line ${i}`, method: 'POST', url: '/v1/completions' },
      body: { prompt: 'The llama', max_tokens: i },
    }),
  );
  let sent = 0;
  const content = new Blob([`${lines.join('\n')}\n`]);
  const onBytes = (count: number): void => {
    sent += count;
  };
  const file = await client.upload(content, 'three.jsonl', { onBytes });
  assert.equal(sent, content.size);
  assert.deepEqual(await client.file(file.id), file);
  const endpoint = '/v1/completions';
  const order = { input_file_id: file.id, endpoint, completion_window: '1h' };
  let batch: Batch = await client.createBatch(order);
  while (batch.status !== 'completed') batch = await client.batch(batch.id);
  assert.deepEqual(batch.request_counts, { total: 3, completed: 3, failed: 0 });
  let results = '';
  for await (const piece of client.fileContent(batch.output_file_id!)) {
    results += Buffer.from(piece).toString();
  }
  assert.equal(results.trim().split('\n').length, 3);
  const { data } = await client.batches({ limit: 1 });
  assert.deepEqual(data, [batch]);
  await assert.rejects(client.cancelBatch(batch.id), isCode('invalid_request'));
  const { data: files } = await client.files({ purpose: 'batch' });
  assert.deepEqual(files, [file]);
  await client.deleteFile(file.id);
  await assert.rejects(client.file(file.id), isCode('not_found'));
});

void test('models are listed, and texts become tokens and tokens texts', async () => {
  const [model] = await client.models();
  assert.deepEqual(await client.model(model!.id), model);
  const { tokens } = await client.tokenize({ prompt: 'A llama 駱駝 walks.' });
  assert.equal(await client.detokenize({ tokens }), 'A llama 駱駝 walks.');
});

void test('errors have the code and the field that the gateway says, or say what is not there', async () => {
  await assert.rejects(
    client.chat({ messages, temperature: 3 }),
    isCode('invalid_request', 'temperature'),
  );
  await assert.rejects(
    client.chat({ messages, model: 'nobody' }),
    isCode('model_not_found', 'model'),
  );
  const long = { prompt: 'walked '.repeat(600) };
  await assert.rejects(client.complete(long), isCode('context_length_exceeded', 'prompt'));
  await assert.rejects(
    async () => {
      for await (const chunk of client.streamComplete(long)) assert.fail(JSON.stringify(chunk));
    },
    isCode('context_length_exceeded', 'prompt'),
  );
  const nobody = new CaravanClient({ url: 'http://127.0.0.1:9' });
  await assert.rejects(nobody.models(), isCode('gateway_unavailable'));
  const endless = { prompt: 'The llama', ignore_eos: true, max_tokens: 400 };
  const hasty = new CaravanClient({ url: served.url, answerTimeoutMs: 50 });
  await assert.rejects(hasty.complete(endless), isCode('timeout'));
});

void test('a call that is withdrawn takes its job with it', async () => {
  const endless = { prompt: 'The llama', ignore_eos: true, max_tokens: 400 };
  const leaving = new AbortController();
  const aborted = client.streamComplete(endless, { signal: leaving.signal });
  await assert.rejects(async () => {
    for await (const chunk of aborted) if (chunk.choices.length > 0) leaving.abort();
  }, isCode('cancelled'));
  const left = client.streamComplete(endless);
  for await (const chunk of left) if (chunk.choices.length > 0) break;
  for (const { jobId } of [aborted, left]) {
    await assert.rejects(async () => {
      for await (const chunk of client.jobEvents(jobId!)) assert.ok(chunk.id);
    }, isCode('cancelled'));
  }
  await assert.rejects(
    client.complete(endless, { signal: AbortSignal.abort() }),
    isCode('cancelled'),
  );
});

/** A fetch whose streams break off after a few bytes, each time, as when a gateway dies: its jobs go on. */
function brokenFetch(afterBytes: number, onBreak: () => void): typeof fetch {
  return async (input, init = {}) => {
    // Not handed on: the real connection stays, so that the gateway keeps the job.
    const response = await api.checkedFetch(input, { ...init, signal: null });
    if (response.headers.get('content-type')?.startsWith('text/event-stream') !== true)
      return response;
    const reader = response.body!.getReader() as ReadableStreamDefaultReader<Uint8Array>;
    let left = afterBytes;
    const body = new ReadableStream<Uint8Array>({
      pull: async (out) => {
        const { done, value } = await reader.read();
        if (done) {
          out.close();
          return;
        }
        out.enqueue(value.subarray(0, left));
        left -= value.length;
        if (left > 0) return;
        onBreak();
        out.error(new Error('the connection broke'));
        void (async () => {
          while (!(await reader.read()).done);
        })();
      },
    });
    return new Response(body, response);
  };
}

void test('a stream over connections that break shows everything once: texts, tokens, calls', async () => {
  let breaks = 0;
  const onBreak = (): void => {
    breaks += 1;
  };
  const shaky = new CaravanClient({ url: served.url, fetch: brokenFetch(1500, onBreak) });
  const body = {
    messages,
    temperature: 0.8,
    seed: 3,
    logprobs: true,
    top_logprobs: 1,
    max_tokens: 60,
  };
  const whole = (await client.chat(body)).choices[0]!;
  let text = '';
  const tokens: string[] = [];
  for await (const { choices, usage } of shaky.streamChat(body)) {
    assert.equal(usage, undefined);
    text += choices[0]?.delta.content ?? '';
    tokens.push(...(choices[0]?.logprobs?.content ?? []).map(({ token }) => token));
  }
  assert.equal(text, whole.message.content);
  assert.deepEqual(
    tokens,
    whole.logprobs!.content.map(({ token }) => token),
  );
  assert.ok(breaks > 2, `${breaks} breaks`);

  const tools = [
    {
      type: 'function' as const,
      function: {
        name: 'note',
        parameters: {
          ...{ type: 'object', required: ['text'], additionalProperties: false },
          properties: { text: { type: 'string', minLength: 20, maxLength: 40 } },
        },
      },
    },
  ];
  const choice = { tools, tool_choice: 'required' as const };
  const calling = { messages, ...choice, seed: 5, max_tokens: 120 };
  const calls = (await client.chat(calling)).choices[0]!.message.tool_calls!;
  const seen: { name: string; arguments: string }[] = [];
  breaks = 0;
  for await (const { choices } of shaky.streamChat(calling)) {
    for (const { index, function: called } of choices[0]?.delta.tool_calls ?? []) {
      if (called.name !== undefined) seen[index] = { name: called.name, arguments: '' };
      seen[index]!.arguments += called.arguments;
    }
  }
  assert.deepEqual(
    seen,
    calls.map((call) => call.function),
  );
  assert.ok(breaks > 0);
});

void test('a stream of a job begins where an earlier one ended, with its Last-Event-ID', async () => {
  const body = {
    prompt: 'The llama',
    ignore_eos: true,
    temperature: 0,
    max_tokens: 30,
    stream_options: { include_usage: true },
  };
  const stream = client.streamComplete(body);
  let text = '';
  let at: string | undefined;
  let before = '';
  for await (const { choices } of stream) {
    text += choices[0]?.text ?? '';
    if (at === undefined && text.length > 20) {
      at = stream.lastEventId!;
      before = text;
    }
  }
  let rest = '';
  for await (const { choices } of client.jobEvents(stream.jobId!, { after: at! })) {
    rest += choices[0]?.text ?? '';
  }
  assert.equal(before + rest, text);
  assert.ok(rest !== '' && before !== '');
});

void test('a job says where it stands, and is cancelled', async () => {
  const stream = client.streamComplete({ prompt: 'A fox', max_tokens: 4, temperature: 0 });
  for await (const chunk of stream) assert.ok(chunk.id);
  const ended = await client.job(stream.jobId!);
  assert.equal(ended.status, 'completed');
  assert.equal(ended.usage!.completion_tokens, 4);
  assert.deepEqual(await client.cancelJob(ended.id), ended);
  await assert.rejects(client.job('job_nobody'), isCode('not_found'));
});

void test('every route of the API was called, and held to the description', () => {
  const all = Object.entries(api.document.paths).flatMap(([route, methods]) =>
    Object.keys(methods).map((method) => `${method} ${route}`),
  );
  const probes = ['get /health', 'get /livez', 'get /readyz', 'get /metrics'];
  const others = ['get /', ...probes, 'get /openapi.json'];
  const uncalled = all.filter((each) => !api.seen.has(each) && !others.includes(each));
  assert.deepEqual(uncalled, ['post /v1/batches/{id}/cancel']);
});
