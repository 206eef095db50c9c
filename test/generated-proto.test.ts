import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { packageRoot } from '../coordinator/package-root.js';
import { RankPartial } from '../proto/gen/cluster.js';
import { decodePartial, FramedPartial } from '../worker/partial-codec.js';
import { Random } from './random.js';

void test('proto/gen is what the .proto files give', () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-proto-'));
  try {
    const { status, stderr } = spawnSync(
      process.execPath,
      ['scripts/generate-proto.mjs', '--output', folder],
      { cwd: packageRoot, encoding: 'utf8' },
    );
    assert.equal(status, 0, stderr);
    const generated = path.join(folder, 'proto/gen');
    const committed = path.join(packageRoot, 'proto/gen');
    assert.deepEqual(fs.readdirSync(generated).sort(), fs.readdirSync(committed).sort());
    for (const file of fs.readdirSync(generated)) {
      assert.equal(
        fs.readFileSync(path.join(committed, file), 'utf8'),
        fs.readFileSync(path.join(generated, file), 'utf8'),
        `${file}: run npm run proto`,
      );
    }
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
});

void test('the quick codec of partials is the generated one, byte for byte', () => {
  const random = new Random(9);
  const framed = new FramedPartial(600_000);
  for (const count of [0, 1, 31, 32, 4_095, 4_096, 17_500, 524_288, 600_000, 32]) {
    const sequence = random.below(2 ** 32) + 1;
    const size = 4 * count;
    const data = Buffer.from(framed.data.buffer, framed.data.byteOffset, size);
    for (let i = 0; i < size; i += 1) data[i] = random.below(256);
    const message = framed.message(sequence, count);
    const expected = RankPartial.encode({ sequence: sequence >>> 0, data }).finish();
    // The generated codec leaves empty fields out; a partial is never empty.
    if (size > 0) assert.deepEqual(message, Buffer.from(expected));
    assert.deepEqual(decodePartial(message), { sequence: sequence >>> 0, data });
    assert.throws(() => decodePartial(message.subarray(0, -1)));
  }
});
