/** `caravan pull` from a hub that only a proxy reaches: nobody else knows the names of its servers. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import path from 'node:path';
import { after, test } from 'node:test';
import { pullFromHub } from '../coordinator/pull.js';
import { hubSettings } from '../coordinator/hub.js';
import { Web } from '../coordinator/web.js';
import { parseHubSource } from '../model/hub-folder.js';
import { Authority } from './certificates.js';
import { runCli, type CliRun } from './cli.js';
import { ConnectProxy } from './connect-proxy.js';
import { HubServer } from './hub-server.js';
import { commit, files, id, newFolder, options, wanted } from './pull-world.js';

const user = 'caravan:pass%20word';
const proxy = new ConnectProxy('caravan:pass word');
const authority = new Authority();
const hosts = { hub: 'hub.test', storage: 'storage.test' };
const leaf = authority.leaf('hub', 1, Object.values(hosts));
const [secure, plain] = [new HubServer({ ...hosts, leaf }), new HubServer(hosts)];
await Promise.all([proxy.start(), secure.start(), plain.start()]);
for (const hub of [secure, plain]) hub.repositories.set(id, { commit, files });
after(() => {
  for (const server of [proxy, secure, plain]) server.stop();
  authority.remove();
});

function assertWhole(folder: string): void {
  for (const name of wanted) {
    assert.ok(fs.readFileSync(path.join(folder, name)).equals(files.get(name)!), name);
  }
  assert.deepEqual([...new Set(proxy.asked.splice(0))].sort(), Object.values(hosts));
}

const pull = (folder: string, env: NodeJS.ProcessEnv): Promise<CliRun> =>
  runCli(['pull', `hf:${id}`, '--to', folder], undefined, {
    ...{ HF_ENDPOINT: secure.url, NODE_EXTRA_CA_CERTS: authority.caPath },
    ...env,
  });

void test('hub and storage are asked through HTTPS_PROXY, with its name and password', async () => {
  const folder = newFolder();
  const { code, stderr } = await pull(folder, {
    HTTPS_PROXY: proxy.url(user),
    NO_PROXY: 'other.test,.example',
  });
  assert.equal(code, 0, stderr);
  assert.doesNotMatch(stderr, /warning/i);
  assertWhole(folder);
});

void test('what a proxy refuses, and what needs none, is said in one line without its password', async () => {
  const through = { HTTPS_PROXY: proxy.url(user) };
  const runs = await Promise.all([
    pull(newFolder(), { HTTPS_PROXY: proxy.url('caravan:wrong') }),
    pull(newFolder(), { ...through, no_proxy: 'hub.test' }),
    pull(newFolder(), { HTTPS_PROXY: 'socks5://caravan:wrong@127.0.0.1:1' }),
  ]);
  const says = [/cannot ask .*407/, /cannot ask .*ENOTFOUND|EAI_AGAIN/, /HTTPS_PROXY.* no http/];
  runs.forEach(({ code, stderr }, i) => {
    assert.equal(code, i === 2 ? 2 : 1, stderr);
    assert.match(stderr, says[i]!);
    assert.doesNotMatch(stderr, /wrong|pass/);
    assert.equal(stderr.trim().split('\n').length, 1, stderr);
  });
  assert.deepEqual(proxy.asked, []);
});

void test('a hub without TLS is asked through its proxy, too', async () => {
  const folder = newFolder();
  const web = new Web(() => proxy.url(user));
  await pullFromHub(parseHubSource(`hf:${id}`), hubSettings({ HF_ENDPOINT: plain.url }), {
    ...options(folder),
    web,
  });
  await web.close();
  assertWhole(folder);
});
