/** submit, jobs, result and cancel, as a user runs them; the test writes the journal as an engine would. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { runCli, runCliJson } from './cli.js';
import { startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const { journal } = gateway;
const redis = ['--redis', gateway.redis.url];

const submit = async (...args: string[]): Promise<string> =>
  ((await runCliJson(['submit', ...redis, ...args])) as { id: string }).id;

void test('a job is submitted with its terms, listed, and its result awaited', async () => {
  const id = await submit(
    ...['--prompt', 'The llama', '--max-tokens', '7', '--temperature', '0', '--seed', '3'],
    ...['--priority', '5', '--deadline', '60'],
  );
  const job = await journal.job(id);
  assert.equal(job?.status, 'waiting');
  assert.equal(job.terms.priority, 5);
  assert.ok(Math.abs(job.terms.deadlineMs! - Date.now() - 60_000) < 30_000);
  assert.equal(job.request.maxTokens, 7);
  assert.deepEqual(job.request.sampling, { temperature: 0, topP: 0.9, topK: 0, seed: 3 });

  const { stdout } = await runCli(['jobs', ...redis]);
  assert.match(stdout, new RegExp(`^${id}  waiting .*priority 5$`, 'm'));

  const result = runCliJson(['result', id, ...redis]);
  const take = await gateway.take(id);
  await journal.append(take, 0, [300, 301], [' wal', 'ked']);
  const usage = { promptTokens: 4, completionTokens: 2 };
  await journal.end(take, 2, { status: 'completed', finishReason: 'stop', usage }, ' on');
  assert.deepEqual(await result, {
    id,
    status: 'completed',
    text: ' walked on',
    finishReason: 'stop',
    usage: {
      ...{ prompt_tokens: 4, completion_tokens: 2, total_tokens: 6 },
      prompt_tokens_details: { cached_tokens: 0 },
    },
  });
});

void test('a cancelled job has no result, and says so', async () => {
  const id = await submit('--prompt', 'a');
  const cancelled = await runCli(['cancel', id, ...redis]);
  assert.equal(cancelled.code, 0);
  assert.equal(cancelled.stdout, `${id}: cancelled\n`);
  const result = await runCli(['result', id, ...redis, '--json']);
  assert.equal(result.code, 1);
  assert.equal((JSON.parse(result.stdout) as { status: string }).status, 'cancelled');
  assert.equal(result.stderr, 'caravan: the job was cancelled\n');
  assert.ok(!(await gateway.jobIds()).includes(id));
});

void test('bad news is one line and an exit code', async () => {
  const unknown = await runCli(['result', 'job_none', ...redis]);
  assert.equal(unknown.code, 1);
  assert.match(unknown.stderr, /^caravan: job job_none is not known.*\n$/);
  const model = await runCli(['submit', '--model', 'nobody', '--prompt', 'a', ...redis]);
  assert.equal(model.code, 1);
  assert.match(model.stderr, /^caravan: .*nobody does not exist; models: caravan-tiny\n$/);
  const dead = await runCli(['jobs', '--redis', 'redis://127.0.0.1:1']);
  assert.equal(dead.code, 1);
  assert.match(dead.stderr, /^caravan: Redis at redis:\/\/127\.0\.0\.1:1 cannot be reached: .*\n$/);
});
