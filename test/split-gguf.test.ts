/** Split GGUF files whose parts do not belong together are refused in one line that says why. */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { partFile, rewriteAsGguf } from './gguf-checkpoint.js';
import { ggufBytes, value, type GgufTensor } from './gguf-writer.js';
import { assertRefused } from './refusal.js';
import { tinyGguf } from './tiny-gguf.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-split-gguf-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

void test('the parts of a split file must be all there, and of one model', async () => {
  const whole = path.join(scratch, 'tiny.gguf');
  const settings = { format: 'Q8_0', partCount: 3 } as const;
  const files = await rewriteAsGguf(whole, embeddedModelPath(), settings);
  const read = files.map((part) => fs.readFileSync(part));
  const named = (i: number): string => path.join(scratch, `other-0000${i + 1}-of-00003.gguf`);
  const refuse = (parts: readonly (Buffer | null)[], says: RegExp): void => {
    parts.forEach((bytes, i) => {
      if (bytes === null) fs.rmSync(named(i), { force: true });
      else fs.writeFileSync(named(i), bytes);
    });
    assertRefused(() => openCheckpoint(named(0)), says);
  };
  const [one, two, three] = read as [Buffer, Buffer, Buffer];
  refuse([one, two, null], /other-00003-of-00003\.gguf: does not exist/);
  refuse([one, three, two], /other-00002-of-00003\.gguf: split\.no: is 2; this name needs 1/);
  refuse([two, two, three], /other-00001-of-00003\.gguf: split\.no: is 1; this name needs 0/);
  refuse([one, ggufBytes(tinyGguf), three], /other-00002-of-00003\.gguf: split\.no: is missing/);
  refuse([one, two.subarray(0, -1), three], /other-00002-of-00003\.gguf: .*truncated/);
  const empty = (tensors: readonly GgufTensor[], count = 3): Buffer =>
    ggufBytes({
      metadata: [
        ['split.no', value.uint16(1)],
        ['split.count', value.uint16(count)],
      ],
      tensors,
    });
  refuse([one, empty([]), three], /split\.tensors\.count: is \d+; the parts hold \d+/);
  refuse([one, empty([], 2), three], /split\.count: is 2; other parts have 3/);
  const repeated: GgufTensor = {
    ...{ name: 'output_norm.weight', shape: [8], format: 'F32', bytes: new Uint8Array(32) },
  };
  refuse([one, empty([repeated]), three], /output_norm\.weight: is in two parts/);
  const renamed = path.join(scratch, 'renamed.gguf');
  fs.copyFileSync(files[0]!, renamed);
  assertRefused(() => openCheckpoint(renamed), /name must end in -0000K-of-00003\.gguf/);
  const single = partFile(path.join(scratch, 'single.gguf'), 0, 3);
  fs.writeFileSync(single, ggufBytes(tinyGguf));
  assertRefused(() => openCheckpoint(single), /split\.count: is 0/);
});
