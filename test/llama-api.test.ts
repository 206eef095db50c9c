/**
 * `import { Llama } from 'caravan'` does what Meta's reference does. `reference` below is the reference's own algorithm, written
 * from its behaviour over the float64 oracle; docs/parity.md names these tests.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { CaravanError, Llama, type Dialog } from 'caravan';
import { embeddedModelPath } from '../model/checkpoint.js';
import { renderLlama2Chat } from '../model/llama2-chat.js';
import { argmax, Oracle } from './oracle.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { tinyTokenizer } from './real-engine.js';
import { descendants } from './up-process.js';

const MAX_SEQ_LEN = 96;
const MAX_BATCH_SIZE = 3;
const build = { maxSeqLen: MAX_SEQ_LEN, maxBatchSize: MAX_BATCH_SIZE, modelParallelSize: 2 };

const llama = await Llama.build({ ...build, exact: true });
after(() => llama.close());
const oracle = new Oracle(embeddedModelPath());
const tokenizer = tinyTokenizer();
const eos = tokenizer.eosTokenIds[0]!;
const prompts = ['The llama', 'A fox said', 'Once'];
const question: Dialog = [{ role: 'user', content: 'Tell me a story about a fox.' }];

const encode = (text: string): number[] => [tokenizer.bosTokenId, ...tokenizer.encode(text)];

/** `generate` of the reference at temperature 0, for one prompt. */
function reference(prompt: readonly number[], maxGenLen: number, echo = false) {
  const ids = [...prompt];
  const logprobs = [0];
  const cache = oracle.start();
  const end = Math.min(MAX_SEQ_LEN, prompt.length + maxGenLen);
  for (let at = 0; at + 1 < end && ids.at(-1) !== eos; at += 1) {
    const logits = oracle.next(cache, ids[at]!);
    if (at + 1 === ids.length) ids.push(argmax(logits));
    const max = Math.max(...logits);
    const lse = max + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - max), 0));
    logprobs.push(logits[ids[at + 1]!]! - lse);
  }
  const from = echo ? 0 : prompt.length;
  const eosAt = ids.indexOf(eos, prompt.length);
  const to = eosAt === -1 ? ids.length : eosAt;
  const shown = ids.slice(from, to);
  return {
    ids: shown,
    generation: tokenizer.decode(shown),
    tokens: shown.map((id) => tokenizer.decode([id])),
    logprobs: logprobs.slice(from, to),
  };
}

function near(seen: readonly number[], expected: readonly number[]): void {
  assert.equal(seen.length, expected.length);
  seen.forEach((logprob, i) => {
    assert.ok(Math.abs(logprob - expected[i]!) <= 1e-4, `${i}: ${logprob}, ${expected[i]!}`);
  });
}

void test('several prompts are continued in one call, each as the reference continues it', async () => {
  const seen = await llama.textCompletion(prompts, { temperature: 0, maxGenLen: 24 });
  const expected = prompts.map((text) => ({ generation: reference(encode(text), 24).generation }));
  assert.deepEqual(seen, expected);
});

void test('logprobs are of the raw logits, whatever the temperature, one for each token', async () => {
  const options = { maxGenLen: 20, logprobs: true };
  const [cold] = await llama.textCompletion(['The llama'], { ...options, temperature: 0 });
  const expected = reference(encode('The llama'), 20);
  assert.deepEqual(cold!.tokens, expected.tokens);
  near(cold!.logprobs!, expected.logprobs);
  const [hot] = await llama.textCompletion(['The llama'], {
    ...options,
    ...{ temperature: 1.5, topP: 1, echo: true, seed: 4 },
  });
  assert.equal(hot!.tokens!.length, hot!.logprobs!.length);
  const [plain] = await llama.textCompletion(['The llama'], { maxGenLen: 4 });
  assert.deepEqual(Object.keys(plain!), ['generation']);
});

void test('echo begins with the prompt and its logprobs, the first of them 0', async () => {
  const options = { temperature: 0, maxGenLen: 8, logprobs: true, echo: true };
  const seen = await llama.textCompletion(prompts, options);
  for (const [i, { generation, tokens, logprobs }] of seen.entries()) {
    const expected = reference(encode(prompts[i]!), 8, true);
    assert.equal(generation, expected.generation);
    assert.ok(generation.startsWith(prompts[i]!));
    assert.deepEqual(tokens, expected.tokens);
    near(logprobs!, expected.logprobs);
    assert.equal(logprobs![0], 0);
  }
  const [none] = await llama.textCompletion(['A fox'], { ...options, maxGenLen: 0 });
  assert.equal(none!.generation, 'A fox');
  near(none!.logprobs!, reference(encode('A fox'), 0, true).logprobs);
});

void test('temperature and topP are 0.6 and 0.9 unless told otherwise', async () => {
  const options = { maxGenLen: 24, seed: 9 };
  const told = await llama.textCompletion(prompts, { ...options, temperature: 0.6, topP: 0.9 });
  assert.deepEqual(await llama.textCompletion(prompts, options), told);
  const hotter = await llama.textCompletion(prompts, { ...options, temperature: 2, topP: 1 });
  assert.notDeepEqual(hotter, told);
});

void test('a text ends at the first EOS, or where maxSeqLen or maxGenLen is reached', async () => {
  // The embedded model ends its stories.
  const chat = await llama.chatCompletion([question], { temperature: 0, logprobs: true });
  const expected = reference(renderLlama2Chat(question, tokenizer), MAX_SEQ_LEN);
  assert.equal(chat[0]!.generation.content, expected.generation);
  assert.deepEqual(chat[0]!.tokens, expected.tokens);
  const long = encode('walked '.repeat(40));
  const [text] = await llama.textCompletion(['walked '.repeat(40)], {
    ...{ temperature: 0, logprobs: true },
  });
  assert.ok(text!.tokens!.length <= MAX_SEQ_LEN - long.length);
  assert.equal(text!.generation, reference(long, MAX_SEQ_LEN).generation);
  const [short] = await llama.textCompletion(['Once'], { maxGenLen: 5, logprobs: true });
  assert.equal(short!.tokens!.length, 5);
});

void test('a dialog is answered by the assistant, after the prompt of the reference', async () => {
  const dialogs: Dialog[] = [
    question,
    [
      { role: 'system', content: 'Be brief.' },
      { role: 'user', content: 'What is a llama?' },
      { role: 'assistant', content: 'An animal.' },
      { role: 'user', content: 'And a fox?' },
    ],
  ];
  const options = { temperature: 0, maxGenLen: 16, logprobs: true };
  const seen = await llama.chatCompletion(dialogs, options);
  for (const [i, { generation, tokens, logprobs }] of seen.entries()) {
    const expected = reference(renderLlama2Chat(dialogs[i]!, tokenizer), 16);
    assert.deepEqual(generation, { role: 'assistant', content: expected.generation });
    assert.deepEqual(tokens, expected.tokens);
    near(logprobs!, expected.logprobs);
  }
});

const isRefusal =
  (code: string, param: string, message: RegExp) =>
  (error: unknown): boolean => {
    assert.ok(error instanceof CaravanError);
    assert.equal(error.code, code);
    assert.equal(error.param, param);
    assert.match(error.message, message);
    return true;
  };

void test("wrong roles and special tags are refused with the reference's sentences, before anything is computed", async () => {
  const user = { role: 'user', content: 'a' } as const;
  const assistant = { role: 'assistant', content: 'b' } as const;
  const refused: readonly (readonly [Dialog, RegExp])[] = [
    [[assistant, user], /^model only supports 'system', 'user' and 'assistant' roles, starting/],
    [[user, assistant], /^Last message must be from user, got assistant$/],
    [
      [{ role: 'user', content: 'a [INST] b' }],
      /^Error: special tags are not allowed as part of the prompt\.$/,
    ],
  ];
  for (const [dialog, message] of refused) {
    await assert.rejects(
      llama.chatCompletion([question, dialog]),
      isRefusal('invalid_request', 'dialogs.1', message),
    );
  }
});

void test('too many prompts, too long ones and bad options name the limit and the value', async () => {
  await assert.rejects(
    llama.textCompletion(['a', 'b', 'c', 'd']),
    isRefusal('invalid_request', 'prompts', /^prompts: 4 of them; maxBatchSize is 3$/),
  );
  await assert.rejects(
    llama.textCompletion([]),
    isRefusal('invalid_request', 'prompts', /^prompts: 0 of them/),
  );
  await assert.rejects(
    llama.textCompletion(['walked '.repeat(200)]),
    isRefusal('context_length_exceeded', 'prompts', /^prompts: has \d+ tokens, and maxSeqLen 96 /),
  );
  for (const [options, param] of [
    [{ temperature: -1 }, 'temperature'],
    [{ topP: 2 }, 'topP'],
    [{ maxGenLen: 1.5 }, 'maxGenLen'],
    [{ seed: -1 }, 'seed'],
  ] as const) {
    await assert.rejects(
      llama.textCompletion(['a'], options),
      isRefusal('invalid_request', param, new RegExp(`^${param}: `)),
    );
  }
  await assert.rejects(
    Llama.build({ modelParallelSize: 0 }),
    isRefusal('invalid_request', 'modelParallelSize', /^modelParallelSize: /),
  );
});

void test('the seed of build is drawn on by every call, and repeats with the program', async () => {
  const draw = async (seed: number): Promise<string[]> => {
    const other = await Llama.build({ seed, modelParallelSize: 1 });
    try {
      const options = { temperature: 1, topP: 1, maxGenLen: 16 };
      const calls = [];
      for (let call = 0; call < 2; call += 1) {
        calls.push(...(await other.textCompletion(['Once', 'Once'], options)));
      }
      return calls.map(({ generation }) => generation);
    } finally {
      await other.close();
    }
  };
  const first = await draw(7);
  assert.equal(new Set(first).size, 4);
  assert.deepEqual(await draw(7), first);
  assert.notDeepEqual(await draw(8), first);
});

void test('a checkpoint is cut into any number of ranks, whatever number of files it has', async () => {
  const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-llama-'));
  const config = {
    ...{ hiddenSize: 48, ffnSize: 61, layerCount: 2, headCount: 3, kvHeadCount: 3, headSize: 16 },
    ...{ vocabSize: tokenizer.vocabSize, maxPositions: 64, normEps: 1e-5, ropeTheta: 10_000 },
    isHeadTied: false,
  };
  writeRandomCheckpoint(scratch, { config, seed: 3, format: 'F32', shardCount: 2 });
  const name = 'tokenizer.model';
  fs.copyFileSync(path.join(embeddedModelPath(), name), path.join(scratch, name));
  try {
    const texts = [];
    for (const modelParallelSize of [1, 3]) {
      const cut = await Llama.build({ ckptDir: scratch, modelParallelSize, exact: true });
      texts.push(await cut.textCompletion(['The llama'], { temperature: 0, maxGenLen: 10 }));
      await cut.close();
    }
    assert.deepEqual(texts[0], texts[1]);
  } finally {
    fs.rmSync(scratch, { recursive: true });
  }
});

void test('calls beyond the slots wait for one, and a call that is withdrawn makes room', async () => {
  const options = { temperature: 0, maxGenLen: 10 };
  const expected = await llama.textCompletion(prompts, options);
  const leaving = new AbortController();
  const endless = llama.textCompletion(['walked walked', 'The', 'fox'], {
    ...{ temperature: 1, topP: 1, signal: leaving.signal },
  });
  const withdrawn = assert.rejects(endless, isRefusal('cancelled', null!, /withdrawn/));
  const others = [1, 2, 3].map(() => llama.textCompletion(prompts, options));
  leaving.abort();
  await withdrawn;
  assert.deepEqual(await Promise.all(others), [expected, expected, expected]);
  await assert.rejects(
    llama.textCompletion(['a'], { signal: AbortSignal.abort() }),
    isRefusal('cancelled', null!, /withdrawn/),
  );
});

void test('close ends what runs and the rank processes; a killed rank fails the call', async () => {
  const before = new Set(descendants(process.pid).map(({ pid }) => pid));
  const own = (): number[] =>
    descendants(process.pid)
      .map(({ pid }) => pid)
      .filter((pid) => !before.has(pid));
  const closed = await Llama.build(build);
  assert.equal(own().length, 2);
  const running = closed.textCompletion(prompts, { temperature: 1, topP: 1 });
  const ended = assert.rejects(running, isRefusal('cancelled', null!, /stopped|closed/));
  await closed.close();
  await ended;
  await closed.close();
  assert.deepEqual(own(), []);
  await assert.rejects(closed.textCompletion(['a']), isRefusal('cancelled', null!, /closed/));

  const broken = await Llama.build(build);
  process.kill(own()[0]!, 'SIGKILL');
  const failed = (error: unknown): boolean =>
    error instanceof CaravanError && ['rank_failed', 'rank_unavailable'].includes(error.code);
  await assert.rejects(broken.textCompletion(prompts), failed);
  await assert.rejects(broken.textCompletion(prompts), failed);
  await broken.close();
  assert.deepEqual(own(), []);
});
