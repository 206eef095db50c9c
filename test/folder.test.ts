/** Folders that users name are made, or refused at once. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { makeFolder } from '../model/folder.js';
import { runCli } from './cli.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-folder-'));
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

void test('a folder is made with those above it, and may be there', () => {
  const folder = path.join(scratch, 'a', 'b', 'c');
  makeFolder(folder);
  makeFolder(folder);
  assert.ok(fs.statSync(folder).isDirectory());
});

void test('a file in its place, or in its way, is refused', () => {
  const file = path.join(scratch, 'file');
  fs.writeFileSync(file, '');
  assert.throws(
    () => {
      makeFolder(file);
    },
    { code: 'EEXIST' },
  );
  assert.throws(
    () => {
      makeFolder(path.join(file, 'a'));
    },
    { code: 'ENOTDIR' },
  );
});

const isLinux = process.platform === 'linux' && fs.existsSync('/proc/self');

void test(
  'where the system lets nobody make folders, a command says so',
  { skip: isLinux ? false : 'there is no /proc' },
  async () => {
    assert.throws(
      () => {
        makeFolder('/proc/caravan/a');
      },
      { code: 'ENOENT' },
    );
    const { code, stderr } = await runCli(['pull', 'hf:a/b', '--to', '/proc/caravan']);
    assert.equal(code, 2);
    assert.match(stderr, /^caravan: \/proc\/caravan: cannot be made: [^\n]+\n$/);
  },
);
