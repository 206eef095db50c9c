/** deploy/Dockerfile builds, and what it builds answers a chat as a user without rights, over a read-only root. */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { Image, initOf, skipWithoutBuildah, type Container } from './image.js';
import { descendants } from './up-process.js';
import { freePort, startRedis } from './redis-server.js';

const skip =
  process.env['CARAVAN_LONG'] === '1' ? skipWithoutBuildah : 'builds for minutes: long form only';

void test('an image is built that answers a chat without any rights', { skip }, async (context) => {
  const image = Image.build('deploy/Dockerfile');
  const sharedMemory = fs.mkdtempSync('/dev/shm/caravan-image-');
  const files = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-files-'));
  const redis = await startRedis();
  const containers: Container[] = [];
  after(async () => {
    await Promise.all(containers.map((container) => container.stop('SIGKILL')));
    await redis.stop();
    for (const folder of [sharedMemory, files]) fs.rmSync(folder, { recursive: true });
    image.remove();
  });
  fs.chmodSync(sharedMemory, 0o1777);

  // What Kubernetes' restricted standard asks for.
  assert.match(image.config.User, /^[1-9]\d*:[1-9]\d*$/);
  const [uid] = image.config.User.split(':');
  assert.deepEqual(image.config.Entrypoint, ['tini', '--', 'node']);
  assert.deepEqual(image.health, ['CMD', 'node', 'deploy/healthcheck.mjs']);

  const ports = await Promise.all([freePort(), freePort(), freePort()]);
  const [first, second, http] = ports;
  const start = (...command: string[]): Container => {
    const container = image.run(command, sharedMemory, [`CARAVAN_REDIS=${redis.url}`]);
    containers.push(container);
    return container;
  };
  for (const port of [first, second]) start('dist/worker/main.js', '--listen', `127.0.0.1:${port}`);
  const main = 'dist/coordinator/cli/main.js';
  const ranks = `127.0.0.1:${first},127.0.0.1:${second}`;
  const coordinator = start(main, 'coordinator', '--ranks', ranks, '--transport', 'shm');
  const gateway = start(main, 'gateway', '--port', String(http), '--files', '/dev/shm');
  const url = `http://127.0.0.1:${http}`;
  const giveUpMs = performance.now() + 60_000;
  const isReady = async (): Promise<boolean> => {
    const answer = await fetch(`${url}/readyz`).catch(() => null);
    return answer?.ok === true;
  };
  while (!(await isReady())) {
    const logs = containers.map(({ log }) => log()).join('\n');
    assert.ok(performance.now() < giveUpMs, logs);
    for (const { process: child } of containers) assert.equal(child.exitCode, null, logs);
  }

  const chat = await fetch(`${url}/v1/chat/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ messages: [{ role: 'user', content: 'Hi' }], max_tokens: 12 }),
  });
  assert.equal(chat.status, 200);
  const { choices } = (await chat.json()) as { choices: { message: { content: string } }[] };
  assert.ok(choices[0]!.message.content.length > 0);

  // Every process of every container: our user, no capability, none to come.
  const init = initOf(coordinator.process.pid!)!;
  const processes = containers.flatMap(({ process: { pid } }) => descendants(pid!));
  assert.ok(processes.length >= 8, 'an init and a process each');
  for (const { pid } of processes) {
    const status = fs.readFileSync(`/proc/${pid}/status`, 'utf8');
    assert.match(status, new RegExp(`^Uid:\\t${uid!}\\t${uid!}\\t${uid!}\\t${uid!}$`, 'm'));
    assert.match(status, /^CapEff:\t0+$/m);
    assert.match(status, /^NoNewPrivs:\t1$/m);
  }
  assert.match(fs.readFileSync(`/proc/${init}/cmdline`, 'utf8'), /^tini\0--\0node\0/);
  const mounts = fs.readFileSync(`/proc/${init}/mountinfo`, 'utf8');
  assert.match(mounts, / \/ ro,/, 'the root cannot be written');

  const check = start('deploy/healthcheck.mjs', `${url}/livez`);
  const [code] = (await once(check.process, 'exit')) as [number | null];
  assert.equal(code, 0, check.log());
  assert.match(check.log(), /\/livez: 200/);

  // The init passes SIGTERM on: both drain and end by themselves.
  for (const container of [gateway, coordinator]) {
    assert.equal((await container.stop('SIGTERM')).code, 0, container.log());
  }
  const megabytes = Math.round(image.byteCount / 1e6);
  context.diagnostic(`the image has ${megabytes} MB, its base included`);
});
