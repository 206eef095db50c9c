import assert from 'node:assert/strict';
import type { ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { setTimeout as delay } from 'node:timers/promises';
import { runCli } from './cli.js';
import { descendants, processes, startUp, type UpProcess } from './up-process.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-up-'));
const running: ChildProcess[] = [];
after(async () => {
  for (const child of running) child.kill('SIGKILL');
  await delay(100);
  fs.rmSync(scratch, { recursive: true, force: true });
});

/** Starts `caravan up` with a state folder of this name. */
async function startNamed(name: string): Promise<UpProcess & { readonly stateDir: string }> {
  const stateDir = path.join(scratch, name);
  const up = await startUp(stateDir);
  running.push(up.process);
  return { ...up, stateDir };
}

const isAlive = (pid: number): boolean => {
  try {
    process.kill(pid, 0);
    // A process that nobody has waited for yet is dead all the same.
    return !/^\d+ \(.*\) Z/.test(fs.readFileSync(`/proc/${pid}/stat`, 'utf8'));
  } catch {
    return false;
  }
};

/** Foreign processes send us no event when they end: they are looked at until the deadline. */
async function untilGone(pids: readonly number[], deadlineMs: number): Promise<number[]> {
  const endMs = performance.now() + deadlineMs;
  while (pids.some(isAlive) && performance.now() < endMs) await delay(50);
  return pids.filter(isAlive);
}

const ask = (url: string, body: object): Promise<Response> =>
  fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt: 'The llama', temperature: 0, ignore_eos: true, ...body }),
  });

void test('up --ask --once prints the address and an answer, and ends with nothing left', async () => {
  const stateDir = path.join(scratch, 'once');
  const args = [
    'up',
    '--port',
    '0',
    '--state-dir',
    stateDir,
    '--ask',
    'Tell me a story.',
    '--once',
  ];
  const { code, stdout } = await runCli(args, 120_000);
  assert.equal(code, 0);
  assert.match(stdout, /^caravan serves http:\/\/127\.0\.0\.1:\d+\n/);
  assert.ok(stdout.length > 150, stdout);
  assert.deepEqual(
    processes().filter(({ command }) => command.includes(stateDir)),
    [],
  );
});

void test('a second up on the same folder, or the same port, is refused in one line', async () => {
  const up = await startNamed('second');
  const again = await runCli(['up', '--port', '0', '--state-dir', up.stateDir]);
  assert.equal(again.code, 2);
  assert.match(again.stderr, /^caravan: --state-dir .*: another caravan up uses it; .*\n$/m);

  const { port } = new URL(up.url);
  const other = path.join(scratch, 'other');
  const samePort = await runCli([
    'up',
    '--port',
    port,
    '--state-dir',
    other,
    '--log-level',
    'silent',
  ]);
  assert.notEqual(samePort.code, 0);
  assert.match(samePort.stderr, /another program listens there/);
  up.process.kill('SIGTERM');
  await once(up.process, 'exit');
});

void test('up says what a rank says that does not start', async () => {
  const stateDir = path.join(scratch, 'deviceless');
  // No machine has that many GPUs.
  const args = ['up', '--port', '0', '--device', 'cuda:999', '--state-dir', stateDir];
  const { code, stderr } = await runCli([...args, '--log-level', 'silent']);
  assert.notEqual(code, 0);
  assert.match(stderr, /^caravan: rank did not start: --device cuda:999: .+; .+$/m);
});

void test('the first Ctrl-C lets a running answer end; then all processes are gone', async () => {
  const up = await startNamed('drain');
  const pids = descendants(up.process.pid!).map(({ pid }) => pid);
  assert.ok(pids.length >= 5, 'redis and its guard, two ranks, coordinator, gateway');
  const response = await ask(up.url, { max_tokens: 300, stream: true });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let text = (await reader.read()).value ?? '';
  up.process.kill('SIGINT');
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    text += value;
  }
  assert.match(text, /"finish_reason":"length"/);
  assert.match(text, /data: \[DONE\]/);
  const [code] = (await once(up.process, 'exit')) as [number];
  assert.equal(code, 0);
  assert.deepEqual(await untilGone(pids, 5_000), []);
});

void test('kill -9 of up leaves no process behind', async () => {
  const up = await startNamed('killed');
  const pids = descendants(up.process.pid!).map(({ pid }) => pid);
  up.process.kill('SIGKILL');
  await once(up.process, 'exit');
  assert.deepEqual(await untilGone(pids, 10_000), []);
});

void test('a rank that is killed comes back, and the answer under way is whole', async () => {
  const up = await startNamed('rank');
  const undisturbed = (await (await ask(up.url, { max_tokens: 400 })).json()) as {
    choices: { text: string }[];
  };
  const response = await ask(up.url, { max_tokens: 400, stream: true });
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  let events = (await reader.read()).value ?? '';
  const rank = descendants(up.process.pid!).find(({ command }) =>
    command.includes('worker/main.js'),
  );
  process.kill(rank!.pid, 'SIGKILL');
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    events += value;
  }
  const chunks = [...events.matchAll(/^data: (\{.*)$/gm)].map(
    ([, json]) => JSON.parse(json!) as { choices: { text: string }[] },
  );
  const text = chunks.map(({ choices }) => choices[0]?.text ?? '').join('');
  assert.equal(text, undisturbed.choices[0]!.text);
  up.process.kill('SIGTERM');
  await once(up.process, 'exit');
});
