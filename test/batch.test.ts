/** Files and batches through OpenAI's official client: a real engine, real Redis, and what OpenAI's description says. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import OpenAI, { toFile, type APIError } from 'openai';
import {
  endedBatch,
  linesOf,
  startBatchWorld,
  type ErrorLine,
  type OutputLine,
} from './batch-world.js';

const world = await startBatchWorld();
after(() => world.stop());
const { client } = world;
const model = 'caravan-tiny';

const request = (customId: string, body: Readonly<Record<string, unknown>>): string =>
  JSON.stringify({
    custom_id: customId,
    method: 'POST',
    url: '/v1/chat/completions',
    body: { model, max_tokens: 3, ...body },
  });

interface ErrorBody {
  readonly error: { readonly code: string };
}

const question = (text: string) => ({ messages: [{ role: 'user', content: text }] });

async function upload(lines: readonly string[]): Promise<OpenAI.FileObject> {
  const file = await toFile(Buffer.from(lines.join('\n')), 'requests.jsonl');
  return client.files.create({ file, purpose: 'batch' });
}

async function submit(
  lines: readonly string[],
  endpoint: OpenAI.BatchCreateParams['endpoint'] = '/v1/chat/completions',
): Promise<OpenAI.Batch> {
  const { id } = await upload(lines);
  return client.batches.create({ input_file_id: id, endpoint, completion_window: '24h' });
}

void test('a file is uploaded, found, read back and deleted', async () => {
  const text = `${request('a', question('hi'))}\n`;
  const file = await upload([text]);
  assert.equal(file.bytes, Buffer.byteLength(text));
  assert.equal(file.filename, 'requests.jsonl');
  assert.equal(file.expires_at! - file.created_at, 30 * 24 * 3600);
  world.checkBody('OpenAIFile', file);
  assert.deepEqual(await client.files.retrieve(file.id), file);
  assert.equal(await (await client.files.content(file.id)).text(), text);
  const listed = await client.files.list({ purpose: 'batch', limit: 1 });
  assert.deepEqual(listed.data, [file]);
  assert.deepEqual(await client.files.delete(file.id), {
    id: file.id,
    object: 'file',
    deleted: true,
  });
  await assert.rejects(client.files.retrieve(file.id), OpenAI.NotFoundError);
  await assert.rejects(client.files.content(file.id), OpenAI.NotFoundError);
});

void test('a batch is answered, line by line, with what each would have been answered over HTTP', async () => {
  const asked = { ...question('Tell me a story.'), temperature: 0.7, seed: 11, max_tokens: 12 };
  const created = await submit([
    request('story', asked),
    request('hot', { ...question('hi'), temperature: 5 }),
    request('streamed', { ...question('hi'), stream: true }),
    request('long', question('fox '.repeat(2000))),
  ]);
  world.checkBody('Batch', created);
  assert.equal(created.status, 'validating');
  const batch = await endedBatch(client, created.id);
  world.checkBody('Batch', batch);
  assert.equal(batch.status, 'completed');
  assert.equal(batch.model, model);
  assert.deepEqual(batch.request_counts, { total: 4, completed: 1, failed: 3 });
  const { created_at, in_progress_at, finalizing_at, completed_at, expires_at } = batch;
  assert.ok(created_at <= in_progress_at! && in_progress_at! <= finalizing_at!);
  assert.ok(finalizing_at! <= completed_at! && completed_at! < expires_at!);

  const output = await linesOf<OutputLine>(client, batch.output_file_id!);
  assert.equal(output.length, 1);
  const { custom_id, error, response } = output[0]!;
  assert.equal(custom_id, 'story');
  assert.equal(error, null);
  assert.equal(response.status_code, 200);
  world.checkBody('CreateChatCompletionResponse', response.body);
  const direct = await client.chat.completions.create({ model, ...asked } as never);
  assert.deepEqual(response.body.choices, (direct as OpenAI.ChatCompletion).choices);
  assert.deepEqual(batch.usage?.output_tokens, response.body.usage!.completion_tokens);

  const errors = await linesOf<ErrorLine>(client, batch.error_file_id!);
  const told = Object.fromEntries(
    errors.map((line) => [
      line.custom_id,
      [line.response!.status_code, line.response!.body.error.code, line.response!.body.error.param],
    ]),
  );
  assert.deepEqual(told, {
    hot: [400, 'invalid_request', 'temperature'],
    streamed: [400, 'invalid_request', 'stream'],
    long: [400, 'context_length_exceeded', 'messages'],
  });
});

void test('completions have batches too', async () => {
  const lines = ['The llama', 'A fox'].map((prompt, i) =>
    JSON.stringify({
      ...{ custom_id: `c${i}`, method: 'POST', url: '/v1/completions' },
      body: { model, prompt, max_tokens: 2, temperature: 0 },
    }),
  );
  const batch = await endedBatch(client, (await submit(lines, '/v1/completions')).id);
  assert.deepEqual(batch.request_counts, { total: 2, completed: 2, failed: 0 });
  assert.equal(batch.error_file_id, undefined);
  const output = await linesOf<OutputLine>(client, batch.output_file_id!);
  assert.deepEqual(output.map(({ custom_id }) => custom_id).sort(), ['c0', 'c1']);
  for (const { response } of output) world.checkBody('CreateCompletionResponse', response.body);
});

void test('a file that is no list of requests fails, with the line of every fault', async () => {
  const batch = await endedBatch(
    client,
    (
      await submit([
        request('a', question('hi')),
        '{"custom_id": "b", ',
        '',
        request('a', question('again')),
        request('c', { model: 'nobody' }),
        JSON.stringify({ custom_id: 'd', method: 'GET', url: '/v1/chat/completions', body: {} }),
        JSON.stringify({ custom_id: 'e', method: 'POST', url: '/v1/completions', body: {} }),
        JSON.stringify({ method: 'POST', url: '/v1/chat/completions', body: {} }),
        '[]',
      ])
    ).id,
  );
  world.checkBody('Batch', batch);
  assert.equal(batch.status, 'failed');
  assert.ok(batch.failed_at);
  assert.deepEqual(
    batch.errors!.data!.map(({ line, code, param }) => [line, code, param]),
    [
      [2, 'invalid_json_line', null],
      [4, 'duplicate_custom_id', 'custom_id'],
      [5, 'model_not_found', 'body.model'],
      [6, 'invalid_method', 'method'],
      [7, 'mismatched_url', 'url'],
      [8, 'missing_required_parameter', 'custom_id'],
      [9, 'invalid_json_line', null],
    ],
  );
  assert.equal(batch.output_file_id, undefined);

  const empty = await endedBatch(client, (await submit([' ', ''])).id);
  assert.equal(empty.errors!.data![0]!.code, 'empty_file');
  const many = Array.from({ length: 1001 }, (_, i) => request(`r${i}`, question('hi')));
  const tooMany = await endedBatch(client, (await submit(many)).id);
  assert.equal(tooMany.errors!.data![0]!.code, 'too_many_requests');
});

void test('a cancelled batch keeps what is done', async () => {
  const quick = Array.from({ length: 20 }, (_, i) => request(`quick${i}`, question('hi')));
  const slow = Array.from({ length: 60 }, (_, i) =>
    request(`slow${i}`, { ...question('hi'), max_tokens: 400, ignore_eos: true }),
  );
  const created = await submit([...quick, ...slow]);
  await world.until(created.id, ({ request_counts }) => request_counts!.completed >= 20);
  const cancelling = await client.batches.cancel(created.id);
  assert.equal(cancelling.status, 'cancelling');
  await assert.rejects(client.files.delete(created.input_file_id), OpenAI.ConflictError);
  const batch = await endedBatch(client, created.id);
  world.checkBody('Batch', batch);
  assert.equal(batch.status, 'cancelled');
  assert.ok(batch.cancelling_at! <= batch.cancelled_at!);
  const output = await linesOf<OutputLine>(client, batch.output_file_id!);
  const errors = await linesOf<ErrorLine>(client, batch.error_file_id!);
  assert.deepEqual(batch.request_counts, {
    total: 80,
    completed: output.length,
    failed: errors.length,
  });
  assert.equal(new Set([...output, ...errors].map(({ custom_id }) => custom_id)).size, 80);
  for (let i = 0; i < 20; i += 1) {
    assert.ok(output.some(({ custom_id }) => custom_id === `quick${i}`));
  }
  assert.ok(errors.length >= 40);
  for (const { response, error } of errors) {
    assert.equal(response, null);
    assert.equal(error!.code, 'batch_cancelled');
  }
  assert.equal(await world.jobsInQueue(), 0, 'their jobs are withdrawn');
  assert.equal((await client.batches.cancel(created.id)).status, 'cancelled');
});

void test('a batch yields to whoever waits for an answer', async () => {
  const lines = Array.from({ length: 40 }, (_, i) =>
    request(`slow${i}`, { ...question('hi'), max_tokens: 300, ignore_eos: true }),
  );
  const { id } = await submit(lines);
  await world.until(id, ({ request_counts }) => request_counts!.completed >= 1);
  await client.chat.completions.create({
    ...{ model, max_completion_tokens: 1 },
    messages: [{ role: 'user', content: 'And I?' }],
  });
  const { status, request_counts } = await client.batches.retrieve(id);
  assert.equal(status, 'in_progress');
  assert.ok(request_counts!.completed < 40, 'most of its lines still wait');
  await client.batches.cancel(id);
  await endedBatch(client, id);
});

void test('when its window ends a batch expires, and keeps what is done', async () => {
  const { id } = await upload([
    request('quick', question('hi')),
    ...Array.from({ length: 60 }, (_, i) =>
      request(`slow${i}`, { ...question('hi'), max_tokens: 450, ignore_eos: true }),
    ),
  ]);
  const created = await client.batches.create({
    ...{ input_file_id: id, endpoint: '/v1/chat/completions' },
    completion_window: '2s' as '24h',
    output_expires_after: { anchor: 'created_at', seconds: 3600 },
    metadata: { night: 'first' },
  });
  assert.equal(created.expires_at! - created.created_at, 2);
  const batch = await endedBatch(client, created.id);
  assert.equal(batch.status, 'expired');
  assert.deepEqual(batch.metadata, { night: 'first' });
  const output = await linesOf<OutputLine>(client, batch.output_file_id!);
  assert.ok(output.some(({ custom_id }) => custom_id === 'quick'));
  const errors = await linesOf<ErrorLine>(client, batch.error_file_id!);
  assert.equal(output.length + errors.length, 61);
  assert.ok(errors.every(({ error }) => error!.code === 'batch_expired'));
  const file = await client.files.retrieve(batch.error_file_id!);
  assert.equal(file.purpose, 'batch_output');
  assert.equal(file.expires_at! - file.created_at, 3600);
});

void test('lists turn their pages', async () => {
  const all: string[] = [];
  for await (const { id } of client.batches.list({ limit: 2 })) all.push(id);
  const known: string[] = [];
  for await (const { id } of client.batches.list({ limit: 100 })) known.push(id);
  assert.ok(known.length > 4);
  assert.deepEqual(all, known);
  const up: string[] = [];
  for await (const { id } of client.files.list({ limit: 3, order: 'asc' })) up.push(id);
  const down: string[] = [];
  for await (const { id } of client.files.list()) down.push(id);
  assert.deepEqual(up, down.reverse());
});

void test('what cannot be a file or a batch is refused, with its field', async () => {
  const { id } = await upload([request('a', question('hi'))]);
  const whole = { input_file_id: id, endpoint: '/v1/chat/completions', completion_window: '24h' };
  const refused = async (change: object, param: string): Promise<void> => {
    await assert.rejects(
      client.batches.create({ ...whole, ...change } as never),
      (error: APIError) => error.status === 400 && error.param === param,
    );
  };
  await refused({ input_file_id: 'file-none' }, 'input_file_id');
  await refused({ endpoint: '/v1/embeddings' }, 'endpoint');
  await refused({ completion_window: '24 hours' }, 'completion_window');
  await refused({ completion_window: '31d' }, 'completion_window');
  await refused({ metadata: { a: 1 } }, 'metadata.a');
  await refused(
    { output_expires_after: { anchor: 'created_at', seconds: 5 } },
    'output_expires_after.seconds',
  );
  await assert.rejects(client.batches.retrieve('batch_none'), OpenAI.NotFoundError);
  await assert.rejects(client.batches.cancel('batch_none'), OpenAI.NotFoundError);

  const file = await toFile(Buffer.from('x'), 'x');
  await assert.rejects(
    client.files.create({ file, purpose: 'fine-tune' }),
    (error: APIError) => error.status === 400 && error.param === 'purpose',
  );
  const large = await toFile(Buffer.alloc(1_000_001, 'x'), 'large.jsonl');
  await assert.rejects(
    client.files.create({ file: large, purpose: 'batch' }),
    (error: APIError) => error.status === 413,
  );
  const names = (await client.files.list()).data.map(({ filename }) => filename);
  assert.ok(!names.includes('large.jsonl') && !names.includes('x'));
  const forms = [undefined, 'multipart/form-data; boundary=x', 'multipart/form-data'];
  for (const form of forms) {
    const headers = form === undefined ? {} : { 'content-type': form };
    const plain = await fetch(`${world.url}/v1/files`, { method: 'POST', headers, body: '"x"' });
    assert.equal(plain.status, 400, form);
    assert.equal(((await plain.json()) as ErrorBody).error.code, 'invalid_request', form);
  }
});
