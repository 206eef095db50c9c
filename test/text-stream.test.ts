import assert from 'node:assert/strict';
import path from 'node:path';
import fs from 'node:fs';
import { test } from 'node:test';
import { TextStream } from '../coordinator/text-stream.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { Detokenizer } from '../model/detokenizer.js';
import { StopText } from '../model/stop-text.js';
import { openTokenizer } from '../model/tokenizer.js';
import { Random } from './random.js';

const tokenizer = openTokenizer(
  new Map([
    ['tokenizer.model', fs.readFileSync(path.join(embeddedModelPath(), 'tokenizer.model'))],
  ]),
);

void test('Japanese text comes out character by character across byte-fallback pieces', () => {
  const text = '日本語のキャラバン🐫が来た';
  const detokenizer = new Detokenizer(tokenizer, true);
  const ids = tokenizer.encode(text);
  assert.ok(ids.length > Array.from(text).length, 'most characters take several tokens');
  const released = ids.map((id) => detokenizer.push(id));
  assert.equal(released.join('') + detokenizer.end(), text);
  for (const piece of released) assert.ok(!piece.includes('\ufffd'));
});

void test('text released token by token is the text of the whole, for any ids', () => {
  const random = new Random(5);
  for (let i = 0; i < 500; i += 1) {
    const ids = Array.from({ length: random.below(30) }, () => random.below(tokenizer.vocabSize));
    const detokenizer = new Detokenizer(tokenizer, false);
    const streamed = ids.map((id) => detokenizer.push(id)).join('') + detokenizer.end();
    const bytes = Buffer.concat(ids.map((id) => tokenizer.tokenBytes(id)));
    assert.equal(streamed, new TextDecoder('utf-8', { ignoreBOM: true }).decode(bytes));
  }
});

/** The stop text that ends first, of those the one that begins first: by looking at every prefix. */
function cutAtStop(text: string, stops: readonly string[]): string {
  for (let end = 1; end <= text.length; end += 1) {
    const lengths = stops.filter((s) => text.slice(0, end).endsWith(s)).map((s) => s.length);
    if (lengths.length > 0) return text.slice(0, end - Math.max(...lengths));
  }
  return text;
}

void test('a stop text is never shown, and nothing else is lost, however the text is cut', () => {
  const random = new Random(6);
  let stopped = 0;
  for (let i = 0; i < 5000; i += 1) {
    const letters = (most: number): string =>
      Array.from({ length: 1 + random.below(most) }, () => random.pick(['a', 'b', 'é', '日'])).join(
        '',
      );
    const text = letters(24);
    const stops = Array.from({ length: random.below(4) }, () => letters(5));
    const matcher = new StopText(stops);
    let released = '';
    for (let at = 0; at < text.length;) {
      const next = at + 1 + random.below(4);
      released += matcher.push(text.slice(at, next));
      assert.ok(cutAtStop(text, stops).startsWith(released), `${text} / ${stops.join(' ')}`);
      at = next;
    }
    if (matcher.isStopped) stopped += 1;
    else released += matcher.end();
    assert.equal(released, cutAtStop(text, stops), `${text} / ${stops.join(' ')}`);
  }
  assert.ok(stopped > 1000 && stopped < 4900, `${stopped} runs met a stop text`);
});

void test('what was released is a function of the tokens alone', () => {
  const ids = tokenizer.encode('One caravan, two caravans. STOP here');
  const options = { stop: ['STOP'], isTextStart: true };
  const whole = new TextStream(tokenizer, options);
  const prefixes = ids.map((id) => whole.push(id));
  const resumed = new TextStream(tokenizer, options);
  const half = ids.length >> 1;
  for (const id of ids.slice(0, half)) resumed.push(id);
  assert.deepEqual(
    ids.slice(half).map((id) => resumed.push(id)),
    prefixes.slice(half),
  );
  assert.equal(prefixes.join(''), 'One caravan, two caravans. ');
  assert.ok(whole.isStopped);
});

void test('the space before a first word is dropped only where a text starts', () => {
  const ids = tokenizer.encode('caravan');
  const shown = (isTextStart: boolean): string => {
    const stream = new TextStream(tokenizer, { stop: [], isTextStart });
    return ids.map((id) => stream.push(id)).join('') + stream.end();
  };
  assert.equal(shown(true), 'caravan');
  assert.equal(shown(false), ' caravan');
});
