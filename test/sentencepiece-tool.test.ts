/**
 * Ids are those of SentencePiece's own tool, for random texts from every part of Unicode. The tool is Debian's package
 * `sentencepiece`; where it is not installed the tests are skipped, but in CI they must run.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { embeddedModelPath } from '../model/checkpoint.js';
import { openTokenizer } from '../model/tokenizer.js';
import { Random } from './random.js';
import { sharedPath, skipWithout } from './shared.js';

const count = 10_000;
const isInstalled = spawnSync('spm_encode', ['--help']).error === undefined;
const skipWithoutTool =
  isInstalled || process.env['CI'] === 'true' ? false : 'spm_encode is not installed';

const llama2 = 'models/llama2-tokenizer/tokenizer.model';

/** Scripts, signs and the like that a prompt rarely holds, beside those that it often does. */
function makeTexts(): string[] {
  const random = new Random(2);
  const anything = (): string => {
    const code = random.below(0x110000);
    // Surrogates are no characters, and the tool reads texts line by line.
    return (code >= 0xd800 && code < 0xe000) || code === 0 ? '?' : String.fromCodePoint(code);
  };
  return Array.from({ length: count }, (_, i) => {
    const length = 1 + random.below(60);
    if (i % 3 !== 0) return random.text(length);
    return Array.from({ length }, () => (random.below(4) === 0 ? ' ' : anything())).join('');
  }).map((text) => text.replace(/[\n\r]/g, ' '));
}

const models: readonly (readonly [name: string, file: string, skip: string | false])[] = [
  ['caravan-tiny', path.join(embeddedModelPath(), 'tokenizer.model'), false],
  ['Llama 2', sharedPath(llama2), skipWithout(llama2)],
];

for (const [name, file, skip] of models) {
  void test(`${name}: ids of ${count} random texts`, { skip: skip || skipWithoutTool }, () => {
    const tokenizer = openTokenizer(new Map([['tokenizer.model', fs.readFileSync(file)]]));
    const texts = makeTexts();
    const tool = spawnSync('spm_encode', [`--model=${file}`, '--output_format=id'], {
      input: `${texts.join('\n')}\n`,
      encoding: 'utf8',
      maxBuffer: 1 << 28,
    });
    assert.equal(tool.status, 0, tool.stderr);
    const lines = tool.stdout.split('\n');
    assert.equal(lines.length, texts.length + 1);
    texts.forEach((text, i) => {
      assert.equal(tokenizer.encode(text).join(' '), lines[i], JSON.stringify(text));
    });
  });
}
