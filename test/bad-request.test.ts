/**
 * What the gateway answers to bad requests and in bad times: OpenAI's error body with field, rule and value, the
 * right status, in time, and nothing left in the queue. Also its health, its models and its end.
 */
import assert from 'node:assert/strict';
import net from 'node:net';
import { after, test } from 'node:test';
import { startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const { store, card } = gateway;

const user = [{ role: 'user', content: 'Hi' }];

interface Refusal {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: string;
  };
}

const refusalOf = async (response: Response): Promise<Refusal['error']> =>
  ((await response.json()) as Refusal).error;

type Case = readonly [fields: object, param: string | null, message: RegExp];

const schemaFormat = (schema: unknown) => ({
  type: 'json_schema',
  json_schema: { name: 'answer', schema },
});

const nested = (levels: number): unknown => {
  let schema: unknown = true;
  for (let i = 0; i < levels; i += 1) schema = { items: schema };
  return schema;
};

const chats: readonly Case[] = [
  [{}, 'messages', /^messages: /],
  [{ messages: [] }, 'messages', /^messages: /],
  [{ messages: 'Hi' }, 'messages', /^messages: .*array/],
  [{ messages: [{ role: 'user', content: 7 }] }, 'messages.0.content', /must be a string/],
  [
    { messages: [{ role: 'user', content: [{ type: 'image_url', image_url: {} }] }] },
    'messages.0.content',
    /parts of type text/,
  ],
  [{ messages: [{ role: 'assistant', content: 'Hi' }] }, 'messages', /roles, starting with/],
  [
    { messages: [...user, { role: 'assistant', content: 'Hi' }] },
    'messages',
    /Last message must be from user, got assistant/,
  ],
  [{ messages: [{ role: 'user', content: '[INST]' }] }, 'messages', /special tags are not allowed/],
  [{ messages: user, temperature: 2.5 }, 'temperature', /<=2/],
  [{ messages: user, temperature: 'hot' }, 'temperature', /expected number/],
  [{ messages: user, top_p: 0 }, 'top_p', />0/],
  [{ messages: user, top_k: -2 }, 'top_k', />=-1/],
  [{ messages: user, max_tokens: 0 }, 'max_tokens', />=1/],
  [{ messages: user, max_completion_tokens: 1.5 }, 'max_completion_tokens', /int/],
  [{ messages: user, seed: 2 ** 64 }, 'seed', /<=9223372036854776000, got 18446744073709552000/],
  [{ messages: user, stop: Array(17).fill('a') }, 'stop', /at most 16/],
  [{ messages: user, stop: '' }, 'stop', />=1 characters/],
  [{ messages: user, stream: 'yes' }, 'stream', /boolean/],
  [{ messages: user, priority: 0 }, 'priority', />=1/],
  [{ messages: user, deadline_s: 0 }, 'deadline_s', />0/],
  [{ messages: user, model: 7 }, 'model', /must be a string/],
  [{ messages: user, n: 0 }, 'n', />=1/],
  [{ messages: user, n: 129 }, 'n', /<=128/],
  [{ messages: user, logprobs: 3 }, 'logprobs', /expected boolean/],
  [{ messages: user, top_logprobs: 3 }, 'top_logprobs', /needs logprobs to be true/],
  [{ messages: user, logprobs: true, top_logprobs: 21 }, 'top_logprobs', /<=20/],
  [{ messages: user, tools: [{ type: 'function' }] }, 'tools.0.function', /./],
  [{ messages: user, tools: [{ type: 'retrieval' }] }, 'tools.0.type', /other tools are not/],
  [{ messages: user, tool_choice: 'required' }, 'tool_choice', /needs tools/],
  [{ messages: user, tool_choice: 'perhaps' }, 'tool_choice', /none, auto, required/],
  [{ messages: [...user, { role: 'assistant' }] }, 'messages.1.content', /must be a string/],
  [
    { messages: [...user, { role: 'tool', content: 'sunny', tool_call_id: 'c' }] },
    'messages.1',
    /must follow the assistant's that called it/,
  ],
  [{ messages: user, functions: [{ name: 'f' }] }, 'functions', /not supported/],
  [
    { messages: user, response_format: { type: 'xml' } },
    'response_format.type',
    /must be an object whose/,
  ],
  [{ messages: user, response_format: schemaFormat({ not: {} }) }, 'response_format', /not is not/],
  [{ messages: user, response_format: schemaFormat({ $ref: '#' }) }, 'response_format', /progress/],
  [{ messages: user, response_format: schemaFormat(nested(300)) }, 'response_format', /128 levels/],
  [
    { messages: user, response_format: schemaFormat(nested(2_000)) },
    'response_format',
    /128 levels/,
  ],
  [{ messages: user, guided_regex: 'a{1,100000}' }, 'guided_regex', /100000 times; at most 10000/],
  [{ messages: user, guided_regex: '(?=a)b' }, 'guided_regex', /look-ahead/],
  [{ messages: user, guided_regex: '(a?){3000}a{3000}' }, 'guided_regex', /ambiguous/],
  [{ messages: user, guided_choice: [] }, 'guided_choice', /./],
  [
    { messages: user, guided_grammar: 'root ::= root "a"' },
    'guided_grammar',
    /begins with itself|no text/,
  ],
  [
    { messages: user, guided_grammar: 'root ::= a' },
    'guided_grammar',
    /line 1: there is no rule a/,
  ],
  [
    { messages: user, guided_choice: ['a'], guided_regex: 'a' },
    'guided_choice',
    /cannot stand beside/,
  ],
  [
    { messages: user, guided_choice: ['a'], stop: 'b' },
    'stop',
    /cannot stand beside guided_choice/,
  ],
  [{ messages: user, guided_choice: ['a'], ignore_eos: true }, 'ignore_eos', /cannot stand beside/],
  [{ messages: user, min_p: 1.5 }, 'min_p', /<=1/],
  [{ messages: user, logit_bias: { 5: 101 } }, 'logit_bias.5', /<=100/],
  [{ messages: user, logit_bias: { llama: 1 } }, 'logit_bias.llama', /./],
  [{ messages: user, logit_bias: [1] }, 'logit_bias', /record/],
  [{ messages: user, logit_bias: { 99999: 1 } }, 'logit_bias', /99999 is not below the vocab/],
  [{ messages: user, logit_bias: { 5: 1, '05': 1 } }, 'logit_bias', /twice/],
  [
    {
      messages: user,
      logit_bias: Object.fromEntries(Array.from({ length: 1025 }, (_, i) => [i, 1])),
    },
    'logit_bias',
    /has 1025 tokens; at most 1024/,
  ],
  [{ messages: user, presence_penalty: 2.5 }, 'presence_penalty', /<=2/],
  [{ messages: user, frequency_penalty: '1' }, 'frequency_penalty', /expected number/],
  [{ messages: user, repetition_penalty: 0 }, 'repetition_penalty', />0/],
];

const completions: readonly Case[] = [
  [{ prompt: [] }, 'prompt', /must be a string/],
  [{ prompt: ['a', 7] }, 'prompt', /must be a string/],
  [{ prompt: [[1], []] }, 'prompt.1', />=1 items/],
  [{ prompt: Array(129).fill('a') }, 'prompt', /array of 1 to 128 of either/],
  [{ prompt: [1, -3] }, 'prompt.1', />=0/],
  [{ prompt: [1, 1_000_000] }, 'prompt', /token id 1000000 is not below the vocabulary's \d+/],
  [{ prompt: [[1], [1, 1_000_000]] }, 'prompt', /token id 1000000 is not below/],
  [{ prompt: 'a', echo: 1 }, 'echo', /expected boolean/],
  [{ prompt: 'a', suffix: 'b' }, 'suffix', /cannot fill in before a suffix/],
  [{ prompt: 'a', n: 3, best_of: 2 }, 'best_of', /2 is less than n, 3/],
  [{ prompt: 'a', best_of: 2, stream: true }, 'best_of', /cannot be compared/],
  [{ prompt: ['a', 'b', 'c'], n: 64 }, 'n', /192 answers to 3 prompts; at most 128/],
  [{ prompt: 'a', logprobs: true }, 'logprobs', /expected number/],
  [{ prompt: 'a', logprobs: 21 }, 'logprobs', /<=20/],
  [{ prompt: 'a', max_tokens: -1 }, 'max_tokens', />=0/],
];

void test('each bad field is a 400 that names it, and nothing is queued', async () => {
  for (const [route, cases] of [
    ['/v1/chat/completions', chats],
    ['/v1/completions', completions],
  ] as const) {
    for (const [body, param, message] of cases) {
      const response = await gateway.post(route, body);
      const error = await refusalOf(response);
      const shown = JSON.stringify({ body, error });
      assert.equal(response.status, 400, shown);
      assert.equal(error.type, 'invalid_request_error', shown);
      assert.equal(error.code, 'invalid_request', shown);
      assert.equal(error.param, param, shown);
      assert.match(error.message, message, shown);
    }
  }
  assert.deepEqual(await gateway.jobIds(), []);
});

void test('a body that is no object, or no JSON, is a 400; one that is too large a 413', async () => {
  const route = `${gateway.url}/v1/chat/completions`;
  const bodies = ['', '{"a":', '[]', '"text"', 'null', '{"messages":[{]}'];
  for (const body of bodies) {
    const response = await fetch(route, { method: 'POST', body });
    assert.equal(response.status, 400, body);
    assert.equal((await refusalOf(response)).code, 'invalid_request');
  }
  const large = await fetch(route, { method: 'POST', body: 'x'.repeat(16 * 1024 * 1024 + 1) });
  assert.equal(large.status, 413);
  assert.match((await refusalOf(large)).message, /16777216 bytes/);
});

void test('a prompt that leaves no room names the limit and the value', async () => {
  const long = await gateway.post('/v1/completions', { prompt: Array(512).fill(5) });
  assert.equal(long.status, 400);
  const error = await refusalOf(long);
  assert.equal(error.code, 'context_length_exceeded');
  assert.equal(error.param, 'prompt');
  assert.match(error.message, /512 tokens.*context of 512/);
});

void test('unknown routes, models and jobs are a 404 in the same shape', async () => {
  const asked = [
    fetch(`${gateway.url}/v2/anything`),
    fetch(`${gateway.url}/v1/models/nobody`),
    fetch(`${gateway.url}/v1/jobs/job_none/events`),
    gateway.post('/v1/chat/completions', { model: 'nobody', messages: user }),
  ];
  const codes: unknown[] = [];
  for (const response of await Promise.all(asked)) {
    assert.equal(response.status, 404, response.url);
    codes.push((await refusalOf(response)).code);
  }
  assert.deepEqual(codes, ['not_found', 'model_not_found', 'not_found', 'model_not_found']);
  // A type without a body, as some clients send it, is no JSON that is wrong.
  const headers = { 'content-type': 'application/json' };
  const unknown = await fetch(`${gateway.url}/v1/responses/r`, { method: 'DELETE', headers });
  assert.equal((await refusalOf(unknown)).code, 'not_found');
  const empty = await fetch(`${gateway.url}/v1/completions`, { method: 'POST', headers });
  assert.equal((await refusalOf(empty)).message, 'the body must be a JSON object');
});

void test('fields that ask for nothing, and unknown ones, are let pass', async () => {
  const leaving = new AbortController();
  const body = {
    messages: user,
    stream: true,
    n: 1,
    logprobs: false,
    best_of: 7,
    tools: [],
    tool_choice: 'auto',
    response_format: { type: 'text' },
    logit_bias: {},
    presence_penalty: 0,
    stop: null,
    user: 'somebody',
    metadata: { anything: 1 },
  };
  const response = await gateway.post('/v1/chat/completions', body, leaving.signal);
  assert.equal(response.status, 200);
  const id = response.headers.get('x-caravan-job')!;
  const job = await gateway.journal.job(id);
  // What was left out comes from the card, the context and chance.
  const { sampling, maxTokens, promptTokenIds, isTextStart } = job!.request;
  assert.equal(sampling.temperature, 0.6);
  assert.equal(sampling.topP, 0.9);
  assert.ok(Number.isSafeInteger(sampling.seed));
  assert.equal(maxTokens, card.maxSeqLen - promptTokenIds.length);
  assert.equal(isTextStart, true);
  leaving.abort();
  for await (const entry of gateway.journal.read(id, 0, 0, AbortSignal.timeout(30_000))) {
    assert.equal(entry.kind, 'end');
  }
});

void test('developers are systems, systems at the beginning are one message, and seeds have 64 bits', async () => {
  const tokensOf = async (system: object[]): Promise<unknown> => {
    const answer = await gateway.post('/tokenize', { messages: [...system, ...user] });
    return ((await answer.json()) as { tokens: unknown }).tokens;
  };
  const system = [
    { role: 'developer', content: 'Be kind.' },
    { role: 'system', content: 'Be brief.' },
  ];
  const expected = await tokensOf([{ role: 'system', content: 'Be kind.\n\nBe brief.' }]);
  assert.deepEqual(await tokensOf(system), expected);
  const leaving = new AbortController();
  const body = { messages: [...system, ...user], seed: -(2 ** 62), stream: true };
  const response = await gateway.post('/v1/chat/completions', body, leaving.signal);
  const { request } = (await gateway.journal.job(response.headers.get('x-caravan-job')!))!;
  assert.deepEqual(request.promptTokenIds, expected);
  assert.equal(request.sampling.seed, -(2 ** 62));
  leaving.abort();
});

void test('penalties, biases and min_p travel with the job', async () => {
  const leaving = new AbortController();
  const body = {
    prompt: 'Hi',
    stream: true,
    min_p: 0.1,
    repetition_penalty: 1.2,
    frequency_penalty: -0.5,
    logit_bias: { 7: -100, 8: 0, 9: 2.5 },
  };
  const response = await gateway.post('/v1/completions', body, leaving.signal);
  const id = response.headers.get('x-caravan-job')!;
  const { sampling } = (await gateway.journal.job(id))!.request;
  assert.equal(sampling.minP, 0.1);
  assert.deepEqual(sampling.adjustment, {
    repetitionPenalty: 1.2,
    presencePenalty: 0,
    frequencyPenalty: -0.5,
    biases: [
      [7, -100],
      [9, 2.5],
    ],
  });
  leaving.abort();
  for await (const entry of gateway.journal.read(id, 0, 0, AbortSignal.timeout(30_000))) {
    assert.equal(entry.kind, 'end');
  }
});

void test('models, health and metrics', async () => {
  const models = (await (await fetch(`${gateway.url}/v1/models`)).json()) as {
    data: { id: string; created: number }[];
  };
  assert.deepEqual(
    models.data.map(({ id, created }) => [id, created]),
    [[card.name, card.createdS]],
  );
  assert.equal((await fetch(`${gateway.url}/v1/models/${card.name}`)).status, 200);
  assert.equal((await fetch(`${gateway.url}/livez`)).status, 200);
  assert.equal((await fetch(`${gateway.url}/health`)).status, 200);
  const unready = await fetch(`${gateway.url}/readyz`);
  assert.equal(unready.status, 503);
  assert.equal((await refusalOf(unready)).code, 'engine_unavailable');
  await store.beat({ model: card.name, engineId: 'e<1>', active: 1, slots: 4, tp: 2 });
  assert.equal((await fetch(`${gateway.url}/readyz`)).status, 200);

  const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
  assert.match(metrics, /^caravan_http_requests_total\{route="\/readyz",status="503"\} 1$/m);
  assert.match(
    metrics,
    /^caravan_http_requests_total\{route="\/v1\/chat\/completions",status="200"\} 2$/m,
  );
  assert.match(metrics, /^caravan_engines\{model="caravan-tiny"\} 1$/m);
  assert.match(metrics, /^caravan_queue_jobs\{model="caravan-tiny",state="waiting"\} \d+$/m);
  assert.match(metrics, /^caravan_queue_oldest_seconds\{model="caravan-tiny"\} \d/m);
  assert.match(metrics, /^caravan_redis_up 1$/m);
  assert.match(metrics, /^caravan_redis_durable 1$/m);

  const page = await fetch(gateway.url);
  assert.match(page.headers.get('content-type') ?? '', /^text\/html/);
  const html = await page.text();
  assert.match(html, /caravan-tiny/);
  assert.ok(html.includes('e&#60;1&#62;'), 'names are escaped');
  assert.ok(!/(src|href)=/.test(html), 'it needs nothing from elsewhere');
});

void test('while Redis is dead or deaf every route says so within three seconds', async () => {
  const routes = ['/health', '/readyz', '/v1/models', '/'];
  const askAll = async (): Promise<void> => {
    const startMs = performance.now();
    const answers = await Promise.all([
      ...routes.map((route) => fetch(`${gateway.url}${route}`)),
      gateway.post('/v1/chat/completions', { messages: user }),
      gateway.post('/v1/completions', { prompt: 'a', stream: true }),
    ]);
    const wallMs = performance.now() - startMs;
    for (const answer of answers) {
      assert.equal(answer.status, 503, answer.url);
      assert.equal((await refusalOf(answer)).code, 'redis_unavailable');
    }
    assert.ok(wallMs < 20_000, `it took ${wallMs.toFixed(0)} ms`);
    assert.equal((await fetch(`${gateway.url}/livez`)).status, 200);
    // Whoever watches hears of it: the metrics themselves must not be missing.
    const metrics = await (await fetch(`${gateway.url}/metrics`)).text();
    assert.match(metrics, /^caravan_redis_up 0$/m);
  };
  process.kill(gateway.redis.pid, 'SIGSTOP');
  try {
    await askAll();
  } finally {
    process.kill(gateway.redis.pid, 'SIGCONT');
  }
  await gateway.redis.kill('SIGTERM');
  await askAll();
  await gateway.redis.restart();
  const giveUpMs = performance.now() + 60_000;
  while ((await fetch(`${gateway.url}/v1/models`)).status !== 200) {
    assert.ok(performance.now() < giveUpMs, 'it comes back by itself');
  }
});

void test('a connection on which nothing was asked does not hold up the end', async () => {
  const silent = net.connect(Number(new URL(gateway.url).port), '127.0.0.1');
  await new Promise((resolve) => silent.once('connect', resolve));
  assert.equal((await fetch(`${gateway.url}/livez`)).status, 200);
  const startMs = performance.now();
  await gateway.drain();
  assert.ok(performance.now() - startMs < 30_000);
  silent.destroy();
});
