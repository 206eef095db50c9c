/** `inspect --verify` holds the files of Meta's download to their checklist. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, test } from 'node:test';
import { verifyChecklist } from '../coordinator/checklist.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { CaravanError } from '../proto/errors.js';
import { runCli, runCliJson } from './cli.js';
import { rewriteAsMeta } from './meta-checkpoint.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-checklist-'));
const folder = path.join(scratch, 'meta');
const names = ['consolidated.00.pth', 'consolidated.01.pth', 'params.json'];
const list = path.join(folder, 'checklist.chk');

function writeList(): void {
  const lines = names.map((name) => {
    const bytes = fs.readFileSync(path.join(folder, name));
    return `${createHash('md5').update(bytes).digest('hex')}  ${name}\n`;
  });
  fs.writeFileSync(list, lines.join(''));
}

before(async () => {
  await rewriteAsMeta(folder, embeddedModelPath(), 2, 'F16');
  writeList();
});
after(() => {
  fs.rmSync(scratch, { recursive: true });
});

const isRefusal =
  (says: RegExp) =>
  (error: unknown): boolean =>
    error instanceof CaravanError && says.test(error.message);

void test('files that are as the checklist says are named', async () => {
  const report = (await runCliJson(['inspect', '--model', folder, '--verify'])) as {
    verified: string[];
  };
  assert.deepEqual(report.verified, names);
  const without = (await runCliJson(['inspect', '--model', folder])) as { verified: null };
  assert.equal(without.verified, null);
});

void test('a terminal sees how far it has come', async () => {
  let drawn = '';
  const screen = { isTTY: true, columns: 100, write: (text: string) => (drawn += text) };
  await verifyChecklist(folder, screen);
  const bytes = names.reduce((sum, name) => sum + fs.statSync(path.join(folder, name)).size, 0);
  assert.match(drawn, new RegExp(`100 %  ${(bytes / 1e6).toFixed(1)} MB of`));
  assert.ok(drawn.endsWith('\n'));
});

void test('one changed bit is found, in a place that nothing else looks at', async () => {
  const file = path.join(folder, names[1]!);
  const bytes = fs.readFileSync(file);
  const middle = bytes.length >> 1;
  bytes[middle]! ^= 1;
  fs.writeFileSync(file, bytes);
  const { code, stdout, stderr } = await runCli(['inspect', '--model', folder, '--verify']);
  assert.equal(code, 1);
  assert.equal(stdout, '');
  assert.match(
    stderr,
    /^caravan: consolidated\.01\.pth: its MD5 is \w{32}, and checklist\.chk says \w{32}.*\n$/,
  );
  assert.equal((await runCli(['inspect', '--model', folder])).code, 0);
  bytes[middle]! ^= 1;
  fs.writeFileSync(file, bytes);
});

void test('a missing file, a damaged checklist and none are refused in one line', async () => {
  const away = path.join(scratch, 'away');
  fs.renameSync(path.join(folder, names[0]!), away);
  await assert.rejects(
    verifyChecklist(folder, null),
    isRefusal(/^consolidated\.00\.pth: is named by/),
  );
  fs.renameSync(away, path.join(folder, names[0]!));
  fs.writeFileSync(list, 'no sums');
  await assert.rejects(verifyChecklist(folder, null), isRefusal(/checklist\.chk: is not a list/));
  fs.rmSync(list);
  const { code, stderr } = await runCli(['inspect', '--model', folder, '--verify']);
  assert.equal(code, 2);
  assert.match(stderr, /^caravan: --verify: .* has no checklist\.chk.*\n$/);
});
