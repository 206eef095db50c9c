/** What is let into the queue: deadlines that can be met, and no more of anything than its limit. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test, type TestContext } from 'node:test';
import { Redis } from 'ioredis';
import { queueName } from '../coordinator/queue-connection.js';
import { Tenants } from '../coordinator/tenants.js';
import { openRules, startGateway, type TestGateway } from './gateway.js';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-tenants-'));
after(() => {
  fs.rmSync(folder, { recursive: true, force: true });
});

function tenantsOf(content: unknown): Tenants {
  const file = path.join(folder, 'tenants.json');
  fs.writeFileSync(file, typeof content === 'string' ? content : JSON.stringify(content));
  return Tenants.read(file);
}

async function open(
  context: TestContext,
  rules: Partial<typeof openRules> = {},
  tenants = Tenants.open(),
): Promise<TestGateway> {
  const gateway = await startGateway(undefined, {
    intake: { tenants, rules: { ...openRules, ...rules } },
    ...{ maxBodyBytes: 4096, webhookSecret: SECRET, webhookAllow: ['127.0.0.1/32'] },
  });
  context.after(() => gateway.stop());
  return gateway;
}

/** Asks for an answer and leaves as soon as the job is in the queue; its headers. */
async function ask(
  gateway: TestGateway,
  body: object,
  headers: Record<string, string> = {},
): Promise<{ status: number; headers: Headers; error?: { code: string; message: string } }> {
  const response = await fetch(`${gateway.url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json', 'idempotency-key': key(), ...headers },
    body: JSON.stringify({ prompt: 'Once', max_tokens: 100, stream: true, ...body }),
  });
  if (response.ok) {
    await response.body?.cancel();
    return { status: response.status, headers: response.headers };
  }
  const { error } = (await response.json()) as { error: { code: string; message: string } };
  return { status: response.status, headers: response.headers, error };
}

const SECRET = `whsec_${Buffer.from('a secret of this test, 32 bytes.').toString('base64')}`;
let keyCount = 0;
// With a key of its own, a job stays when its client leaves.
const key = (): string => `key-${(keyCount += 1)}`;

/** An engine that is measured at 10 ms a step and 1 ms a row. */
const beat = (gateway: TestGateway): Promise<void> =>
  gateway.store.beat({
    ...{ model: gateway.card.name, engineId: 'one', active: 0, slots: 4, tp: 1 },
    ...{ pace: { stepMs: 10, rowMs: 1, recentStepMs: 12 }, slowness: 1 },
  });

void test('a job is told when it will start and end, and that a deadline cannot be met', async (context) => {
  const gateway = await open(context);
  const unmeasured = await ask(gateway, { deadline: 0.5 });
  assert.equal(unmeasured.status, 200);
  assert.equal(unmeasured.headers.get('x-caravan-end'), null);

  await beat(gateway);
  const first = await open(context);
  await beat(first);
  const startMs = Date.now();
  const usual = await ask(first, {});
  const timeOf = (name: string): number => Date.parse(usual.headers.get(name)!);
  assert.ok(Math.abs(timeOf('x-caravan-start') - startMs) < 1000);
  // 100 steps of 12 ms.
  assert.ok(Math.abs(timeOf('x-caravan-end') - startMs - 1200) < 1000);

  const late = await ask(first, { deadline: 0.3 });
  assert.equal(late.status, 409);
  assert.equal(late.error?.code, 'deadline_unmeetable');
  assert.match(late.error.message, /^deadline: 0\.3 s from now cannot be met .* \d+ s could$/);
  const past = await ask(first, { deadline: '2020-01-31T08:00:00Z' });
  assert.match(
    past.error!.message,
    /^deadline: a time that has passed cannot be met .* \d+ s could$/,
  );
  // The server says what could be met: that is taken, by header, as a time.
  const seconds = Number(/; (\d+) s could/.exec(late.error.message)?.[1]);
  const asTime = new Date(Date.now() + 1000 * (seconds + 1)).toISOString();
  assert.equal((await ask(first, {}, { 'x-caravan-deadline': asTime })).status, 200);
  // Promises add up: of many that each could hold, only as many are made as hold together.
  const answers: number[] = [];
  for (let i = 0; i < 40; i += 1) answers.push((await ask(first, { deadline: 4 })).status);
  const promised = answers.filter((status) => status === 200).length;
  assert.ok(promised > 2 && promised < 15, `${promised} were promised`);
  assert.equal(answers.at(-1), 409);
  // Without a deadline there is always room.
  assert.equal((await ask(first, {})).status, 200);
});

void test('without admission every deadline is taken', async (context) => {
  const gateway = await open(context, { admission: 'off' });
  await beat(gateway);
  const answer = await ask(gateway, { deadline: 0.2 });
  assert.equal(answer.status, 200);
  assert.equal(answer.headers.get('x-caravan-end'), null);
});

void test('terms come from the body or from headers, and wrong ones are refused by name', async (context) => {
  const gateway = await open(context);
  const raw = new Redis(gateway.redis.url);
  context.after(() => {
    raw.disconnect();
  });
  const headers = { 'x-caravan-priority': '7', 'x-caravan-tenant': 'acme' };
  const answer = await ask(gateway, { priority: 50, deadline: 3600 }, headers);
  const id = answer.headers.get('x-caravan-job')!;
  const job = await gateway.journal.job(id);
  assert.equal(job?.terms.priority, 7);
  assert.equal(job.terms.tenant, 'acme');
  assert.ok(Math.abs(job.terms.deadlineMs! - Date.now() - 3_600_000) < 10_000);
  const record = await raw.hget(`caravan:order:${queueName(gateway.card.name)}:waiting`, id);
  assert.equal((JSON.parse(record!) as { tenant: string }).tenant, 'acme');
  for (const [wrong, pattern] of [
    [{ 'x-caravan-priority': '0' }, /^x-caravan-priority: .* got 0$/],
    [{ 'x-caravan-deadline': 'soon' }, /^x-caravan-deadline: .* got soon$/],
    [{ 'x-caravan-tenant': 'a/b' }, /^tenant: .* got "a\/b"$/],
  ] as const) {
    const { status, error } = await ask(gateway, {}, wrong);
    assert.equal(status, 400);
    assert.match(error!.message, pattern);
  }
  assert.match((await ask(gateway, { deadline: 'soon' })).error!.message, /^deadline: must be/);
});

void test('a full queue says so, and when to come again', async (context) => {
  const gateway = await open(context, { maxQueuedJobs: 3, maxQueuedTokens: 400 });
  const jobs = async (): Promise<number> => (await gateway.jobIds()).length;
  for (let i = 0; i < 3; i += 1) assert.equal((await ask(gateway, {})).status, 200);
  const full = await ask(gateway, { webhook: { url: 'http://127.0.0.1:9/' } });
  assert.equal(full.status, 429);
  assert.equal(full.error?.code, 'queue_full');
  assert.match(full.error.message, /^jobs in the queue would be 4, and at most 3 are taken/);
  assert.ok(Number(full.headers.get('retry-after')) >= 1);
  assert.equal(await jobs(), 3);
  // What was refused has left nothing.
  const raw = new Redis(gateway.redis.url);
  context.after(() => {
    raw.disconnect();
  });
  assert.equal((await raw.keys('caravan:{job_*')).length, 3);
  assert.deepEqual(await raw.keys('caravan:{webhooks}*'), []);

  const other = await open(context, { maxQueuedTokens: 300 });
  await beat(other);
  assert.equal((await ask(other, { max_tokens: 200 })).status, 200);
  const heavy = await ask(other, { max_tokens: 200 });
  assert.equal(heavy.error?.code, 'queue_full');
  assert.match(
    heavy.error.message,
    /^tokens in the queue would be 4\d\d, and at most 300 are taken/,
  );
  assert.equal((await ask(other, { max_tokens: 20 })).status, 200);
});

void test('a body over the limit is refused', async (context) => {
  const gateway = await open(context);
  const { status, error } = await ask(gateway, { prompt: 'a '.repeat(3000) });
  assert.equal(status, 413);
  assert.match(error!.message, /4096/);
});

void test('tenants have keys, weights and quotas', async (context) => {
  const tenants = tenantsOf({
    tenants: {
      acme: { weight: 3, keys: ['sk-acme-key'], maxJobs: 2, mostUrgent: 50 },
      slow: { keys: ['sk-slow-key'], requestsPerMinute: 2 },
      small: { keys: ['sk-small-key'], maxQueuedTokens: 150 },
      proxied: { weight: 2 },
    },
  });
  const gateway = await open(context, {}, tenants);
  const as = (apiKey: string) => ({ authorization: `Bearer ${apiKey}` });
  const nobody = await ask(gateway, {});
  assert.deepEqual([nobody.status, nobody.error?.code], [401, 'invalid_api_key']);
  assert.equal((await ask(gateway, {}, as('sk-unknown'))).status, 401);
  assert.equal((await ask(gateway, {}, { 'x-caravan-tenant': 'acme' })).status, 401);
  assert.equal((await fetch(`${gateway.url}/v1/models`)).status, 401);
  assert.equal((await fetch(`${gateway.url}/livez`)).status, 200);
  assert.equal((await ask(gateway, {}, { 'x-caravan-tenant': 'proxied' })).status, 200);

  assert.equal((await ask(gateway, {}, as('sk-acme-key'))).status, 200);
  assert.match(
    (await ask(gateway, { priority: 10 }, as('sk-acme-key'))).error!.message,
    /^priority: tenant acme may ask for 50 and more, got 10$/,
  );
  const last = await ask(gateway, { priority: 50 }, as('sk-acme-key'));
  const { terms } = (await gateway.journal.job(last.headers.get('x-caravan-job')!))!;
  assert.deepEqual([terms.tenant, terms.weight], ['acme', 3]);
  const full = await ask(gateway, {}, as('sk-acme-key'));
  assert.deepEqual([full.status, full.error?.code], [429, 'rate_limited']);
  assert.match(full.error!.message, /^the tenant's jobs would be 3, and at most 2 are taken/);

  const statuses: number[] = [];
  for (let i = 0; i < 5; i += 1) statuses.push((await ask(gateway, {}, as('sk-slow-key'))).status);
  // A minute may have begun between them.
  assert.ok(statuses.filter((status) => status === 200).length <= 4 && statuses.includes(429));
  assert.equal((await ask(gateway, {}, as('sk-small-key'))).status, 200);
  assert.equal((await ask(gateway, {}, as('sk-small-key'))).error?.code, 'rate_limited');
  assert.equal((await ask(gateway, { max_tokens: 5 }, as('sk-small-key'))).status, 200);
});

void test('a wrong file of tenants is refused with what is wrong', () => {
  const refused = (content: unknown, message: RegExp): void => {
    assert.throws(() => tenantsOf(content), { code: 'bad_usage', message });
  };
  refused('{', /tenants\.json: is not valid JSON$/);
  refused({ tenants: { 'a/b': {} } }, /tenants\.a\/b/);
  refused({ tenants: { a: { weight: 0 } } }, /tenants\.a\.weight/);
  refused({ tenants: { a: { wait: 1 } } }, /tenants\.a: .*wait/);
  refused(
    { tenants: { a: { keys: ['sk-12345678'] }, b: { keys: ['sk-12345678'] } } },
    /tenants\.b: a key belongs to another, too$/,
  );
  assert.throws(() => Tenants.read(path.join(folder, 'none.json')), { code: 'bad_usage' });
});

void test('ended jobs are kept as long as was said', async (context) => {
  const gateway = await open(context, { retentionS: 120 });
  const raw = new Redis(gateway.redis.url);
  context.after(() => {
    raw.disconnect();
  });
  const answer = await ask(gateway, {});
  const id = answer.headers.get('x-caravan-job')!;
  const take = await gateway.take(id);
  await gateway.journal.append(take, 0, [1], ['a']);
  const usage = { promptTokens: 2, completionTokens: 1 };
  await gateway.journal.end(take, 1, { status: 'completed', finishReason: 'length', usage }, '');
  for (const suffix of ['job', 'journal:0']) {
    const seconds = await raw.ttl(`caravan:{${id}}:${suffix}`);
    assert.ok(seconds > 60 && seconds <= 120, `${suffix} is kept for ${seconds} s`);
  }
});
