/** A rank's weights are gathered into huge pages, and nothing else of it changes. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import { test } from 'node:test';
import { gatherHugePages, privateMappings } from '../worker/huge-pages.js';
import { ScratchMemory } from '../worker/mapped-file.js';

const MIB = 1 << 20;

void test('memory that is private, writable, of no file and large is looked at, and no other', () => {
  const maps = [
    '7f0000000000-7f0000800000 rw-p 00000000 00:00 0',
    '7f0001000000-7f0001800000 rw-p 00000000 00:00 0 ',
    '7f0003000000-7f0003800000 r--p 00000000 00:00 0',
    '7f0004000000-7f0004800000 rw-s 00000000 00:00 0', // other processes see it
    '7f0005000000-7f0005800000 rw-p 00000000 fe:01 4711   /tmp/weights',
    '7f0006000000-7f0006800000 rw-p 00000000 00:00 0    [heap]',
    '7f0007000000-7f0007100000 rw-p 00000000 00:00 0', // too small for one
    '',
  ].join('\n');
  const starts = privateMappings(maps).map(({ start }) => start.toString(16));
  assert.deepEqual(starts, ['7f0000000000', '7f0001000000']);
});

const [major = 0, minor = 0] = os.release().split('.').map(Number);
const hasCollapse = os.platform() === 'linux' && (major > 6 || (major === 6 && minor >= 1));
const hasHugePages = hasCollapse && fs.existsSync('/sys/kernel/mm/transparent_hugepage');
const skip = hasHugePages ? false : 'this kernel gathers no pages (Linux 6.1 does)';

void test('gathered memory lies in huge pages, and holds what it held', { skip }, async () => {
  const memory = new ScratchMemory(24 * MIB);
  const words = new Uint32Array(memory.bytes);
  for (let i = 0; i < words.length; i += 1) words[i] = i * 2654435761;
  const hugeKb = (): number =>
    Number(/AnonHugePages:\s+(\d+)/.exec(fs.readFileSync('/proc/self/smaps_rollup', 'utf8'))![1]);
  const before = hugeKb();
  // Not in use: it is not to take memory because of this.
  const idle = new ScratchMemory(64 * MIB);
  const leaving = new AbortController();
  let stretches = 0;
  const gathered = await gatherHugePages(leaving.signal, () => (stretches += 1));
  assert.ok(stretches >= 2, 'it is told that it goes on');
  // The first and the last page of the mapping may not be whole ones.
  assert.ok(gathered >= 20 * MIB, `${gathered} bytes`);
  assert.ok(hugeKb() - before >= 20 * 1024, `${hugeKb() - before} kB`);
  assert.ok(hugeKb() - before < 60 * 1024, `${hugeKb() - before} kB`);
  assert.ok(words.every((word, i) => word === (i * 2654435761) >>> 0));
  leaving.abort();
  const more = new ScratchMemory(48 * MIB);
  new Uint8Array(more.bytes).fill(1);
  assert.ok((await gatherHugePages(leaving.signal, () => undefined)) <= 16 * MIB, 'it ends soon');
  more.release();
  memory.release();
  idle.release();
});
