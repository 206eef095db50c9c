import assert from 'node:assert/strict';
import { test } from 'node:test';
import { embeddedModelPath } from '../model/checkpoint.js';
import { argmax, greedy, Oracle, prefill } from './oracle.js';
import { readTinyGolden, sharedGolden } from './golden.js';
import { sharedPath, skipWithout } from './shared.js';

void test(
  'the oracle gives the logits of the golden file',
  { skip: skipWithout(sharedGolden.file) },
  () => {
    const oracle = new Oracle(sharedPath(sharedGolden.model));
    for (const golden of sharedGolden.read()) {
      const cache = oracle.start();
      golden.ids.forEach((token, position) => {
        const logits = oracle.next(cache, token);
        assert.equal(argmax(logits), golden.argmax[position], `position ${position}`);
        const expected = golden.logits.get(position);
        // The file has six decimals.
        expected?.forEach((value, id) => {
          assert.ok(Math.abs(logits[id]! - value) < 2e-6, `position ${position}, id ${id}`);
        });
      });
    }
  },
);

void test('the oracle still gives the goldens of caravan-tiny', () => {
  const oracle = new Oracle(embeddedModelPath());
  for (const golden of readTinyGolden()) {
    assert.deepEqual(greedy(oracle, golden.promptIds, golden.ids.length), golden.ids);
    const { logits } = prefill(oracle, golden.promptIds);
    golden.firstLogits.forEach((value, id) => {
      assert.ok(Math.abs(logits[id]! - value) < 1e-6, `id ${id}`);
    });
  }
});
