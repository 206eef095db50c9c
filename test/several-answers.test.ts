/**
 * Several answers to one request, and logprobs, by OpenAI's official client against the whole: each choice is what its
 * sequence gives, the best of several are chosen by their logprobs, and a coordinator that dies takes none of it away.
 */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import OpenAI from 'openai';
import { checkOpenaiBody } from './openai-description.js';
import { serveModel } from './served-model.js';

const served = await serveModel(4);
after(() => served.stop());

const client = new OpenAI({ baseURL: `${served.url}/v1`, apiKey: 'none', maxRetries: 0 });
const model = 'caravan-tiny';
const messages = [{ role: 'user' as const, content: 'Tell me a story about a fox.' }];

const sum = (xs: readonly number[]): number => xs.reduce((a, b) => a + b, 0);

void test('n answers, more than there are slots, are streamed as they are whole', async () => {
  const settings = { model, messages, n: 6, temperature: 1, seed: 5, max_tokens: 24 };
  const whole = await client.chat.completions.create(settings);
  checkOpenaiBody('CreateChatCompletionResponse', whole);
  assert.deepEqual(
    whole.choices.map(({ index }) => index),
    [0, 1, 2, 3, 4, 5],
  );
  const texts = whole.choices.map(({ message }) => message.content);
  assert.equal(new Set(texts).size, 6, 'each has coins of its own');
  const stream = await client.chat.completions.create({
    ...settings,
    stream: true,
    stream_options: { include_usage: true },
  });
  const streamed = Array<string>(6).fill('');
  const reasons = Array<string | null>(6).fill(null);
  const roles = Array<number>(6).fill(0);
  let usage: OpenAI.CompletionUsage | null = null;
  for await (const chunk of stream) {
    checkOpenaiBody('CreateChatCompletionStreamResponse', chunk);
    usage = chunk.usage ?? usage;
    for (const { index, delta, finish_reason: reason } of chunk.choices) {
      streamed[index]! += delta.content ?? '';
      if (delta.role !== undefined) roles[index]! += 1;
      if (reason !== null) reasons[index] = reason;
    }
  }
  assert.deepEqual(streamed, texts);
  assert.deepEqual(
    reasons,
    whole.choices.map((choice) => choice.finish_reason),
  );
  assert.deepEqual(roles, Array(6).fill(1));
  assert.equal(whole.usage?.prompt_tokens_details?.cached_tokens, 0);
  // The second time, all but the prompt's last two tokens are there.
  const cached_tokens = whole.usage.prompt_tokens - 2;
  assert.deepEqual(usage, { ...whole.usage, prompt_tokens_details: { cached_tokens } });
  const one = await client.chat.completions.create({ ...settings, n: 1 });
  assert.equal(one.choices[0]!.message.content, texts[0]);
  assert.equal(whole.usage.prompt_tokens, one.usage!.prompt_tokens);
});

void test('several prompts, as texts and as token ids, are answered in their order', async () => {
  const prompts = ['The llama', 'A fox', 'Once upon a time'];
  const settings = { model, temperature: 0, max_tokens: 12 };
  const alone = await Promise.all(
    prompts.map((prompt) => client.completions.create({ ...settings, prompt })),
  );
  const together = await client.completions.create({ ...settings, prompt: prompts, n: 2 });
  checkOpenaiBody('CreateCompletionResponse', together);
  assert.deepEqual(
    together.choices.map(({ text }) => text),
    alone.flatMap(({ choices }) => [choices[0]!.text, choices[0]!.text]),
  );
  assert.equal(together.usage!.prompt_tokens, sum(alone.map(({ usage }) => usage!.prompt_tokens)));
  assert.equal(
    together.usage!.completion_tokens,
    2 * sum(alone.map(({ usage }) => usage!.completion_tokens)),
  );
  const ids = [
    [1, 300, 301],
    [1, 17],
  ];
  const byIds = await client.completions.create({ ...settings, prompt: ids });
  assert.equal(byIds.choices.length, 2);
  const one = await client.completions.create({ ...settings, prompt: ids[1]! });
  assert.equal(byIds.choices[1]!.text, one.choices[0]!.text);
});

void test('best_of shows the answers with the best mean logprob, the best first', async () => {
  const settings = { model, prompt: 'The llama', temperature: 1.2, seed: 9, max_tokens: 16 };
  const all = await client.completions.create({ ...settings, n: 6, logprobs: 0 });
  const ranked = all.choices
    .map(({ text, logprobs }) => {
      const own = logprobs!.token_logprobs!;
      return { text, mean: sum(own) / own.length };
    })
    .sort((a, b) => b.mean - a.mean);
  const best = await client.completions.create({ ...settings, n: 2, best_of: 6 });
  assert.deepEqual(
    best.choices.map(({ text, index }) => [index, text]),
    ranked.slice(0, 2).map(({ text }, index) => [index, text]),
  );
  assert.deepEqual(
    best.choices.map(({ logprobs }) => logprobs),
    [null, null],
  );
  assert.equal(best.usage!.completion_tokens, all.usage!.completion_tokens);
});

void test('logprobs of a chat belong to the text that is shown, streamed and whole', async () => {
  const settings = { model, messages, temperature: 0.9, seed: 3, logprobs: true, top_logprobs: 3 };
  const plain = (await client.chat.completions.create({ ...settings, top_logprobs: 0 }))
    .choices[0]!;
  const stop = plain.message.content!.slice(50, 58);
  const whole = (await client.chat.completions.create({ ...settings, stop })).choices[0]!;
  const content = whole.logprobs!.content!;
  const text = whole.message.content!;
  const bytes = Buffer.from(content.flatMap((each) => each.bytes!));
  // The last token may reach into the stop text, no token lies in it.
  assert.ok(bytes.toString().trimStart().startsWith(text));
  assert.ok(Buffer.from(content.slice(0, -1).flatMap((each) => each.bytes!)).length <= text.length);
  for (const each of content) {
    assert.equal(each.top_logprobs.length, 3);
    assert.ok(each.logprob <= 0 && each.top_logprobs[0]!.logprob >= each.logprob);
  }
  assert.deepEqual(
    plain.logprobs!.content!.flatMap((each) => each.top_logprobs),
    [],
  );
  const streamed: unknown[] = [];
  for await (const chunk of await client.chat.completions.create({
    ...settings,
    stop,
    stream: true,
  })) {
    checkOpenaiBody('CreateChatCompletionStreamResponse', chunk);
    streamed.push(...(chunk.choices[0]?.logprobs?.content ?? []));
  }
  assert.deepEqual(streamed, content);
});

void test('echo gives the prompt before the answer, with the logprobs of both', async () => {
  const prompt = 'The llama walks';
  const settings = { model, prompt, temperature: 0, max_tokens: 8 };
  const plain = (await client.completions.create(settings)).choices[0]!;
  const response = await client.completions.create({ ...settings, echo: true, logprobs: 2 });
  // As in OpenAI's own answers, the first token has no logprob; their description does not say so.
  const echoed = response.choices[0]!;
  assert.equal(echoed.text, prompt + plain.text);
  const { tokens, token_logprobs: own, top_logprobs: top, text_offset: offsets } = echoed.logprobs!;
  // EOS is counted and not shown.
  assert.equal(echoed.finish_reason, 'stop');
  assert.equal(tokens!.length, response.usage!.total_tokens - 1);
  assert.equal(own!.length, tokens!.length);
  assert.equal(own![0], null);
  assert.ok(own!.slice(1).every((each) => each <= 0));
  assert.equal(offsets![0], 0);
  // The answer was drawn greedily: each of its tokens is its place's likeliest.
  for (let i = response.usage!.prompt_tokens; i < tokens!.length; i += 1) {
    assert.equal(own![i], Math.max(...Object.values(top![i]!)));
    assert.equal(echoed.text.slice(offsets![i], offsets![i]! + tokens![i]!.length), tokens![i]);
  }
  let streamed = '';
  const streamedTokens: string[] = [];
  for await (const chunk of await client.completions.create({
    ...settings,
    echo: true,
    logprobs: 2,
    stream: true,
  })) {
    streamed += chunk.choices[0]?.text ?? '';
    streamedTokens.push(...(chunk.choices[0]?.logprobs?.tokens ?? []));
  }
  assert.equal(streamed, echoed.text);
  assert.deepEqual(streamedTokens, tokens);
  const scored = await client.completions.create({
    ...settings,
    echo: true,
    logprobs: 2,
    max_tokens: 0,
  });
  assert.equal(scored.choices[0]!.text, prompt);
  assert.equal(scored.usage!.completion_tokens, 0);
  assert.deepEqual(
    scored.choices[0]!.logprobs!.token_logprobs,
    own!.slice(0, response.usage!.prompt_tokens),
  );
});

void test('several answers survive a killed coordinator, with their logprobs', async () => {
  const body = {
    ...{ model, prompt: ['A caravan', 'The llama'], temperature: 0.8, seed: 11, n: 3 },
    ...{ max_tokens: 60, ignore_eos: true, logprobs: 1, echo: true },
  };
  const alone = await client.completions.create(body);
  const stream = await client.completions.create({ ...body, stream: true });
  const texts = Array<string>(6).fill('');
  const logprobs = Array.from({ length: 6 }, (): (number | null)[] => []);
  let chunkCount = 0;
  for await (const chunk of stream) {
    for (const choice of chunk.choices) {
      texts[choice.index]! += choice.text;
      logprobs[choice.index]!.push(...(choice.logprobs?.token_logprobs ?? []));
    }
    chunkCount += 1;
    // Four run and two wait for a slot.
    if (chunkCount !== 80) continue;
    await served.engine.kill();
    await served.engine.restart();
  }
  assert.ok(chunkCount > 80, 'killed in mid-generation');
  assert.deepEqual(
    texts,
    alone.choices.map(({ text }) => text),
  );
  assert.deepEqual(
    logprobs,
    alone.choices.map((choice) => choice.logprobs!.token_logprobs),
  );
});

void test('a stream of several answers can be taken up at any event', async () => {
  const response = await fetch(`${served.url}/v1/completions`, {
    method: 'POST',
    body: JSON.stringify({ model, prompt: 'A fox', n: 2, seed: 2, max_tokens: 10, stream: true }),
  });
  const jobId = response.headers.get('x-caravan-job')!;
  const eventsOf = async (answer: Response): Promise<{ id: string; data: string }[]> =>
    [...(await answer.text()).matchAll(/^id: (.*)\ndata: (.*)$/gm)].map(([, id, data]) => ({
      id: id!,
      data: data!,
    }));
  const textsAfter = (events: readonly { data: string }[]): string[] => {
    const texts = ['', ''];
    for (const { data } of events) {
      const { choices } = JSON.parse(data) as { choices: { index: number; text: string }[] };
      for (const { index, text } of choices) texts[index]! += text;
    }
    return texts;
  };
  const events = await eventsOf(response);
  assert.ok(events.length > 6);
  for (const [i, { id }] of events.entries()) {
    const again = await fetch(`${served.url}/v1/jobs/${jobId}/events`, {
      headers: { 'last-event-id': id },
    });
    assert.deepEqual(textsAfter(await eventsOf(again)), textsAfter(events.slice(i + 1)), id);
  }
  const wrong = await fetch(`${served.url}/v1/jobs/${jobId}/events?from=3-0`);
  assert.equal(wrong.status, 400);
});
