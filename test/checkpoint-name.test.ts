/** What a served model is called when nobody names it. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { checkpointName } from '../model/checkpoint.js';

void test('a model is called as its folder, or as its GGUF file without ending and part', () => {
  for (const [model, name] of [
    ['/models/Llama-2-7b-hf', 'Llama-2-7b-hf'],
    ['/models/SmolLM2-135M.Q4_1.gguf', 'SmolLM2-135M.Q4_1'],
    ['/models/llama-2-70b.Q8_0-00001-of-00003.gguf', 'llama-2-70b.Q8_0'],
    ['/models/llama.GGUF', 'llama'],
    ['/models/llama-2-7b-1-of-3.gguf', 'llama-2-7b-1-of-3'],
    ['/models/some.gguf.d', 'some.gguf.d'],
    // A name must be left.
    ['/models/.gguf', '.gguf'],
  ] as const) {
    assert.equal(checkpointName(model), name);
  }
});
