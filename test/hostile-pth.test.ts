/** .pth files that mean harm, or are damaged: each is refused in one line that says why, and nothing is run. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { embeddedModelPath } from '../model/checkpoint.js';
import { readPthFile } from '../model/pth.js';
import { assertRefused } from './refusal.js';
import { runCli } from './cli.js';
import { rewriteAsMeta } from './meta-checkpoint.js';
import { pickleOf, pickleOps as op, pthBytes, type PthTensor } from './pth-writer.js';
import { zipBytes } from './zip-writer.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-hostile-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});
const file = path.join(scratch, 'consolidated.00.pth');
/** What a pickle would make if its code were run. */
const marker = path.join(scratch, 'was-here');

const good: PthTensor = {
  name: 'norm.weight',
  storage: { key: '0', format: 'F32', elementCount: 12, bytes: new Uint8Array(48) },
  shape: [3, 4],
};
const proto = Buffer.from([0x80, 4]);
const shortText = (text: string): Buffer =>
  Buffer.concat([Buffer.from([0x8c, Buffer.byteLength(text)]), Buffer.from(text)]);
const call = (callee: Buffer, ...args: Buffer[]): Buffer =>
  Buffer.concat([proto, callee, op.tuple(...args), Buffer.from('R.')]);
const command = op.text(`touch ${marker}`);
const ops = (...parts: (string | Buffer)[]): Buffer =>
  Buffer.concat([
    proto,
    ...parts.map((part) => (typeof part === 'string' ? Buffer.from(part, 'latin1') : part)),
  ]);

const refusedPickles: readonly [name: string, pickle: Buffer, says: RegExp][] = [
  [
    'os.system by GLOBAL',
    call(op.global('os', 'system'), command),
    /global "os\.system".*not allowed/,
  ],
  ['posix.system', call(op.global('posix', 'system'), command), /"posix\.system"/],
  [
    'os.system by STACK_GLOBAL',
    call(Buffer.concat([shortText('os'), shortText('system'), Buffer.from([0x93])]), command),
    /"os\.system"/,
  ],
  [
    'a name that is led into an allowed module',
    call(op.global('torch._utils', '_rebuild_tensor_v2.__globals__'), command),
    /__globals__.*not allowed/,
  ],
  ['builtins.eval', call(op.global('builtins', 'eval'), op.text('1')), /"builtins\.eval"/],
  [
    'a global whose name has a line end, a bell and 4,000 letters',
    call(Buffer.concat([shortText('o\n\u0007s'), op.text('x'.repeat(4000)), Buffer.from([0x93])])),
    /"o\\n\\u0007s\.x+…"/,
  ],
  ['INST', ops('(', command, 'ios\nsystem\n.'), /opcode 0x69/],
  ['OBJ', ops('(', op.global('torch', 'FloatStorage'), 'o.'), /opcode 0x6f/],
  ['NEWOBJ', ops(op.global('torch', 'FloatStorage'), ')\x81.'), /opcode 0x81/],
  ['an extension code', ops('\x82\x01.'), /opcode 0x82/],
  ['a persistent id in text', ops('P0\n.'), /opcode 0x50/],
  [
    'a storage type that is called',
    call(op.global('torch', 'FloatStorage')),
    /calls "torch\.FloatStorage"/,
  ],
  [
    'a text that is called',
    call(op.text('os.system'), command),
    /calls something that is no global/,
  ],
  ['attributes of a global', ops(op.global('collections', 'OrderedDict'), '}b.'), /attributes/],
  ['arguments to OrderedDict', call(op.global('collections', 'OrderedDict'), command), /arguments/],
  [
    'a tensor of no storage',
    call(op.global('torch._utils', '_rebuild_tensor_v2'), command),
    /without a storage/,
  ],
  ['a text of 4 GB', ops('X\xff\xff\xff\xff.'), /text of 4294967295 bytes/],
  ['a text of 2^63 bytes', ops('\x8d\0\0\0\0\0\0\0\x80.'), /text of \d+ bytes/],
  ['a number of 255 bytes', ops('\x8a\xff', Buffer.alloc(255, 1), '.'), /number of 255 bytes/],
  ['two million marks', ops('('.repeat(2_000_000)), /deeper than 1000/],
  ['two million values', ops('N'.repeat(2_000_000)), /1000000 values on the stack/],
  ['two million remembered values', ops('N', '\x94'.repeat(2_100_000)), /remembers more/],
  ['a value that was never remembered', ops('j\xff\xff\xff\xff.'), /recalls value 4294967295/],
  ['an empty stack', ops('0.'), /empty stack/],
  ['a key without a value', ops('}(', op.text('a'), 'u.'), /key without a value/],
  ['no STOP', ops('}'), /truncated/],
  ['protocol 9', Buffer.from([0x80, 9, 0x2e]), /protocol 9/],
  ['a list at the top', ops('].'), /no dictionary of tensors/],
  ['a number for a tensor', ops('}(', op.text('a'), 'K\x01u.'), /a: is no tensor/],
  ['a name with a line end', ops('}(', op.text('a\nb'), 'K\x01u.'), /"a\\nb" is no name/],
  ['17 MB', Buffer.alloc(17 << 20, 0x4e), /at most \d+ are read/],
];

function refuse(bytes: Uint8Array, says: RegExp): void {
  fs.writeFileSync(file, bytes);
  assertRefused(() => readPthFile(file), says);
}

for (const [name, pickle, says] of refusedPickles) {
  void test(`a pickle is refused: ${name}`, () => {
    refuse(pthBytes([good], pickle), says);
    assert.ok(!fs.existsSync(marker));
  });
}

const refusedTensors: readonly [name: string, tensor: Partial<PthTensor>, says: RegExp][] = [
  ['a negative size', { shape: [-3, 4], strides: [4, 1] }, /whole numbers from 0/],
  ['a negative stride', { strides: [-4, 1] }, /whole numbers from 0/],
  ['a negative offset', { start: -1 }, /whole numbers from 0/],
  ['an offset after the storage', { start: 1 }, /end at element 13, after the storage's 12/],
  [
    'sizes that overflow',
    { shape: [2 ** 40, 2 ** 40], strides: [2 ** 40, 1] },
    /after the storage's 12/,
  ],
  ['strides that overflow', { strides: [2 ** 52, 2 ** 52] }, /after the storage's 12/],
  ['10^9 rows', { shape: [1_000_000_000, 4], strides: [4, 1] }, /after the storage's 12/],
  ['a stride for one of two sizes', { strides: [1] }, /2 sizes and 1 strides/],
  ['nine sizes', { shape: [1, 1, 1, 1, 1, 1, 1, 1, 1] }, /at most 8/],
  [
    'elements that are no neighbours',
    { shape: [2, 2], strides: [6, 2] },
    /norm\.weight: strides are \[6, 2\]/,
  ],
  [
    'more elements than the entry has',
    { storage: { ...good.storage, elementCount: 13 } },
    /13 elements of F32 need 52 bytes, has 48/,
  ],
  [
    '2^52 elements',
    { storage: { ...good.storage, elementCount: 2 ** 52 } },
    /need 18014398509481984 bytes/,
  ],
];

for (const [name, change, says] of refusedTensors) {
  void test(`a tensor is refused: ${name}`, () => {
    refuse(pthBytes([{ ...good, ...change }]), says);
  });
}

void test('a storage is refused that is described in two ways, or is not there', () => {
  const other: PthTensor = { ...good, name: 'b', storage: { ...good.storage, format: 'BF16' } };
  refuse(pthBytes([good, other]), /storage "0": is described in two ways/);
  refuse(
    pthBytes([good], pickleOf([{ ...good, storage: { ...good.storage, key: '../1' } }])),
    /entry is missing/,
  );
});

const archive = pthBytes([good]);
/** Where the directory's record, and the local header, of an entry are. */
const recordAt = archive.lastIndexOf('archive/data/0') - 46;
const headerAt = archive.indexOf('archive/data/0') - 30;
const zip64End = archive.length - 98;
const end = archive.length - 22;

function patched(edit: (bytes: Buffer) => void): Buffer {
  const bytes = Buffer.from(archive);
  edit(bytes);
  return bytes;
}

const refusedArchives: readonly [name: string, bytes: Uint8Array, says: RegExp][] = [
  ['an empty file', Buffer.alloc(0), /no end of a zip archive/],
  ['100 KB of zeros', Buffer.alloc(100_000), /no end of a zip archive/],
  ['the format of PyTorch 1.5', ops('}.'), /before PyTorch 1\.6/],
  [
    'a zip bomb',
    zipBytes([
      { name: 'archive/data.pkl', content: pickleOf([good]) },
      { name: 'archive/data/0', content: Buffer.alloc(48), method: 8 },
    ]),
    /"archive\/data\/0": is compressed \(method 8\)/,
  ],
  ['an encrypted entry', patched((b) => b.writeUInt16LE(1, recordAt + 8)), /encrypted/],
  [
    '10^9 entries',
    patched((b) => b.writeBigUInt64LE(10n ** 9n, zip64End + 32)),
    /1000000000 entries/,
  ],
  ['2^64 - 1 entries', patched((b) => b.fill(0xff, zip64End + 32, zip64End + 40)), /too large/],
  [
    'one entry too many',
    patched((b) => b.writeBigUInt64LE(4n, zip64End + 32)),
    /entry 3 of 4|entries/,
  ],
  [
    'a directory after the file',
    patched((b) => b.writeBigUInt64LE(1n << 40n, zip64End + 48)),
    /directory of \d+ bytes at 1099511627776 lies outside/,
  ],
  [
    'a zip64 end after the file',
    patched((b) => b.writeBigUInt64LE(1n << 40n, zip64End + 56 + 8)),
    /zip64 end: .* outside the file/,
  ],
  ['two disks', patched((b) => b.writeUInt32LE(1, zip64End + 16)), /one part of several/],
  [
    'a header after the file',
    patched((b) => b.writeUInt32LE(0x7fffffff, recordAt + 42)),
    /outside/,
  ],
  [
    'a header elsewhere',
    patched((b) => b.writeUInt32LE(8, recordAt + 42)),
    /no entry begins|overlap/,
  ],
  [
    'an entry that reaches into the next',
    patched((b) => {
      b.writeUInt32LE(500, recordAt + 20);
      b.writeUInt32LE(500, recordAt + 24);
    }),
    /overlap/,
  ],
  [
    'a long header that moves the content into the next entry',
    patched((b) => b.writeUInt16LE(0xffff, headerAt + 28)),
    /overlap/,
  ],
  ['two sizes', patched((b) => b.writeUInt32LE(1, recordAt + 20)), /48 bytes, but 1 are stored/],
  [
    'zip64 sizes that are not there',
    patched((b) => b.writeUInt32LE(0xffffffff, recordAt + 24)),
    /zip64 sizes/,
  ],
  ['a header of another name', patched((b) => b.write('X', headerAt + 30)), /another name/],
  [
    'two entries at one place',
    patched((b) => b.writeUInt32LE(headerAt, archive.lastIndexOf('archive/version') - 46 + 42)),
    /overlap/,
  ],
  [
    'a name that leads elsewhere',
    zipBytes([{ name: '../../etc/passwd', content: Buffer.from('x') }]),
    /"\.\.\/\.\.\/etc\/passwd" is no name/,
  ],
  [
    'a name twice',
    zipBytes([1, 2].map(() => ({ name: 'archive/data.pkl', content: pickleOf([]) }))),
    /twice/,
  ],
  [
    'no pickle',
    zipBytes([{ name: 'archive/version', content: Buffer.from('3') }]),
    /0 entries NAME\/data\.pkl/,
  ],
  [
    'two pickles',
    zipBytes(['a', 'b'].map((name) => ({ name: `${name}/data.pkl`, content: pickleOf([]) }))),
    /2 entries NAME\/data\.pkl/,
  ],
  [
    'big-endian numbers',
    zipBytes([
      { name: 'a/data.pkl', content: pickleOf([]) },
      { name: 'a/byteorder', content: Buffer.from('big') },
    ]),
    /little-endian/,
  ],
];

for (const [name, bytes, says] of refusedArchives) {
  void test(`an archive is refused: ${name}`, () => {
    refuse(bytes, says);
  });
}

void test('a file that ends early is refused, wherever it ends', () => {
  for (let length = 0; length < archive.length; length += 1) {
    refuse(archive.subarray(0, length), /^consolidated\.00\.pth: /);
  }
  fs.writeFileSync(file, archive);
  assert.equal(readPthFile(file).tensors.size, 1);
  assert.equal(end, archive.lastIndexOf('PK\x05\x06'));
});

void test('views may share a storage, and overlap', () => {
  const bytes = pthBytes([good, { ...good, name: 'b', shape: [2, 4], start: 4 }]);
  fs.writeFileSync(file, bytes);
  const [a, b] = [...readPthFile(file).tensors.values()];
  assert.equal(b!.offset, a!.offset + 16);
});

void test('the command line refuses a hostile checkpoint in one line, and runs nothing', async () => {
  const folder = path.join(scratch, 'hostile');
  await rewriteAsMeta(folder, embeddedModelPath(), 1, 'F16');
  fs.writeFileSync(
    path.join(folder, 'consolidated.00.pth'),
    pthBytes([good], call(op.global('os', 'system'), command)),
  );
  for (const args of [['inspect'], ['generate', '--tp', '2', '--prompt', 'A']]) {
    const { code, stdout, stderr } = await runCli([...args, '--model', folder]);
    assert.equal(code, 1);
    assert.equal(stdout, '');
    assert.match(
      stderr,
      /^caravan: consolidated\.00\.pth: .*"os\.system", which is not allowed\n$/,
    );
  }
  assert.ok(!fs.existsSync(marker));
});
