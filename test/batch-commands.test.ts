/** `caravan batch` as a user runs it, against a gateway that keeps its files in a bucket, and a real engine. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { openStorage } from '../coordinator/file-place.js';
import type { Batch } from 'caravan/client';
import { startBatchWorld } from './batch-world.js';
import { runCli, runCliJson } from './cli.js';
import { s3Credentials, startS3 } from './s3-server.js';

const s3 = await startS3();
after(() => s3.stop());
Object.assign(process.env, s3Credentials);
const world = await startBatchWorld(
  await openStorage(`s3://nights?endpoint=${encodeURIComponent(s3.endpoint)}`),
);
after(() => world.stop());
const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-batch-commands-'));
after(() => {
  fs.rmSync(scratch, { recursive: true, force: true });
});
const url = ['--url', world.url];

function input(name: string, lines: readonly string[]): string {
  const file = path.join(scratch, name);
  fs.writeFileSync(file, `${lines.join('\n')}\n`);
  return file;
}

const line = (customId: string, body: Readonly<Record<string, unknown>>): string =>
  JSON.stringify({
    ...{ custom_id: customId, method: 'POST', url: '/v1/completions' },
    body: { model: 'caravan-tiny', prompt: 'The llama', max_tokens: 2, ...body },
  });

const idsOf = (text: string): string[] =>
  text
    .trim()
    .split('\n')
    .map((each) => (JSON.parse(each) as { custom_id: string }).custom_id)
    .sort();

void test('a file is submitted, its batch waited for, and its results fetched', async () => {
  const file = input('good.jsonl', [line('a', {}), line('b', { temperature: 9 }), line('c', {})]);
  const submitted = await runCli(['batch', 'submit', file, ...url]);
  assert.equal(submitted.code, 0, submitted.stderr);
  assert.match(submitted.stderr, /^upload .*100 %/m);
  const id = submitted.stdout.trim();
  const errors = path.join(scratch, 'errors.jsonl');
  const results = await runCli(['batch', 'results', id, '--errors', errors, ...url]);
  assert.equal(results.code, 0, results.stderr);
  assert.deepEqual(idsOf(results.stdout), ['a', 'c']);
  assert.deepEqual(idsOf(fs.readFileSync(errors, 'utf8')), ['b']);
  assert.match(results.stderr, new RegExp(`^${id} .*100 % +3 of 3`, 'm'));

  const output = path.join(scratch, 'output.jsonl');
  const saved = await runCli(['batch', 'results', id, '--output', output, ...url]);
  assert.equal(saved.stdout, '');
  assert.match(saved.stderr, /1 requests failed; --errors FILE/);
  assert.equal(fs.readFileSync(output, 'utf8'), results.stdout);
  assert.deepEqual(
    fs.readdirSync(scratch).filter((name) => name.endsWith('.partial')),
    [],
  );

  const status = await runCli(['batch', 'status', id, ...url]);
  assert.match(status.stdout, new RegExp(`^${id}  completed  3 of 3 done, 1 failed  created 20`));
  const view = (await runCliJson(['batch', 'status', id, '--watch', ...url])) as Batch;
  assert.deepEqual(view.request_counts, { total: 3, completed: 2, failed: 1 });
  const stored = s3.objects.get(`nights/files/${view.output_file_id!}`);
  assert.equal(stored?.toString(), results.stdout);
  const listed = (await runCliJson(['batch', 'list', '--limit', '1', ...url])) as Batch[];
  assert.equal(listed[0]!.id, id);
});

void test('a batch that does not complete says why, and what is done can be fetched', async () => {
  const bad = input('bad.jsonl', [line('a', {}), line('a', {})]);
  const failed = await runCli(['batch', 'submit', bad, '--wait', ...url]);
  assert.equal(failed.code, 1);
  assert.match(failed.stderr, /^caravan: batch \w+ ended as failed: line 2: custom_id: .*\n$/m);
  const told = await runCli(['batch', 'status', failed.stdout.trim(), ...url]);
  assert.match(told.stdout, /^ {2}line 2: custom_id: .* \(duplicate_custom_id\)$/m);

  const slow = Array.from({ length: 40 }, (_, i) =>
    line(`s${i}`, { max_tokens: 450, ignore_eos: true }),
  );
  const file = input('slow.jsonl', [line('quick', {}), ...slow]);
  const created = (await runCliJson(['batch', 'submit', file, ...url])) as Batch;
  await world.until(created.id, ({ request_counts }) => request_counts!.completed > 0);
  const cancelled = await runCli(['batch', 'cancel', created.id, ...url]);
  assert.equal(cancelled.code, 0, cancelled.stderr);
  const results = await runCli(['batch', 'results', created.id, ...url]);
  assert.equal(results.code, 1);
  assert.match(results.stderr, /^caravan: batch \w+ ended as cancelled\n/m);
  assert.ok(idsOf(results.stdout).includes('quick'));
});

void test('bad news is one line and an exit code', async () => {
  const cases: [string[], number, RegExp][] = [
    [['status', 'batch_none', ...url], 1, /^caravan: batch batch_none does not exist\n$/],
    [['submit', path.join(scratch, 'none'), ...url], 2, /^caravan: .*none: cannot be read\n$/],
    [['submit', input('plain.txt', ['hello']), ...url], 2, /line 1 is not valid JSON\n$/],
    [['submit', input('x.jsonl', [line('a', {})]), '--window', 'soon', ...url], 1, /window: must/],
    [['list', '--url', 'http://127.0.0.1:1'], 1, /^caravan: the gateway at .* cannot be reached/],
    [['list', '--url', 'ftp://x'], 2, /^caravan: --url must be an http/],
  ];
  for (const [args, code, words] of cases) {
    const run = await runCli(['batch', ...args]);
    assert.equal(run.code, code, `${args.join(' ')}: ${run.stderr}`);
    const lines = run.stderr.split('\n').filter((each) => !each.startsWith('upload '));
    assert.match(lines.join('\n'), words);
    assert.equal(lines.length, 2, run.stderr);
  }
  const bare = await runCli(['batch']);
  assert.equal(bare.code, 2);
  assert.match(bare.stderr, /^Usage: caravan batch .*^caravan: a command is needed/ms);
});
