/** `caravan pull` against a hub that behaves as Hugging Face's does, and one that breaks off, stalls and lies. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { hubSettings } from '../coordinator/hub.js';
import { ProgressBar } from '../coordinator/progress-bar.js';
import { pullFromHub, type Pulled } from '../coordinator/pull.js';
import { MANIFEST_FILE, parseHubSource } from '../model/hub-folder.js';
import type { Fault } from './hub-server.js';
import {
  commit,
  environment,
  files,
  first,
  id,
  newFolder,
  options,
  refusal,
  second,
  server,
  wanted,
  wantedBytes,
} from './pull-world.js';
import { Random } from './random.js';

const pull = (folder: string, source = `hf:${id}`, env: NodeJS.ProcessEnv = {}): Promise<Pulled> =>
  pullFromHub(parseHubSource(source), hubSettings(environment(env)), options(folder));

/** Every wanted file is there, and nothing else. */
function assertWhole(folder: string): void {
  assert.deepEqual(fs.readdirSync(folder).sort(), [MANIFEST_FILE, ...wanted]);
  for (const name of wanted) {
    assert.ok(fs.readFileSync(path.join(folder, name)).equals(files.get(name)!), name);
  }
}

void test('the files of one layout come, whole, in ranges, and are not fetched twice', async () => {
  const folder = newFolder();
  const { fetchedBytes, manifest } = await pull(folder);
  assertWhole(folder);
  assert.equal(fetchedBytes, wantedBytes);
  assert.equal(manifest.revision, commit);
  assert.deepEqual(manifest.files.map(({ name }) => name).sort(), wanted);
  const sha256 = createHash('sha256').update(files.get(first)!).digest('hex');
  assert.equal(manifest.files.find(({ name }) => name === first)!.checksum, `sha256:${sha256}`);
  const ranges = server.asked.filter(({ path: asked }) => asked.endsWith(first));
  assert.equal(ranges.length, 8);
  assert.equal(server.takeSentBytes(), wantedBytes);
  assert.equal((await pull(folder)).fetchedBytes, 0);
  assert.equal(server.takeSentBytes(), 0);
});

void test('a file that was changed or lost is fetched again, the others are not', async () => {
  const folder = newFolder();
  await pull(folder);
  server.takeSentBytes();
  const changed = path.join(folder, second);
  const bytes = fs.readFileSync(changed);
  bytes[5]! ^= 1;
  fs.writeFileSync(changed, bytes);
  fs.rmSync(path.join(folder, 'tokenizer.json'));
  await pull(folder);
  assertWhole(folder);
  assert.equal(server.takeSentBytes(), 123_456 + 20_000);
});

void test('broken connections are gone on with where they broke', async () => {
  const folder = newFolder();
  const breaks = new Random(3);
  let broken = 0;
  server.fault = (asked, bytes, response) => {
    if (bytes.length < 1000 || breaks.below(2) === 0) return 'as usual';
    broken += 1;
    asked.sentBytes = breaks.below(bytes.length);
    // The promised length never comes.
    response.write(bytes.subarray(0, asked.sentBytes), () => response.destroy());
    return 'handled';
  };
  await pull(folder);
  assertWhole(folder);
  assert.ok(broken > 5, String(broken));
  // What has come is not asked for again; what a broken socket swallowed is.
  assert.ok(server.takeSentBytes() < 2 * wantedBytes);
});

void test('a server that is busy, silent, or knows no ranges is borne with', async () => {
  const faults: Fault[] = [
    (_, __, response) => {
      response.removeHeader('content-range');
      response.removeHeader('content-length');
      response.writeHead(503, { 'retry-after': '0' }).end();
      return 'handled';
    },
    // Never says a word: the client gives up after its 300 ms.
    () => 'handled',
    (asked, _, response) => {
      const whole = files.get(asked.path.split('/').at(-1)!)!;
      response.removeHeader('content-range');
      response.writeHead(200, { 'content-length': whole.length });
      response.end(whole);
      return 'handled';
    },
  ];
  for (const fault of faults) {
    const folder = newFolder();
    const met = new Set<string>();
    server.fault = (asked, bytes, response) => {
      const key = `${asked.path} ${asked.range ?? ''}`;
      if (met.has(key)) return 'as usual';
      met.add(key);
      return fault(asked, bytes, response);
    };
    await pull(folder);
    assertWhole(folder);
  }
});

void test('a connection that always breaks ends in one line, and the next pull goes on', async () => {
  const folder = newFolder();
  server.fault = ({ path: asked, range }, bytes, response) => {
    if (!asked.endsWith(first) || !range!.startsWith('bytes=350000-')) return 'as usual';
    response.write(bytes.subarray(0, 0), () => response.destroy());
    return 'handled';
  };
  await assert.rejects(
    pull(folder),
    refusal('hub_unavailable', new RegExp(first), /broke off at byte 350000 of 400000/),
  );
  assert.ok(!fs.existsSync(path.join(folder, first)));
  server.fault = () => 'as usual';
  const before = wantedBytes - server.takeSentBytes();
  const { fetchedBytes } = await pull(folder);
  assertWhole(folder);
  assert.equal(fetchedBytes, server.takeSentBytes());
  assert.ok(fetchedBytes < wantedBytes / 2, `${fetchedBytes}, ${before} were missing`);
});

void test('a file that is not what the hub says is refused and thrown away', async () => {
  for (const name of [first, 'config.json']) {
    const folder = newFolder();
    server.fault = (asked, bytes, response) => {
      if (!asked.path.endsWith(name)) return 'as usual';
      const lie = Buffer.from(bytes);
      lie[lie.length - 2]! ^= 4;
      response.end(lie);
      return 'handled';
    };
    await assert.rejects(pull(folder), refusal('checksum_mismatch', new RegExp(name)));
    assert.ok(!fs.existsSync(path.join(folder, name)));
    assert.ok(!fs.existsSync(path.join(folder, MANIFEST_FILE)));
    server.fault = () => 'as usual';
    await pull(folder);
    assertWhole(folder);
  }
});

void test('pieces of an earlier pull that are wrong are fetched once more', async () => {
  const folder = newFolder();
  server.fault = ({ path: asked, range }, bytes, response) => {
    if (!asked.endsWith(first)) return 'as usual';
    // The first piece is a lie, the last never comes: what is left is resumed and found to be wrong.
    if (range!.startsWith('bytes=0-')) response.end(Buffer.alloc(bytes.length));
    else if (range!.startsWith('bytes=350000-')) response.destroy();
    else return 'as usual';
    return 'handled';
  };
  await assert.rejects(pull(folder), refusal('hub_unavailable'));
  server.fault = () => 'as usual';
  await pull(folder);
  assertWhole(folder);
});

void test('the token goes to the hub, and not to the storage that it leads to', async () => {
  server.repositories.set(id, { commit, files, token: 'hf_secret' });
  const folder = newFolder();
  await assert.rejects(
    pull(folder),
    refusal('unauthorized', /gated/, /accept its licence at http.*org\/model-7b/, /set HF_TOKEN/),
  );
  await assert.rejects(
    pull(folder, `hf:${id}`, { HF_TOKEN: 'hf_other' }),
    refusal('unauthorized', /gated/, /account of HF_TOKEN/, /\(403\)/),
  );
  await pull(folder, `hf:${id}`, { HF_TOKEN: 'hf_secret' });
  assertWhole(folder);
  const fromStorage = server.asked.filter(({ path: asked }) => asked.endsWith('.safetensors'));
  assert.ok(fromStorage.length > 5);
  for (const { authorization } of fromStorage) assert.equal(authorization, undefined);
  const fromHub = server.asked.find(({ path: asked }) => asked.endsWith('/config.json'));
  assert.equal(fromHub?.authorization, 'Bearer hf_secret');
});

void test('what is not there, and hubs that do not answer, are said in one line', async () => {
  const folder = newFolder();
  await assert.rejects(
    pull(folder, 'hf:org/none'),
    refusal('unauthorized', /hf:org\/none/, /HF_TOKEN/),
  );
  const token = { HF_TOKEN: 'x' };
  await assert.rejects(pull(folder, 'hf:org/none', token), refusal('not_found', /does not exist/));
  await assert.rejects(pull(folder, `hf:${id}@v9`), refusal('not_found', /no revision v9/));
  await assert.rejects(
    pull(folder, `hf:${id}`, { HF_ENDPOINT: 'http://127.0.0.1:9' }),
    refusal('hub_unavailable', /cannot ask http:\/\/127\.0\.0\.1:9/),
  );
  await assert.rejects(
    pull(folder, `hf:${id}`, { HF_HUB_OFFLINE: '1' }),
    refusal('hub_unavailable', /HF_HUB_OFFLINE/),
  );
  assert.throws(() => hubSettings({ HF_ENDPOINT: 'hub' }), refusal('bad_usage', /HF_ENDPOINT/));
  for (const bad of ['hf:model', 'hf:../x', 'hf:a/..', 'hf:a/b@../c', 'hf:a/b/c', 'hf:a/b@']) {
    assert.throws(() => parseHubSource(bad), refusal('bad_usage', /must be hf:ORG\/NAME/), bad);
  }
});

void test('a model that does not fit on the disk is refused before a byte of it comes', async () => {
  server.claimedBytes.set(first, 2 ** 52);
  const folder = newFolder();
  await assert.rejects(pull(folder), refusal('disk_full', /bytes are needed, \d+ are free/));
  assert.ok(!server.asked.some(({ path: asked }) => asked.endsWith(first)));
});

for (const [name, names, layout, says] of [
  [
    'a single file of safetensors',
    ['config.json', 'model.safetensors', 'pytorch_model.bin'],
    2,
    null,
  ],
  ["Meta's layout", ['params.json', 'consolidated.00.pth', 'tokenizer.model', 'x.bin'], 3, null],
  ['one GGUF', ['m.Q8_0.gguf', 'README.md'], 1, null],
  ['a split GGUF', ['m-00001-of-00002.gguf', 'm-00002-of-00002.gguf'], 2, null],
  ['several GGUF', ['m.Q8_0.gguf', 'm.Q4_0.gguf'], 0, /2 GGUF models.*Q4_0.*Q8_0/],
  ["PyTorch's files alone", ['config.json', 'pytorch_model.bin'], 0, /only pytorch_model\.bin/],
  ['no model', ['README.md'], 0, /neither safetensors/],
] as const) {
  void test(`of a repository with ${name} ${layout === 0 ? 'nothing' : 'that'} is fetched`, async () => {
    const small = new Map(names.map((file) => [file as string, Buffer.from(`<${file}>`)]));
    server.repositories.set(id, { commit, files: small });
    const folder = newFolder();
    if (says !== null) {
      await assert.rejects(pull(folder), refusal('unsupported_model', says));
      return;
    }
    const { manifest } = await pull(folder);
    assert.equal(manifest.files.length, layout);
  });
}

void test('two pulls of the same at once fetch it once', async () => {
  const folder = newFolder();
  const [one, other] = await Promise.all([pull(folder), pull(folder)]);
  assertWhole(folder);
  assert.equal(one.fetchedBytes + other.fetchedBytes, wantedBytes);
  assert.equal(server.takeSentBytes(), wantedBytes);
});

void test('a bar is drawn on a terminal, and lines elsewhere', () => {
  for (const isTTY of [true, false]) {
    let shown = '';
    const bar = new ProgressBar('model', { isTTY, columns: 200, write: (text) => (shown += text) });
    bar.expect(2e9);
    bar.advance(5e8, false);
    bar.advance(5e8, true);
    bar.end();
    assert.match(shown, /model █{12}░{12} {2}50 % {2}1\.0 GB of 2\.0 GB/);
    assert.equal(shown.includes('\r'), isTTY);
    assert.ok(shown.endsWith('\n'));
  }
});
