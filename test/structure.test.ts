/** The rules of the house: who may import whom, how long a file may be, which names say nothing. */
import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { test } from 'node:test';
import { packageRoot } from '../coordinator/package-root.js';

const files = execFileSync(
  'git',
  ['ls-files', '--cached', '--others', '--exclude-standard', '*.ts'],
  {
    cwd: packageRoot,
    encoding: 'utf8',
  },
)
  .split('\n')
  .filter((file) => file !== '' && fs.existsSync(path.join(packageRoot, file)));

const read = (file: string): string => fs.readFileSync(path.join(packageRoot, file), 'utf8');

/** What a file imports: its own project's files as paths from the root, packages by name. */
function importsOf(file: string): string[] {
  const specifiers = [...read(file).matchAll(/(?:^|\n)(?:import|export)[^;]*?from '([^']+)'/g)];
  return specifiers.map(([, specifier]) =>
    specifier!.startsWith('.')
      ? path.join(path.dirname(file), specifier!).replace(/\.js$/, '.ts')
      : specifier!,
  );
}

const roomOf = (file: string): string => file.split('/')[0]!;

/** Which rooms a room may import from. */
const allowedRooms: Readonly<Record<string, readonly string[]>> = {
  proto: ['proto'],
  model: ['proto', 'model'],
  worker: ['proto', 'model', 'worker'],
  coordinator: ['proto', 'model', 'coordinator'],
};

/** The one owner of each third-party door. */
const doors: readonly (readonly [packageName: string, owner: RegExp])[] = [
  ['koffi', /^worker\/(ort|shared-memory|mapped-file)/],
  ['onnxruntime-node', /^worker\/ort/],
  ['bullmq', /^coordinator\/queue/],
  ['@bull-board/api', /^coordinator\/queue-board/],
  ['@bull-board/fastify', /^coordinator\/queue-board/],
  ['ioredis', /^coordinator\/(queue|journal|store)/],
  [
    '@grpc/grpc-js',
    /^(proto\/link-security|coordinator\/(ranks|rpc-server)|worker\/(service|lobby|peers|partial-codec))\.ts$/,
  ],
  ['fastify', /^coordinator\/http/],
  ['@fastify/multipart', /^coordinator\/http-files/],
  ['@aws-sdk/client-s3', /^coordinator\/file-bucket/],
  ['undici', /^coordinator\/web\.ts$/],
  ['proxy-from-env', /^coordinator\/web\.ts$/],
  ['prom-client', /^coordinator\/metrics/],
  ['@huggingface/tokenizers', /^model\/tokenizer/],
  ['@huggingface/jinja', /^model\/jinja-template/],
];

void test('there are files to check', () => {
  for (const room of Object.keys(allowedRooms)) {
    assert.ok(files.filter((file) => roomOf(file) === room).length > 1, room);
  }
  assert.deepEqual(importsOf('coordinator/coin.ts'), []);
  assert.ok(importsOf('coordinator/queue.ts').includes('bullmq'));
});

void test('imports go one way between rooms', () => {
  for (const file of files) {
    const allowed = allowedRooms[roomOf(file)];
    if (allowed === undefined) continue;
    for (const target of importsOf(file)) {
      if (target.endsWith('.ts'))
        assert.ok(allowed.includes(roomOf(target)), `${file} → ${target}`);
    }
  }
});

void test('each third-party door has one owner', () => {
  for (const file of files) {
    if (!(roomOf(file) in allowedRooms) || file.startsWith('proto/gen/')) continue;
    for (const target of importsOf(file)) {
      const door = doors.find(([name]) => target === name);
      if (door !== undefined) assert.match(file, door[1], `${file} imports ${target}`);
    }
  }
});

void test('the HTTP front never reaches the engine', () => {
  for (const file of files.filter((name) =>
    /^coordinator\/(http|openai|answers|gateway)/.test(name),
  )) {
    const seen = new Set<string>();
    const visit = (name: string): void => {
      if (seen.has(name)) return;
      seen.add(name);
      for (const target of importsOf(name)) if (target.startsWith('coordinator/')) visit(target);
    };
    visit(file);
    for (const inner of ['engine', 'scheduler', 'ranks', 'job-runner']) {
      assert.ok(!seen.has(`coordinator/${inner}.ts`), `${file} reaches ${inner}`);
    }
  }
});

void test('pure rooms do no I/O', () => {
  const pure = [
    'coordinator/scheduler',
    'coordinator/order',
    'coordinator/admission',
    'coordinator/pace',
    'coordinator/slots',
    'coordinator/prompt-lookup',
    'coordinator/speculation',
    'coordinator/beginnings',
    'coordinator/sampler',
    'coordinator/coin',
    'coordinator/grammar',
    'coordinator/grammar-json',
    'coordinator/grammar-machine',
    'coordinator/json-schema',
    'coordinator/token-masks',
  ];
  for (const name of [
    ...pure,
    'model/plan',
    'model/chat-template',
    'model/jinja-template',
    'model/llama2-chat',
    'model/stop-text',
  ]) {
    for (const target of importsOf(`${name}.ts`)) {
      assert.ok(!target.startsWith('node:'), `${name} imports ${target}`);
    }
  }
});

void test('no file is longer than 400 lines', () => {
  for (const file of files.filter((name) => !name.startsWith('proto/gen/'))) {
    const lines = read(file).split('\n').length - 1;
    assert.ok(lines <= 400, `${file} has ${lines} lines: split it by noun`);
  }
});

void test('no file has a name that says nothing', () => {
  for (const file of files) {
    assert.doesNotMatch(file, /(^|\/)(utils?|helpers?|common|misc|types|interfaces)(\.ts|\/)/);
  }
});

void test('no test is skipped without a reason, narrowed, or sleeps', () => {
  for (const file of files.filter((name) => /^test\/[^/]*\.test\.ts$/.test(name))) {
    if (file === 'test/structure.test.ts') continue;
    assert.doesNotMatch(read(file), /\b(test|it|describe)\.(only|skip|todo)\(/, file);
  }
});
