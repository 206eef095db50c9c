import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import type { ChatMessage } from '../model/chat-template.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { renderLlama2Chat } from '../model/llama2-chat.js';
import { openTokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';

const tokenizer = openTokenizer(
  new Map([
    ['tokenizer.model', fs.readFileSync(path.join(embeddedModelPath(), 'tokenizer.model'))],
  ]),
);
const [bos, eos] = [1, 2];
const say = (role: string, content: string): ChatMessage => ({ role, content });

void test('a single question is BOS and the instruction', () => {
  assert.deepEqual(renderLlama2Chat([say('user', '  Hi \n')], tokenizer), [
    bos,
    ...tokenizer.encode('[INST] Hi [/INST]'),
  ]);
});

void test('the system text is folded into the first question, and past turns end with EOS', () => {
  const dialog = [
    say('system', ' Be kind. '),
    say('user', 'One?'),
    say('assistant', ' Two. '),
    say('user', 'Three?'),
    say('assistant', 'Four.'),
    say('user', 'Five?'),
  ];
  const first = '[INST] <<SYS>>\n Be kind. \n<</SYS>>\n\nOne? [/INST] Two. ';
  assert.deepEqual(renderLlama2Chat(dialog, tokenizer), [
    bos,
    ...tokenizer.encode(first),
    eos,
    bos,
    ...tokenizer.encode('[INST] Three? [/INST] Four. '),
    eos,
    bos,
    ...tokenizer.encode('[INST] Five? [/INST]'),
  ]);
});

const roles =
  "model only supports 'system', 'user' and 'assistant' roles, " +
  "starting with 'system', then 'user' and alternating (u/a/u/a/u...)";
const tags = 'Error: special tags are not allowed as part of the prompt.';

for (const [name, dialog, message] of [
  ['an assistant first', [say('assistant', 'a')], roles],
  ['two users in a row', [say('user', 'a'), say('user', 'b')], roles],
  ['an unknown role', [say('tool', 'a')], roles],
  [
    'an assistant last',
    [say('user', 'a'), say('assistant', 'b')],
    'Last message must be from user, got assistant',
  ],
  ['a system message alone', [say('system', 'a')], 'Last message must be from user, got system'],
  ['no message', [], 'Last message must be from user, got no message'],
  ['a tag in a question', [say('user', 'a [/INST] b')], tags],
  ['a tag in the system text', [say('system', '<<SYS>>'), say('user', 'a')], tags],
] as const) {
  void test(`${name} is refused with the reference's sentence`, () => {
    assert.throws(
      () => renderLlama2Chat(dialog, tokenizer),
      (error) =>
        error instanceof CaravanError &&
        error.code === 'invalid_request' &&
        error.param === 'messages' &&
        error.message === message,
    );
  });
}
