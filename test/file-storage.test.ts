/** Both storages of files do the same: a folder, and a bucket over the S3 protocol. */
import assert from 'node:assert/strict';
import { execFileSync, spawnSync } from 'node:child_process';
import { createCipheriv, createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openStorage } from '../coordinator/file-place.js';
import { pieces, removeBelow, type FileStorage } from '../coordinator/file-storage.js';
import { CaravanError, type ErrorCode } from '../proto/errors.js';
import { s3Credentials, startS3 } from './s3-server.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-storage-'));
const s3 = await startS3();
after(() => s3.stop());
const before = { ...process.env };
Object.assign(process.env, s3Credentials);
after(() => {
  process.env = before;
});

const place = `s3://nights/of/all?endpoint=${encodeURIComponent(s3.endpoint)}&region=eu-west-1`;
const storages: readonly (readonly [string, FileStorage])[] = [
  ['a folder', await openStorage(path.join(scratch, 'files'))],
  ['a bucket', await openStorage(place)],
];

/** Bytes without a pattern, the same for the same seed. */
const bytesOf = (size: number, seed: number): Buffer =>
  createCipheriv('aes-128-ctr', Buffer.alloc(16, seed), Buffer.alloc(16)).update(
    Buffer.alloc(size),
  );

async function* inPieces(bytes: Buffer, size: number): AsyncGenerator<Buffer> {
  for (let at = 0; at < bytes.length; at += size) {
    yield await Promise.resolve(bytes.subarray(at, at + size));
  }
}

const digest = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');

const keysOf = async (storage: FileStorage, prefix: string): Promise<string[]> => {
  const keys: string[] = [];
  for await (const { key } of storage.list(prefix)) keys.push(key);
  return keys.sort();
};

const hasCode = (code: ErrorCode) => (error: unknown) =>
  error instanceof CaravanError && error.code === code;

for (const [name, storage] of storages) {
  void test(`${name} gives back what was written, whole and by ranges`, async () => {
    for (const size of [0, 1, 1000, 1024 * 1024, 20 * 1024 * 1024 + 7]) {
      const bytes = bytesOf(size, size + 1);
      const key = `files/file-${size}`;
      assert.equal(await storage.write(key, inPieces(bytes, 300_000)), size);
      assert.equal(await storage.size(key), size);
      const read: Buffer[] = [];
      for await (const piece of pieces(storage, key)) read.push(piece);
      assert.equal(digest(Buffer.concat(read)), digest(bytes));
      assert.deepEqual(await storage.read(key, 3, 17), bytes.subarray(3, 17));
      assert.equal((await storage.read(key, size + 5, size + 9)).length, 0);
    }
    await storage.write('files/file-1', inPieces(Buffer.from('again'), 2));
    assert.equal((await storage.read('files/file-1', 0, 100)).toString(), 'again');
  });

  void test(`${name} lists below a prefix, and removes`, async () => {
    for (const part of ['a', 'b', 'c', 'd', 'e']) {
      await storage.write(`batches/one/${part}`, inPieces(Buffer.from(part), 1));
    }
    await storage.write('batches/two/a', inPieces(Buffer.from('a'), 1));
    assert.deepEqual(await keysOf(storage, 'batches/two/'), ['batches/two/a']);
    assert.equal((await keysOf(storage, 'batches/')).length, 6);
    await removeBelow(storage, 'batches/one/');
    assert.deepEqual(await keysOf(storage, 'batches/'), ['batches/two/a']);
    await storage.remove('batches/one/a');
    assert.deepEqual(await keysOf(storage, 'nothing/'), []);
    assert.equal(await storage.size('batches/one/a'), null);
    await assert.rejects(storage.read('batches/one/a', 0, 1), hasCode('not_found'));
  });

  void test(`${name} keeps nothing of a write that fails, small or large`, async () => {
    const failing = async function* (size: number): AsyncGenerator<Buffer> {
      yield* inPieces(bytesOf(size, 3), 1_000_000);
      throw new Error('the source broke');
    };
    for (const size of [10, 12_000_000]) {
      await assert.rejects(storage.write('files/broken', failing(size)), /the source broke/);
      assert.equal(await storage.size('files/broken'), null);
    }
    assert.ok(!(await keysOf(storage, 'files/')).some((key) => key.includes('broken')));
    assert.equal(s3.uploads.size, 0);
  });
}

void test('large objects go to a bucket in parts, and a moment of bad weather is waited out', async () => {
  const storage = storages[1]![1];
  const parts = s3.partCount();
  s3.failWrites(1);
  const bytes = bytesOf(17_000_000, 9);
  await storage.write('files/parts', inPieces(bytes, 65_536));
  assert.equal(s3.partCount() - parts, 3);
  assert.equal(digest(s3.objects.get('nights/of/all/files/parts')!), digest(bytes));
  s3.failWrites(1000);
  await assert.rejects(
    storage.write('files/never', inPieces(bytes, 65_536)),
    hasCode('storage_unavailable'),
  );
  s3.failWrites(0);
  assert.equal(s3.uploads.size, 0);
});

const disk = path.join(scratch, 'disk');

/** A disk of one megabyte; only root can have one. */
function mountDisk(): boolean {
  fs.mkdirSync(disk);
  return spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', disk]).status === 0;
}

const isMounted = mountDisk();
after(() => {
  if (isMounted) execFileSync('umount', [disk]);
  fs.rmSync(scratch, { recursive: true, force: true });
});

void test(
  'a full disk is told as such, and keeps nothing of what it had no room for',
  { skip: isMounted ? false : 'only root can mount a small disk' },
  async () => {
    const storage = await openStorage(disk);
    const write = storage.write('files/large', inPieces(bytesOf(3_000_000, 1), 100_000));
    await assert.rejects(write, hasCode('disk_full'));
    assert.equal(
      await storage.write('files/small', inPieces(bytesOf(500_000, 1), 100_000)),
      500_000,
    );
    assert.deepEqual(await keysOf(storage, 'files/'), ['files/small']);
  },
);

void test('a folder that cannot be made has its code', async () => {
  const file = path.join(scratch, 'file');
  fs.writeFileSync(file, '');
  const blocked = await openStorage(file);
  const write = blocked.write('files/x', inPieces(Buffer.alloc(10), 10));
  await assert.rejects(write, hasCode('storage_unavailable'));
});

void test('a bucket that is not named rightly, or is not there, is one line', async () => {
  for (const wrong of [
    's3://',
    's3://UPPER/x',
    's3://ok/a b',
    's3://ok/x?endpoint=ftp://h',
    's3://ok?key=1',
  ]) {
    await assert.rejects(openStorage(wrong), hasCode('bad_usage'), wrong);
  }
  const nobody = await openStorage('s3://nights/x?endpoint=http://127.0.0.1:1');
  await assert.rejects(nobody.size('files/x'), (error: Error) => {
    assert.ok(hasCode('storage_unavailable')(error));
    assert.match(error.message, /^the files at s3:\/\/nights\/x\/: [^\n]+$/);
    return true;
  });
});
