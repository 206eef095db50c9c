/** API keys: who has none is refused as OpenAI refuses, and tenants see nothing of each other, over HTTP and gRPC. */
import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { credentials, Metadata, status, type ServiceError } from '@grpc/grpc-js';
import OpenAI, { AuthenticationError, NotFoundError } from 'openai';
import { ApiKeys } from '../coordinator/api-keys.js';
import { Tenants } from '../coordinator/tenants.js';
import { JobsClient, type Job, type StreamEvent } from '../proto/gen/jobs.js';
import { runCli } from './cli.js';
import { openRules, startGateway } from './gateway.js';
import { startEngine } from './real-engine.js';

const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-keys-'));
const fileOf = (name: string, content: string): string => {
  const file = path.join(folder, name);
  fs.writeFileSync(file, content);
  return file;
};
const digestOf = (key: string): string => createHash('sha256').update(key).digest('hex');

const keys = { acme: 'sk-acme-0123456789', other: 'sk-other-0123456789', small: 'sk-small-012345' };
const file = fileOf(
  'keys',
  `# of the test\n\nacme:${keys.acme}\r\n other : sha256:${digestOf(keys.other)}\nsmall:${keys.small}1\n`,
);
const quotas = fileOf(
  'tenants.json',
  JSON.stringify({ tenants: { acme: { weight: 3 }, small: { maxJobs: 1 } }, default: {} }),
);
const intake = { tenants: Tenants.read(quotas, ApiKeys.read(file)), rules: openRules };
const gateway = await startGateway(undefined, { intake, operators: ['acme'] });
const engine = await startEngine(gateway.redis.url, { tp: 1, maxBatchSize: 2 });
const rpc = new JobsClient(`127.0.0.1:${gateway.grpcPort}`, credentials.createInsecure());
after(async () => {
  rpc.close();
  await engine.stop();
  await gateway.stop();
  fs.rmSync(folder, { recursive: true, force: true });
});

const bearer = (key: string) => ({ authorization: `Bearer ${key}` });
const clientOf = (apiKey: string): OpenAI =>
  new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey, maxRetries: 0 });
const acme = clientOf(keys.acme);
const other = clientOf(keys.other);
const messages = [{ role: 'user' as const, content: 'Hello' }];
const model = 'caravan-tiny';

void test('the official client gets its answer with a key, and an AuthenticationError without', async () => {
  const chat = await acme.chat.completions.create({
    ...{ model, messages, max_completion_tokens: 2 },
  });
  assert.equal(chat.usage!.completion_tokens, 2);
  const hashed = await other.completions.create({ model, prompt: 'A', max_tokens: 1 });
  assert.equal(hashed.usage!.completion_tokens, 1);
  for (const key of ['sk-unknown-0123456789', digestOf(keys.other), `${keys.acme}x`]) {
    await assert.rejects(
      clientOf(key).chat.completions.create({ model, messages, stream: true }),
      (error: unknown) => {
        assert.ok(error instanceof AuthenticationError);
        assert.equal(error.status, 401);
        assert.deepEqual(
          [error.code, error.type, error.param],
          ['invalid_api_key', 'invalid_request_error', null],
        );
        return true;
      },
    );
  }
});

void test('every route of the API needs a key, however its path is written; health and metrics do not', async () => {
  const description = (await (await fetch(`${gateway.url}/openapi.json`)).json()) as {
    paths: Record<string, Record<string, unknown>>;
  };
  const open = ['/', '/health', '/livez', '/readyz', '/metrics', '/openapi.json'];
  let refused = 0;
  for (const [route, methods] of Object.entries(description.paths)) {
    for (const method of Object.keys(methods)) {
      const response = await fetch(`${gateway.url}${route}`, { method: method.toUpperCase() });
      const isOpen = open.includes(route);
      assert.equal(response.status, isOpen ? 200 : 401, `${method} ${route}`);
      const text = await response.text();
      if (isOpen) continue;
      refused += 1;
      assert.match(response.headers.get('www-authenticate')!, /^Bearer /);
      assert.deepEqual(JSON.parse(text), {
        error: {
          message: 'an API key is needed: Authorization: Bearer KEY',
          ...{ type: 'invalid_request_error', param: null, code: 'invalid_api_key' },
        },
      });
    }
  }
  assert.ok(refused > 15, `${refused} routes`);
  for (const route of ['/%76%31/models', '/v1/%6dodels', '/%74okenize']) {
    const method = route.endsWith('models') ? 'GET' : 'POST';
    const response = await fetch(`${gateway.url}${route}`, { method });
    assert.ok([401, 404].includes(response.status), `${route}: ${response.status}`);
  }
  // Nobody is a tenant by its name alone, not even one that has no key now, or the default one.
  for (const name of ['acme', 'default', 'unheard-of']) {
    const headers = { 'x-caravan-tenant': name };
    assert.equal((await fetch(`${gateway.url}/v1/models`, { headers })).status, 401);
  }
});

void test('Bull Board takes the key of an operator as the password of a browser', async () => {
  const look = (authorization?: string): Promise<Response> =>
    fetch(`${gateway.url}/queues/api/queues`, authorization ? { headers: { authorization } } : {});
  const nobody = await look();
  assert.equal(nobody.status, 401);
  assert.match(nobody.headers.get('www-authenticate')!, /^Basic /);
  const basic = (password: string) => `Basic ${Buffer.from(`me:${password}`).toString('base64')}`;
  assert.equal((await look(basic('sk-unknown-0123456789'))).status, 401);
  assert.equal((await look(basic(keys.acme))).status, 200);
  assert.equal((await look(`Bearer ${keys.acme}`)).status, 200);
  // It shows what others have.
  const stranger = await look(basic(keys.other));
  assert.equal(stranger.status, 401);
  assert.match(await stranger.text(), /--operators/);
});

void test('jobs, responses, files and batches of another tenant are not known', async () => {
  const response = await acme.responses.create({ model, input: 'Hello', max_output_tokens: 2 });
  const isUnknown = (error: unknown): boolean => error instanceof NotFoundError;
  await assert.rejects(other.responses.retrieve(response.id), isUnknown);
  await assert.rejects(other.responses.delete(response.id), isUnknown);
  const next = { model, input: 'And?', max_output_tokens: 2, previous_response_id: response.id };
  await assert.rejects(other.responses.create(next), (error: unknown) => {
    assert.ok(error instanceof NotFoundError);
    return error.param === 'previous_response_id';
  });
  assert.equal((await acme.responses.create(next)).status, 'incomplete');

  const body = JSON.stringify({ model, prompt: 'A', max_tokens: 1 });
  const init = { method: 'POST', body, headers: bearer(keys.acme) };
  const job = (await fetch(`${gateway.url}/v1/completions`, init)).headers.get('x-caravan-job')!;
  for (const [method, route] of [
    ['GET', `/v1/jobs/${job}`],
    ['GET', `/v1/jobs/${job}/events`],
    ['POST', `/v1/jobs/${job}/cancel`],
  ] as const) {
    const ask = async (key: string): Promise<number> => {
      const answer = await fetch(`${gateway.url}${route}`, { method, headers: bearer(key) });
      await answer.text();
      return answer.status;
    };
    assert.deepEqual([await ask(keys.other), await ask(keys.acme)], [404, 200], route);
  }

  const line = {
    custom_id: 'a',
    method: 'POST',
    url: '/v1/completions',
    body: { model, prompt: 'A' },
  };
  const upload = await acme.files.create({
    file: new File([JSON.stringify(line)], 'lines.jsonl'),
    purpose: 'batch',
  });
  const order = { endpoint: '/v1/completions', completion_window: '24h' } as const;
  await assert.rejects(other.files.retrieve(upload.id), isUnknown);
  await assert.rejects(other.files.content(upload.id), isUnknown);
  await assert.rejects(other.files.delete(upload.id), isUnknown);
  await assert.rejects(other.batches.create({ ...order, input_file_id: upload.id }), {
    status: 400,
    param: 'input_file_id',
  });
  const batch = await acme.batches.create({ ...order, input_file_id: upload.id });
  await assert.rejects(other.batches.retrieve(batch.id), isUnknown);
  await assert.rejects(other.batches.cancel(batch.id), isUnknown);
  const idsOf = async (client: OpenAI): Promise<string[]> => [
    ...(await client.files.list()).data.map(({ id }) => id),
    ...(await client.batches.list()).data.map(({ id }) => id),
  ];
  assert.deepEqual(await idsOf(other), []);
  assert.ok((await idsOf(acme)).includes(batch.id));
});

void test('calls over gRPC have the tenant of their key, with its quotas', async () => {
  const answered = <A>(call: (reply: (error: ServiceError | null, answer: A) => void) => unknown) =>
    new Promise<A>((resolve, reject) => {
      call((error, answer) => {
        if (error === null) resolve(answer);
        else reject(error);
      });
    });
  const metadataOf = (fields: Readonly<Record<string, string>>): Metadata => {
    const metadata = new Metadata();
    for (const [name, value] of Object.entries(fields)) metadata.set(name, value);
    return metadata;
  };
  const submit = (metadata: Metadata, maxTokens = 2): Promise<Job> => {
    const prompt = { $case: 'text', text: 'A' } as const;
    const request = { prompt, maxTokens, ignoreEos: true, stop: [] };
    return answered((reply) => rpc.submit(request, metadata, reply));
  };
  const isStatus = (code: number, caravanCode: string) => (thrown: unknown) => {
    const { code: own, metadata, message } = thrown as ServiceError;
    assert.deepEqual([own, metadata.get('caravan-code')[0]], [code, caravanCode], message);
    return true;
  };
  const unauthenticated = isStatus(status.UNAUTHENTICATED, 'invalid_api_key');
  for (const fields of [{}, bearer('sk-unknown-0123456789'), { 'x-caravan-tenant': 'acme' }]) {
    await assert.rejects(submit(metadataOf(fields)), unauthenticated);
  }
  const [mine, others] = [metadataOf(bearer(keys.acme)), metadataOf(bearer(keys.other))];
  const { id } = await submit(mine);
  const { terms } = (await gateway.journal.job(id))!;
  assert.deepEqual([terms.tenant, terms.weight], ['acme', 3]);
  const unknown = isStatus(status.NOT_FOUND, 'not_found');
  const read = async (metadata?: Metadata): Promise<number> => {
    let events = 0;
    const call = rpc.stream({ jobId: id, offsets: [] }, metadata ?? new Metadata());
    for await (const event of call as AsyncIterable<StreamEvent>) {
      if (event.event !== undefined) events += 1;
    }
    return events;
  };
  assert.ok((await read(mine)) > 1);
  await assert.rejects(read(others), unknown);
  await assert.rejects(read(), unauthenticated);
  await assert.rejects(
    answered((reply) => rpc.get({ jobId: id }, others, reply)),
    unknown,
  );
  await assert.rejects(
    answered((reply) => rpc.cancel({ jobId: id }, others, reply)),
    unknown,
  );
  // One at a time, whichever way they come.
  const small = metadataOf(bearer(`${keys.small}1`));
  const long = await submit(small, 480);
  await assert.rejects(submit(small), (thrown: unknown) => {
    assert.match(String((thrown as ServiceError).metadata.get('caravan-retry-after')[0]), /^\d+$/);
    return isStatus(status.RESOURCE_EXHAUSTED, 'rate_limited')(thrown);
  });
  await answered((reply) => rpc.cancel({ jobId: long.id }, small, reply));
});

void test('a changed file counts at once, as Kubernetes swaps it, and a wrong one leaves the keys that were', async () => {
  const mounted = path.join(folder, 'mounted');
  fs.mkdirSync(mounted);
  const link = path.join(mounted, '..data');
  const swap = (version: string, content: string | null): void => {
    fs.mkdirSync(path.join(mounted, version));
    if (content !== null) fs.writeFileSync(path.join(mounted, version, 'keys'), content);
    fs.symlinkSync(version, `${link}_tmp`);
    fs.renameSync(`${link}_tmp`, link);
  };
  swap('v1', `acme:${keys.acme}\n`);
  fs.symlinkSync(path.join('..data', 'keys'), path.join(mounted, 'keys'));
  const apiKeys = ApiKeys.read(path.join(mounted, 'keys'));
  let onRead = (): void => undefined;
  const warnings: string[] = [];
  const log = {
    info: () => undefined,
    warn: (_fields: object, message: string) => warnings.push(message),
  };
  apiKeys.watch(
    log,
    () => {
      onRead();
    },
    20,
  );
  // The watcher does not keep a process.
  const alive = setInterval(() => undefined, 1000);
  const read = (): Promise<void> => new Promise((resolve) => (onRead = resolve));
  try {
    const holders = () => [apiKeys.tenantOf(keys.acme), apiKeys.tenantOf(keys.other)];
    assert.deepEqual(holders(), ['acme', undefined]);
    const changes: readonly (readonly [string | null, (string | undefined)[], RegExp | null])[] = [
      [`acme:${keys.acme}\nother:${keys.other}\n`, ['acme', 'other'], null],
      [`other:${keys.other}\n`, [undefined, 'other'], null],
      [`acme ${keys.acme}\n`, [undefined, 'other'], /line 1: must be TENANT:KEY/],
      ['# none\n', [undefined, 'other'], /has no keys/],
      [null, [undefined, 'other'], /cannot be read/],
      [`acme:${keys.acme}\n`, ['acme', undefined], null],
    ];
    let version = 2;
    for (const [content, expected, warning] of changes) {
      const change = read();
      swap(`v${(version += 1)}`, content);
      await change;
      assert.deepEqual(holders(), expected);
      if (warning === null) assert.equal(warnings.length, 0);
      else assert.match(warnings.shift()!, warning);
    }
  } finally {
    clearInterval(alive);
    apiKeys.close();
  }
});

void test('a wrong file is refused with its line and rule, and no key is repeated', async () => {
  const secret = 'sk-secret-0123456789';
  for (const [content, message] of [
    ['', /has no keys$/],
    [`#\n${secret}`, /line 2: must be TENANT:KEY$/],
    [`a b:${secret}`, /line 1: the tenant must be/],
    [`a:${secret.slice(0, 15)}`, /line 1: the key must have 16 to 512/],
    [`a:${secret} ${secret}`, /line 1: the key must have/],
    [`a:${secret}é`, /line 1: the key must have/],
    [`a:sha256:${secret}`, /line 1: sha256: must be followed by 64 hex digits$/],
    [`a:${secret}\nb:sha256:${digestOf(secret)}`, /line 2: the key of b belongs to a, too$/],
    [`a:${secret}\n`.repeat(60_000), /is over 1000000 bytes$/],
  ] as const) {
    assert.throws(
      () => ApiKeys.read(fileOf('wrong', content)),
      (thrown: unknown) => {
        const { code, message: said } = thrown as Error & { code: string };
        assert.equal(code, 'bad_usage');
        assert.match(said, message);
        assert.doesNotMatch(said, /secret/);
        return true;
      },
    );
  }
  const none = path.join(folder, 'none');
  for (const command of [['gateway', '--redis', gateway.redis.url], ['up']]) {
    const { code, stderr } = await runCli([...command, '--port', '0', '--api-keys', none]);
    assert.equal(code, 2);
    assert.match(stderr, /^caravan: --api-keys \S+none: cannot be read\n$/m);
  }
});
