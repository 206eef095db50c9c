/** `caravan pull` and `--model hf:…` as a user runs them: in processes that may be killed. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { cliEntry } from '../coordinator/package-root.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { commit, environment, id, newFolder, server } from './pull-world.js';

interface Process {
  readonly child: ReturnType<typeof spawn>;
  readonly ended: Promise<{ code: number | null; stdout: string; stderr: string }>;
}

function caravan(args: readonly string[], env: NodeJS.ProcessEnv): Process {
  const { PATH } = process.env;
  const child = spawn(process.execPath, [cliEntry, ...args], {
    env: { PATH, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
  const ended = new Promise<{ code: number | null; stdout: string; stderr: string }>((resolve) => {
    child.on('close', (code) => {
      resolve({ code, stdout, stderr });
    });
  });
  return { child, ended };
}

void test('a pull that is killed goes on where it was', { timeout: 60_000 }, async () => {
  const piece = 16 * 1024 * 1024;
  const large = new Map([
    ['config.json', Buffer.from('{}')],
    ['model.safetensors', Buffer.alloc(3 * piece, 'caravan')],
  ]);
  server.repositories.set(id, { commit, files: large });
  const folder = newFolder();
  const journal = path.join(folder, '.caravan-pull', 'model.safetensors.journal');
  server.fault = ({ range }, bytes, response) => {
    if (range !== `bytes=${2 * piece}-${3 * piece - 1}`) return 'as usual';
    // Half of the last piece, and no more.
    response.write(bytes.subarray(0, piece / 2));
    return 'handled';
  };
  const args = ['pull', `hf:${id}`, '--to', folder];
  const { child, ended } = caravan(args, environment());
  await new Promise<void>((resolve) => {
    const look = (): void => {
      const text = fs.existsSync(journal) ? fs.readFileSync(journal, 'utf8') : '';
      if (text.split('\n').length < 4) return;
      watcher.close();
      resolve();
    };
    fs.mkdirSync(path.dirname(journal), { recursive: true });
    const watcher = fs.watch(path.dirname(journal), look);
    look();
  });
  child.kill('SIGKILL');
  await ended;
  assert.ok(!fs.existsSync(path.join(folder, 'model.safetensors')));
  server.fault = () => 'as usual';
  server.takeSentBytes();
  const { code, stdout, stderr } = await caravan([...args, '--json'], environment()).ended;
  assert.equal(code, 0, stderr);
  const report = JSON.parse(stdout) as { folder: string; fetchedBytes: number; files: unknown[] };
  assert.equal(report.folder, folder);
  assert.equal(report.fetchedBytes, piece);
  assert.equal(report.files.length, 2);
  assert.equal(server.takeSentBytes(), piece);
  const pulled = fs.readFileSync(path.join(folder, 'model.safetensors'));
  assert.ok(pulled.equals(large.get('model.safetensors')!));
});

void test(
  '--model hf:… fetches what is missing, once, and then asks nobody',
  { timeout: 60_000 },
  async () => {
    const folder = embeddedModelPath();
    const tiny = new Map(
      fs
        .readdirSync(folder, { withFileTypes: true })
        .filter((entry) => entry.isFile())
        .map(({ name }) => [name, fs.readFileSync(path.join(folder, name))]),
    );
    server.repositories.set('org/tiny', { commit, files: tiny });
    const home = newFolder();
    const env = environment({ CARAVAN_HOME: home });
    const args = [
      'generate',
      '--model',
      'hf:org/tiny',
      '--prompt',
      'Once',
      '--max-tokens',
      '3',
      '--json',
    ];
    const offline = await caravan(args, { CARAVAN_HOME: home, HF_HUB_OFFLINE: '1' }).ended;
    assert.equal(offline.code, 1);
    assert.match(offline.stderr, /^caravan: hf:org\/tiny: cannot ask .*HF_HUB_OFFLINE is set\n$/m);
    const online = await caravan(args, env).ended;
    assert.equal(online.code, 0, online.stderr);
    assert.equal((JSON.parse(online.stdout) as { completionTokens: number }).completionTokens, 3);
    assert.ok(fs.existsSync(path.join(home, 'hub/org/tiny/config.json')));
    assert.ok(!fs.existsSync(path.join(home, 'hub/org/tiny/README.md')));
    const again = await caravan(['tokenize', '--model', 'hf:org/tiny', 'Once', '--json'], {
      CARAVAN_HOME: home,
      HF_HUB_OFFLINE: '1',
    }).ended;
    assert.equal(again.code, 0, again.stderr);
    const doctor = await caravan(['doctor', '--model', 'hf:org/none', '--json'], env).ended;
    assert.match(doctor.stdout, /run caravan pull hf:org\/none/);
  },
);
