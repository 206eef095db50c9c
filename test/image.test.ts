/**
 * deploy/Dockerfile builds, and what it builds answers a chat as a user without rights, over a read-only root.
 * deploy/cuda.Dockerfile builds on it, with ONNX Runtime's CUDA provider where ranks look for it.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import {
  initOf,
  npmSettings,
  pipSettings,
  skipWithoutBuildah,
  Workshop,
  type Container,
  type Image,
} from './image.js';
import { descendants } from './up-process.js';
import { freePort, startRedis } from './redis-server.js';

const skip =
  process.env['CARAVAN_LONG'] === '1' ? skipWithoutBuildah : 'builds for minutes: long form only';

let workshop: Workshop | null = null;
after(() => {
  workshop?.close();
});
let cpuImage: Image | null = null;

void test('an image is built that answers a chat without any rights', { skip }, async (context) => {
  workshop = Workshop.open();
  const image = workshop.build(
    'deploy/Dockerfile',
    'caravan',
    { BASE: workshop.base },
    { npmrc: npmSettings() },
  );
  cpuImage = image;
  const sharedMemory = fs.mkdtempSync('/dev/shm/caravan-image-');
  const files = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-files-'));
  const redis = await startRedis();
  const containers: Container[] = [];
  context.after(async () => {
    await Promise.all(containers.map((container) => container.stop('SIGKILL')));
    await redis.stop();
    for (const folder of [sharedMemory, files]) fs.rmSync(folder, { recursive: true });
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

void test(
  'the image for GPUs has the provider where ranks look, and says what it lacks where no GPU is',
  { skip },
  async (context) => {
    assert.ok(workshop !== null && cpuImage !== null, 'there is no image to build it on');
    // Neither Python's nor NVIDIA's image can be had everywhere: CUDA's own libraries are missing in the stand-in.
    const pip = '#!/bin/sh\nexec python3 "$(ls /usr/share/python-wheels/pip-*.whl)/pip" "$@"\n';
    const packages = ['python3', 'python3-pip-whl'];
    const python = workshop.extend('python', packages, { 'usr/local/bin/pip': pip });
    const image = workshop.build(
      'deploy/cuda.Dockerfile',
      'caravan-cuda',
      { CARAVAN: cpuImage.name, PYTHON: python, CUDA: workshop.base },
      { pip: pipSettings() },
    );
    assert.equal(image.config.User, cpuImage.config.User);
    assert.deepEqual(image.config.Entrypoint, cpuImage.config.Entrypoint);
    const sharedMemory = fs.mkdtempSync('/dev/shm/caravan-image-');
    fs.chmodSync(sharedMemory, 0o1777);
    context.after(() => {
      fs.rmSync(sharedMemory, { recursive: true });
    });
    const run = async (...command: string[]): Promise<string> => {
      const container = image.run(command, sharedMemory);
      await once(container.process, 'exit');
      return container.log();
    };
    const said = await run(
      'dist/coordinator/cli/main.js',
      'doctor',
      '--device',
      'cuda',
      '--tp',
      '1',
    );
    context.diagnostic(said);
    // The provider itself is there and was opened: what it needs of CUDA is what is missing.
    assert.match(said, /FAIL .*cuda:0/);
    assert.match(said, /libonnxruntime_providers_cuda\.so/);
    assert.doesNotMatch(said, /libonnxruntime_providers_cuda\.so: cannot open/);
    assert.match(said, /lib(cu\w+|nv\w+)\.so\.\d+: cannot open shared object file/);
    const megabytes = Math.round(image.byteCount / 1e6);
    context.diagnostic(`the image has ${megabytes} MB without CUDA's own libraries`);
  },
);
