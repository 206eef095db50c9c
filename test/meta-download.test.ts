/** Meta's own download, from a server that holds its files behind signed links. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { parseMetaSource, pullFromMeta } from '../coordinator/meta-download.js';
import type { Pulled } from '../coordinator/pull.js';
import { MANIFEST_FILE } from '../model/hub-folder.js';
import { newFolder, noise, options, refusal, server } from './pull-world.js';

const md5 = (bytes: Buffer): string => createHash('md5').update(bytes).digest('hex');

function serveMeta(): Map<string, Buffer> {
  const model = new Map<string, Buffer>([
    ['params.json', Buffer.from('{"dim": 8}')],
    ['consolidated.00.pth', noise(120_000)],
    ['consolidated.01.pth', noise(70_000)],
  ]);
  const checklist = [...model].map(([name, bytes]) => `${md5(bytes)}  ${name}\n`).join('');
  const tokenizer = noise(9000);
  server.metaFiles.clear();
  for (const [name, bytes] of model) server.metaFiles.set(`llama-2-13b-chat/${name}`, bytes);
  server.metaFiles.set('llama-2-13b-chat/checklist.chk', Buffer.from(checklist));
  server.metaFiles.set('LICENSE', Buffer.from('a licence'));
  server.metaFiles.set('USE_POLICY.md', Buffer.from('a policy'));
  server.metaFiles.set('tokenizer.model', tokenizer);
  const tokenizerList = `${md5(tokenizer)}  tokenizer.model\n`;
  server.metaFiles.set('tokenizer_checklist.chk', Buffer.from(tokenizerList));
  return model.set('tokenizer.model', tokenizer);
}

const pullMeta = (folder: string, url = server.metaUrl(), name = '13b-chat'): Promise<Pulled> =>
  pullFromMeta(parseMetaSource(`meta:${url}`, name), options(folder));

void test("Meta's download comes by its signed URL, in ranges, and is held to its checklist", async () => {
  const model = serveMeta();
  const folder = newFolder();
  await pullMeta(folder);
  const expected = [MANIFEST_FILE, ...model.keys(), 'LICENSE', 'USE_POLICY.md', 'checklist.chk'];
  assert.deepEqual(fs.readdirSync(folder).sort(), expected.sort());
  for (const [name, bytes] of model) {
    assert.ok(fs.readFileSync(path.join(folder, name)).equals(bytes), name);
  }
  assert.ok(server.asked.filter(({ path: asked }) => asked.endsWith('00.pth')).length > 2);
  // The link is a key, and nothing that is written down holds it.
  assert.ok(!fs.readFileSync(path.join(folder, MANIFEST_FILE), 'utf8').includes('Signature'));
  server.metaFiles.set('llama-2-13b-chat/consolidated.01.pth', noise(70_000));
  await assert.rejects(
    pullMeta(newFolder()),
    refusal('checksum_mismatch', /consolidated\.01\.pth/, /md5:/),
  );
});

void test('a link of Meta that has expired, or is no link, is explained without showing it', async () => {
  serveMeta();
  const isQuiet = (error: Error): true => {
    assert.doesNotMatch(error.message, /Signature|wrong/);
    return true;
  };
  await assert.rejects(pullMeta(newFolder(), server.metaUrl('wrong')), (error: Error) => {
    refusal('unauthorized', /expired/, /24 hours/, /403/)(error);
    return isQuiet(error);
  });
  await assert.rejects(pullMeta(newFolder(), server.metaUrl(), '7b'), refusal('not_found', /7b/));
  const link = server.metaUrl();
  for (const [url, name] of [
    [link.replace('*', ''), '7b'],
    ['', '7b'],
    ['https', '7b'],
    [link, '../7b'],
  ] as const) {
    assert.throws(
      () => parseMetaSource(`meta:${url}`, name),
      (error: Error) => {
        refusal('bad_usage')(error);
        return isQuiet(error);
      },
    );
  }
});
