/**
 * OpenAI's official client against the whole: gateway, Redis, coordinator and two ranks, in exact mode. CARAVAN_LONG=1 compares
 * all 64 requests with what they give alone, and draws more stop texts.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import OpenAI from 'openai';
import { Random } from './random.js';
import { descendants, startUp } from './up-process.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-clients-'));
const up = await startUp(path.join(scratch, 'state'), ['--exact', '--max-batch-size', '16']);
after(async () => {
  await up.stop();
  fs.rmSync(scratch, { recursive: true, force: true });
});

const client = new OpenAI({ baseURL: `${up.url}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'caravan-tiny';
const isLong = process.env['CARAVAN_LONG'] === '1';
const question = [{ role: 'user' as const, content: 'Tell me a story about a fox.' }];

void test('a chat is streamed in pieces that make the whole answer, with its usage', async () => {
  const settings = { model, messages: question, temperature: 0.8, seed: 5 };
  const whole = await client.chat.completions.create(settings);
  const stream = await client.chat.completions.create({
    ...settings,
    stream: true,
    stream_options: { include_usage: true },
  });
  let text = '';
  let finishReason: string | null = null;
  let usage: OpenAI.CompletionUsage | null = null;
  let chunkCount = 0;
  for await (const chunk of stream) {
    chunkCount += 1;
    text += chunk.choices[0]?.delta.content ?? '';
    finishReason ??= chunk.choices[0]?.finish_reason ?? null;
    usage ??= chunk.usage ?? null;
  }
  assert.equal(text, whole.choices[0]!.message.content);
  assert.ok(text.length > 100 && chunkCount > 20, 'a story, in many chunks');
  assert.equal(finishReason, 'stop');
  assert.equal(whole.choices[0]!.finish_reason, 'stop');
  // The second of them finds the prompt in the cache.
  const { prompt_tokens_details: cached, ...counts } = usage!;
  assert.deepEqual({ ...whole.usage, ...counts }, whole.usage);
  assert.ok(cached!.cached_tokens! > 0 && cached!.cached_tokens! < counts.prompt_tokens);
  assert.equal(
    whole.usage!.total_tokens,
    whole.usage!.prompt_tokens + whole.usage!.completion_tokens,
  );
});

void test('a completion is streamed in pieces that make the whole text', async () => {
  const settings = { model, prompt: 'The llama', temperature: 0, max_tokens: 40 };
  const whole = await client.completions.create(settings);
  let text = '';
  for await (const chunk of await client.completions.create({ ...settings, stream: true })) {
    text += chunk.choices[0]?.text ?? '';
  }
  assert.equal(text, whole.choices[0]!.text);
  assert.ok(text.startsWith(' '), 'a continuation keeps its space');
});

void test('a stop text ends an answer and is not part of it', async () => {
  const settings = { model, messages: question, temperature: 0 };
  const whole = (await client.chat.completions.create(settings)).choices[0]!.message.content!;
  const stop = whole.slice(40, 46);
  const cut = await client.chat.completions.create({ ...settings, stop });
  assert.equal(cut.choices[0]!.message.content, whole.slice(0, whole.indexOf(stop)));
  assert.equal(cut.choices[0]!.finish_reason, 'stop');
});

void test('64 requests at once on 16 slots each give the text that they give alone', async () => {
  const requests = Array.from({ length: 64 }, (_, i) => ({
    model,
    prompt: `${['The llama', 'A fox', 'Once', 'In a far'][i % 4]!} ${'walked '.repeat(i % 7)}`,
    temperature: i % 2 === 0 ? 0 : 0.8,
    seed: i,
    max_tokens: 12 + (i % 5) * 9,
  }));
  const textOf = async (request: (typeof requests)[number]): Promise<string> =>
    (await client.completions.create(request)).choices[0]!.text;
  const together = await Promise.all(requests.map(textOf));
  for (const [i, request] of requests.entries()) {
    // Every third has each prompt, length and temperature.
    if (isLong || i % 3 === 0) assert.equal(await textOf(request), together[i], `request ${i}`);
  }
});

void test('a client that leaves takes its job with it', async () => {
  const controller = new AbortController();
  // Without an end of its own in sight, so that only the client's leaving can end it.
  const request = { model, prompt: 'The llama', max_tokens: 400, ignore_eos: true };
  const stream = await client.completions.create(
    { ...request, stream: true },
    { signal: controller.signal },
  );
  let jobId = '';
  for await (const chunk of stream) {
    jobId = chunk.id.replace('cmpl-', 'job_');
    break;
  }
  controller.abort();
  // The job's own events tell when it has ended, and how.
  const response = await fetch(`${up.url}/v1/jobs/${jobId}/events`);
  assert.match(await response.text(), /"message":"the job was cancelled"/);
});

void test('an open stream over a killed coordinator shows each token once', async () => {
  const post = (stream: boolean): Promise<Response> =>
    fetch(`${up.url}/v1/completions`, {
      method: 'POST',
      headers: { 'content-type': 'application/json' },
      body: JSON.stringify({
        ...{ model, prompt: 'A caravan', temperature: 0.8, seed: 11 },
        ...{ max_tokens: 200, ignore_eos: true, stream },
      }),
    });
  const alone = (await (await post(false)).json()) as { choices: { text: string }[] };
  const response = await post(true);
  const ids: number[] = [];
  let text = '';
  let pending = '';
  let killedMs = 0;
  let pauseMs = 0;
  for await (const bytes of response.body!.pipeThrough(new TextDecoderStream())) {
    const events = `${pending}${bytes}`.split('\n\n');
    pending = events.pop()!;
    for (const event of events) {
      const id = /^id: (\d+)-0$/m.exec(event)?.[1];
      const data = /^data: (\{.*)$/m.exec(event)?.[1];
      if (data === undefined) continue;
      text += (JSON.parse(data) as { choices: { text: string }[] }).choices[0]?.text ?? '';
      if (id === undefined) continue;
      ids.push(Number(id));
      if (killedMs > 0 && pauseMs === 0) pauseMs = performance.now() - killedMs;
      if (ids.length === 60) {
        const coordinator = descendants(up.process.pid!).find(({ command }) =>
          command.includes(' coordinator '),
        );
        process.kill(coordinator!.pid, 'SIGKILL');
        killedMs = performance.now();
      }
    }
  }
  assert.equal(text, alone.choices[0]!.text);
  assert.ok(killedMs > 0, 'the coordinator was killed in mid-generation');
  for (const [i, id] of ids.entries())
    assert.ok(i === 0 || id > ids[i - 1]!, `id ${id} after ${ids[i - 1]!}`);
  // Events that were on their way when it died come at once; the one after the pause is the largest gap.
  assert.ok(pauseMs < 30_000);
});

void test('errors have the shape that the client expects', async () => {
  await assert.rejects(
    client.chat.completions.create({ model, messages: question, temperature: 3 }),
    (error) =>
      error instanceof OpenAI.BadRequestError &&
      error.param === 'temperature' &&
      error.code === 'invalid_request',
  );
  await assert.rejects(
    client.completions.create({ model, prompt: 'walked '.repeat(600) }),
    (error) => error instanceof OpenAI.BadRequestError && error.code === 'context_length_exceeded',
  );
  await assert.rejects(
    client.chat.completions.create({ model: 'nobody', messages: question }),
    (error) => error instanceof OpenAI.NotFoundError && /caravan-tiny/.test(error.message),
  );
  await assert.rejects(
    client.chat.completions.create({ model, messages: question, n: 200 }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === 'n',
  );
  await assert.rejects(
    client.chat.completions.create({
      model,
      messages: [{ role: 'user', content: 'a [INST] b' }],
    }),
    (error) =>
      error instanceof OpenAI.BadRequestError &&
      error.message.includes('special tags are not allowed as part of the prompt'),
  );
  const malformed = await fetch(`${up.url}/v1/chat/completions`, { method: 'POST', body: '{"a":' });
  assert.equal(malformed.status, 400);
  assert.match(await malformed.text(), /"type":"invalid_request_error"/);
});

/** Biases that make answers of the bytes of é (C3 A9), of which two stand for a character and others for none. */
const broken = { 3: -100, ...Object.fromEntries([0xc3, 0xa9, 0x61].map((byte) => [byte + 3, 60])) };

void test('stop texts never leak and never eat, in any of several streams, across tokens and bytes', async () => {
  const random = new Random(77);
  let cut = 0;
  for (let round = 0; round < (isLong ? 10 : 4); round += 1) {
    const settings = {
      ...{ model, n: 2, max_tokens: 40, seed: round, temperature: 1, ignore_eos: true },
      ...(round % 2 === 0 ? { logit_bias: broken } : {}),
    };
    const asked = { ...settings, prompt: 'The llama' };
    const whole = await client.completions.create(asked);
    const texts = whole.choices.map(({ text }) => Array.from(text));
    // From the middle of either answer; of several, whichever comes first ends it.
    const stop = Array.from({ length: 1 + (round % 2) }, () => {
      const text = texts[random.below(2)]!;
      const from = random.below(text.length - 6);
      return text.slice(from, from + 1 + random.below(6)).join('');
    });
    const expected = whole.choices.map(({ text }) => {
      const ends = stop.map((each) => text.indexOf(each)).filter((at) => at >= 0);
      cut += ends.length > 0 ? 1 : 0;
      return ends.length > 0 ? text.slice(0, Math.min(...ends)) : text;
    });
    const stopped = await client.completions.create({ ...asked, stop });
    assert.deepEqual(
      stopped.choices.map(({ text }) => text),
      expected,
    );
    const streamed = ['', ''];
    for await (const { choices } of await client.completions.create({
      ...{ ...asked, stop, stream: true },
    })) {
      for (const { index, text } of choices) {
        streamed[index]! += text;
        assert.ok(expected[index]!.startsWith(streamed[index]!), 'nothing of a stop text is shown');
      }
    }
    assert.deepEqual(streamed, expected);

    const chat = { ...settings, messages: question };
    const plain = await client.chat.completions.create({ ...chat, stop });
    const spoken = ['', ''];
    for await (const { choices } of await client.chat.completions.create({
      ...{ ...chat, stop, stream: true },
    })) {
      for (const { index, delta } of choices) spoken[index]! += delta.content ?? '';
    }
    assert.deepEqual(
      spoken,
      plain.choices.map(({ message }) => message.content),
    );
    for (const text of spoken) for (const each of stop) assert.ok(!text.includes(each));
  }
  assert.ok(cut >= (isLong ? 10 : 4), `${cut} answers were cut`);
});

void test('a temperature next to none is none, and a top_k of -1 keeps all', async () => {
  const asked = { model, prompt: 'The llama', max_tokens: 12 };
  const textOf = async (fields: object): Promise<string> =>
    (await client.completions.create({ ...asked, ...fields })).choices[0]!.text;
  assert.equal(await textOf({ temperature: 5e-324 }), await textOf({ temperature: 0 }));
  const seeded = { temperature: 1.5, seed: 8 };
  assert.equal(await textOf({ ...seeded, top_k: -1 }), await textOf({ ...seeded, top_k: 0 }));
});
