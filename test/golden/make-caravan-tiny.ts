/**
 * Writes test/golden/caravan-tiny.json: what the oracle says of the embedded model.
 *
 *   node dist/test/golden/make-caravan-tiny.js
 */
import fs from 'node:fs';
import path from 'node:path';
import { renderLlama2Chat } from '../../model/llama2-chat.js';
import { embeddedModelPath } from '../../model/checkpoint.js';
import { openTokenizer } from '../../model/tokenizer.js';
import { tinyGoldenFile, type TinyGolden } from '../golden.js';
import { argmax, margin, Oracle, prefill } from '../oracle.js';

const TOKENS = 48;

const chats = ['What is the capital of Japan?', 'Tell me a story about a llama.', '3 + 4 = ?'];
const texts = ['', 'Once upon a time', 'A KV cache'];

const folder = embeddedModelPath();
const oracle = new Oracle(folder);
const files = ['tokenizer.model', 'generation_config.json'].map(
  (name) => [name, fs.readFileSync(path.join(folder, name))] as const,
);
const tokenizer = openTokenizer(new Map(files));

function goldenOf(prompt: string, isChat: boolean): TinyGolden {
  const promptIds = isChat
    ? renderLlama2Chat([{ role: 'user', content: prompt }], tokenizer)
    : [tokenizer.bosTokenId, ...tokenizer.encode(prompt)];
  const { cache, logits: firstLogits } = prefill(oracle, promptIds);
  const ids: number[] = [];
  let leastMargin = Infinity;
  for (let logits = firstLogits; ; logits = oracle.next(cache, ids.at(-1)!)) {
    leastMargin = Math.min(leastMargin, margin(logits));
    ids.push(argmax(logits));
    if (ids.length === TOKENS) break;
  }
  return {
    prompt,
    isChat,
    promptIds,
    ids,
    leastMargin: Number(leastMargin.toPrecision(3)),
    firstLogits: Array.from(firstLogits, (logit) => Number(logit.toFixed(6))),
  };
}

const goldens = [
  ...chats.map((prompt) => goldenOf(prompt, true)),
  ...texts.map((prompt) => goldenOf(prompt, false)),
];
fs.writeFileSync(
  tinyGoldenFile,
  `[\n${goldens.map((golden) => JSON.stringify(golden)).join(',\n')}\n]\n`,
);
for (const golden of goldens) {
  process.stdout.write(
    `margin ${golden.leastMargin}: ${golden.prompt} → ${tokenizer.decode(golden.ids)}\n`,
  );
}
