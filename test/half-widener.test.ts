import assert from 'node:assert/strict';
import { test } from 'node:test';
import { elementFormats } from '../model/elements.js';
import { HalfWidener } from '../worker/half-widener.js';
import { Ort } from '../worker/ort.js';

const ort = new Ort(1);

for (const name of ['F16', 'BF16'] as const) {
  void test(`${name}: each of the 65,536 numbers becomes the same float32, in runs of any place`, () => {
    const format = elementFormats[name];
    const halves = new HalfWidener(ort);
    const count = 65_536;
    // Two numbers before and one after, which stay what they are.
    const source = Buffer.from(new ArrayBuffer(2 * (count + 3)));
    for (let bits = 0; bits < count; bits += 1) source.writeUInt16LE(bits, 4 + 2 * bits);
    const widened = new Float32Array(count + 3).fill(7);
    const expected = widened.slice();
    halves.widen(format, source, 4, count, widened, 1);
    format.widen(source, 4, count, expected, 1);
    const differences = expected.reduce(
      (sum, value, i) => sum + (Object.is(value, widened[i]) ? 0 : 1),
      0,
    );
    halves.release();
    assert.equal(differences, 0);
    assert.deepEqual([...widened.subarray(count + 1)], [7, 7]);
  });
}
