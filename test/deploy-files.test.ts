/** What deploy/ gives to one machine: compose, systemd units, and the rules of a Prometheus without Kubernetes. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { parse } from 'yaml';
import { createProgram } from '../coordinator/cli/program.js';
import { packageRoot, workerEntry } from '../coordinator/package-root.js';
import { openCheckpoint } from '../model/checkpoint.js';
import { ggufBytes } from './gguf-writer.js';
import { tinyGguf } from './tiny-gguf.js';

const folder = path.join(packageRoot, 'deploy');
const read = (file: string): string => fs.readFileSync(path.join(folder, file), 'utf8');

/** The flags of each role. */
async function knownFlags(): Promise<Map<string, Set<string>>> {
  const known = new Map(
    (await createProgram()).commands.map((command) => [
      command.name(),
      new Set(command.options.map(({ long }) => long ?? '')),
    ]),
  );
  const { stdout } = spawnSync(process.execPath, [workerEntry, '--help'], { encoding: 'utf8' });
  known.set('worker', new Set([...stdout.matchAll(/^ +(--[\w-]+)/gm)].map(([, flag]) => flag!)));
  return known;
}

/** Fails unless every flag of a command line of ours exists. @returns the role. */
function assertFlagsExist(line: string, known: ReadonlyMap<string, ReadonlySet<string>>): string {
  const role = line.includes('dist/worker/main.js')
    ? 'worker'
    : /dist\/coordinator\/cli\/main\.js ([a-z]+)/.exec(line)![1]!;
  for (const [flag] of line.matchAll(/(?<= )--[a-z][\w-]*/g)) {
    assert.ok(known.get(role)!.has(flag), `${role} ${flag}`);
  }
  return role;
}

interface Service {
  readonly command: string;
  readonly image: string;
  readonly user?: string;
  readonly read_only?: boolean;
  readonly cap_drop?: readonly string[];
  readonly security_opt?: readonly string[];
  readonly volumes: readonly string[];
  readonly healthcheck: { readonly test: readonly string[] };
  readonly stop_grace_period?: string;
}

void test('compose runs each role without rights, with health, and ranks that share memory', async () => {
  const { services, volumes } = parse(read('compose.yaml'), { merge: true }) as {
    services: Record<string, Service>;
    volumes: Record<string, unknown>;
  };
  assert.deepEqual(Object.keys(services), ['redis', 'rank-0', 'rank-1', 'coordinator', 'gateway']);
  const known = await knownFlags();
  for (const [name, service] of Object.entries(services)) {
    assert.ok(service.healthcheck.test.length > 1, name);
    for (const volume of service.volumes) {
      const [source] = volume.split(/:(?=\/)/);
      assert.ok(/^[.$/]/.test(source!) || source! in volumes, `${name}: ${volume}`);
    }
    if (name === 'redis') continue;
    const role = assertFlagsExist(service.command, known);
    assert.equal(role, name.startsWith('rank') ? 'worker' : name);
    assert.equal(service.read_only, true, name);
    assert.equal(service.user, '10001:10001', name);
    assert.deepEqual(service.cap_drop, ['ALL'], name);
    assert.deepEqual(service.security_opt, ['no-new-privileges:true'], name);
    const drainS = Number(/--drain-timeout (\d+)/.exec(service.command)?.[1] ?? 300);
    assert.ok(
      drainS < Number.parseInt(service.stop_grace_period!),
      `${name} drains before it is killed`,
    );
  }
  assert.match(services['redis']!.command, /--appendonly yes .*--maxmemory-policy noeviction/);
  const ranks = ['rank-0', 'rank-1'];
  for (const name of ranks) assert.ok(services[name]!.volumes.includes('shm:/dev/shm'));
  assert.ok(
    services['coordinator']!.command.includes(`--ranks ${ranks.map((r) => `${r}:7000`).join()}`),
  );
});

void test('a model of one file is one under whatever name a container mounts it', () => {
  const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-mounted-'));
  try {
    const mounted = path.join(scratch, 'model');
    fs.writeFileSync(mounted, ggufBytes(tinyGguf));
    assert.equal(openCheckpoint(mounted).layout, 'gguf');
    fs.writeFileSync(mounted, 'no model at all, and longer than any header');
    assert.throws(() => openCheckpoint(mounted), /model: .*GGUF/i);
  } finally {
    fs.rmSync(scratch, { recursive: true });
  }
});

const skipWithoutSystemd =
  process.env['CI'] === 'true' || spawnSync('systemd-analyze', ['--version']).status === 0
    ? false
    : 'systemd-analyze is not here';

const units = fs.readdirSync(path.join(folder, 'systemd'));

void test('units name commands and flags that exist, and drain before they are killed', async () => {
  const known = await knownFlags();
  assert.equal(units.length, 3);
  for (const unit of units) {
    const text = read(`systemd/${unit}`);
    const line = /^ExecStart=(.*)$/m.exec(text)![1]!;
    const role = assertFlagsExist(line, known);
    assert.equal(unit.replace(/^caravan-|@?\.service$/g, ''), role === 'worker' ? 'rank' : role);
    const drainS = Number(/--drain-timeout (\d+)/.exec(line)![1]);
    assert.ok(drainS < Number(/^TimeoutStopSec=(\d+)$/m.exec(text)![1]), unit);
  }
});

void test(
  'systemd takes the units, and finds little that they could do',
  { skip: skipWithoutSystemd },
  () => {
    for (const unit of units) {
      const file = path.join(folder, 'systemd', unit);
      const verified = spawnSync('systemd-analyze', ['verify', '--man=no', file], {
        encoding: 'utf8',
      });
      const own = verified.stderr.split('\n').filter((line) => line.includes('caravan-'));
      // The command need not lie where the unit expects it on this machine.
      assert.deepEqual(
        own.filter((line) => !line.includes('is not executable')),
        [],
        unit,
      );
      const secured = spawnSync(
        'systemd-analyze',
        ['security', '--offline=true', '--threshold=25', '--no-pager', file],
        { encoding: 'utf8' },
      );
      assert.equal(secured.status, 0, secured.stdout.split('\n').slice(-3).join('\n'));
    }
  },
);

void test('the check of health says what it found', () => {
  const script = path.join(folder, 'healthcheck.mjs');
  const { status, stdout } = spawnSync(process.execPath, [script, 'http://127.0.0.1:1/livez'], {
    encoding: 'utf8',
  });
  assert.equal(status, 1);
  assert.match(stdout, /^http:\/\/127\.0\.0\.1:1\/livez: .+/);
});
