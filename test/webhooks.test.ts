/**
 * Ends of jobs and batches are told: signed, again and again until the receiver takes it, by whichever gateway lives. The
 * receivers are real servers of this test, which also writes the jobs' journals as an engine would.
 */
import assert from 'node:assert/strict';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { after, test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { CaravanError } from '../proto/errors.js';
import { WebhookPolicy } from '../coordinator/webhook-target.js';
import { runCliJson } from './cli.js';
import { startGateway } from './gateway.js';
import { startGatewayProcess, type GatewayProcess } from './gateway-process.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const SECRET = `whsec_${Buffer.from('a secret of this test, 32 bytes.').toString('base64')}`;
const HEAP_MEGABYTES = 128;
const PATIENCE_MS = 60_000;

const world = await startGateway();
after(() => world.stop());
const args = ['--webhook-secret', SECRET, '--webhook-allow', '127.0.0.1/32'];
const start = (): Promise<GatewayProcess> =>
  startGatewayProcess(world.redis.url, args, HEAP_MEGABYTES);
let gateway = await start();
after(() => gateway.kill('SIGTERM'));

interface Post {
  readonly path: string;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: string;
}

/** What the receiver does with a post: a status, or nothing at all. */
type Answer = { readonly status: number; readonly location?: string } | 'silence';

/** Answers posts to a path as told, in turn; the last answer stays. */
class Receiver {
  readonly posts: Post[] = [];
  readonly #answers = new Map<string, Answer[]>();
  readonly #waiting = new Set<() => void>();
  readonly #server = http.createServer((request, response) => {
    let body = '';
    request.setEncoding('utf8').on('data', (text: string) => (body += text));
    request.on('end', () => {
      const path = request.url!;
      this.posts.push({ path, headers: request.headers as Record<string, string>, body });
      const answers = this.#answers.get(path) ?? [{ status: 204 }];
      const answer = answers.length > 1 ? answers.shift()! : answers[0]!;
      if (answer !== 'silence') {
        const { status, location } = answer;
        response.writeHead(status, location === undefined ? {} : { location }).end();
      }
      for (const check of [...this.#waiting]) check();
    });
  });

  async listen(): Promise<void> {
    await new Promise<void>((resolve) => this.#server.listen(0, '127.0.0.1', resolve));
  }

  url(path: string, ...answers: Answer[]): string {
    if (answers.length > 0) this.#answers.set(path, answers);
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}${path}`;
  }

  of(path: string): Post[] {
    return this.posts.filter((post) => post.path === path);
  }

  /** Returns when a path has had so many posts. */
  async has(path: string, count: number): Promise<Post[]> {
    await new Promise<void>((resolve, reject) => {
      const timer = setTimeout(() => {
        reject(new Error(`${path} has ${this.of(path).length} posts, not ${count}`));
      }, PATIENCE_MS);
      const check = (): void => {
        if (this.of(path).length < count) return;
        clearTimeout(timer);
        this.#waiting.delete(check);
        resolve();
      };
      this.#waiting.add(check);
      check();
    });
    return this.of(path);
  }

  close(): void {
    this.#server.closeAllConnections();
    this.#server.close();
  }
}

const receiver = new Receiver();
await receiver.listen();
after(() => {
  receiver.close();
});

const client = (): OpenAI =>
  new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey: 'none', maxRetries: 0 });

const ask = (url: string, body: object = {}, to = gateway.url): Promise<Response> =>
  fetch(`${to}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt: [1, 5], max_tokens: 2, webhook: { url }, ...body }),
  });

async function complete(id: string): Promise<void> {
  const take = await world.take(id);
  await world.journal.append(take, 0, [300, 301], ['a', 'b']);
  const usage = { promptTokens: 2, completionTokens: 2 };
  await world.journal.end(take, 2, { status: 'completed', finishReason: 'length', usage }, '');
}

interface Event {
  readonly id: string;
  readonly type: string;
  readonly data: {
    readonly id: string;
    readonly status: string;
    readonly usage?: { readonly total_tokens: number };
  };
}

/** As a user of OpenAI's client checks a webhook. @throws for a wrong signature. */
const verified = async ({ body, headers }: Post): Promise<Event> =>
  (await client().webhooks.unwrap(body, headers, SECRET)) as unknown as Event;

void test('a job that ends is told once the receiver takes it, signed, under one id', async () => {
  const url = receiver.url('/recovers', { status: 500 }, { status: 204 });
  const response = await ask(url);
  assert.equal(response.status, 202);
  const { id, status } = (await response.json()) as { id: string; status: string };
  assert.equal(status, 'waiting');
  assert.equal(response.headers.get('x-caravan-job'), id);
  await complete(id);
  const [first, second] = await receiver.has('/recovers', 2);
  assert.equal(first!.body, second!.body);
  assert.equal(first!.headers['webhook-id'], second!.headers['webhook-id']);
  const event = await verified(second!);
  assert.equal(event.id, second!.headers['webhook-id']);
  assert.equal(event.type, 'job.completed');
  assert.equal(event.data.id, id);
  assert.equal(event.data.usage?.total_tokens, 4);
  await assert.rejects(verified({ ...second!, body: second!.body.replace('completed', 'failed') }));
});

void test('a redirect is not followed, and a receiver that takes it hears no more', async () => {
  const url = receiver.url('/moved', { status: 302, location: '/elsewhere' }, { status: 200 });
  const { id } = (await (await ask(url)).json()) as { id: string };
  await world.journal.requestCancel(id);
  const [, second] = await receiver.has('/moved', 2);
  assert.equal((await verified(second!)).type, 'job.cancelled');
  assert.equal(receiver.of('/elsewhere').length, 0);
  assert.equal(receiver.of('/recovers').length, 2);
});

void test('jobs of the command line and streams are told too', async () => {
  const submit = ['submit', '--redis', world.redis.url, '--prompt', 'a', '--webhook'];
  const { id } = (await runCliJson([...submit, receiver.url('/cli')])) as { id: string };
  await complete(id);
  const [post] = await receiver.has('/cli', 1);
  assert.equal((await verified(post!)).data.id, id);

  const stream = await ask(receiver.url('/stream'), { stream: true });
  await complete(stream.headers.get('x-caravan-job')!);
  assert.match(await stream.text(), /\[DONE\]/);
  await receiver.has('/stream', 1);
});

void test('a batch that ends is told', async () => {
  const line = { custom_id: 'a', method: 'POST', url: '/v1/completions', body: { temperature: 9 } };
  const file = await toFile(Buffer.from(JSON.stringify(line)), 'a.jsonl');
  const { id: fileId } = await client().files.create({ file, purpose: 'batch' });
  const order = { endpoint: '/v1/completions', completion_window: '24h' } as const;
  const webhook = { url: receiver.url('/batch') };
  const { id } = await client().batches.create({
    ...{ input_file_id: fileId, ...order },
    ...{ webhook },
  });
  const [post] = await receiver.has('/batch', 1);
  const event = await verified(post!);
  assert.equal(event.type, 'batch.completed');
  assert.equal(event.data.id, id);
});

void test('what an operator has not allowed is refused', async () => {
  const param = async (response: Response): Promise<string | null> => {
    assert.equal(response.status, 400);
    return ((await response.json()) as { error: { param: string | null } }).error.param;
  };
  for (const url of [
    'http://example.com/',
    'https://10.1.2.3/',
    'https://[::1]/',
    'https://[::ffff:a01:203]/',
    'https://2130706434/',
    'https://user:word@example.com/',
    'ftp://example.com/',
    'nonsense',
  ]) {
    assert.equal(await param(await ask(url)), 'webhook.url', url);
  }
  assert.equal(await param(await ask('https://example.com/', {}, world.url)), 'webhook');

  // A name is looked at when the connection is made.
  const lookup = (policy: WebhookPolicy): Promise<string> =>
    new Promise((resolve, reject) => {
      policy.lookup(new URL('https://localhost/'))('localhost', {}, (error, address) => {
        if (error === null) resolve(address as string);
        else reject(error);
      });
    });
  await assert.rejects(lookup(new WebhookPolicy([])), /of the public internet/);
  assert.match(await lookup(new WebhookPolicy(['localhost'])), /^(127\.0\.0\.1|::1)$/);
  assert.match(await lookup(new WebhookPolicy(['127.0.0.0/8', '::1'])), /^(127\.0\.0\.1|::1)$/);
  assert.equal(new WebhookPolicy([]).check('https://example.com/x').host, 'example.com');
  for (const entry of ['10.0.0.0/33', 'a b', '1.2.3.4/8/8', '']) {
    assert.throws(() => new WebhookPolicy([entry]), RangeError, entry);
  }
  assert.throws(() => new WebhookPolicy([]).check(`https://a/${'x'.repeat(3000)}`), CaravanError);
});

const inLongForm = { timeout: 120_000, skip: isLong ? false : 'in the long form' };

void test(
  'a receiver that hangs is asked again, also when the sender was killed meanwhile',
  inLongForm,
  async () => {
    const { id } = (await (
      await ask(receiver.url('/hangs', 'silence', 'silence', { status: 200 }))
    ).json()) as { id: string };
    await complete(id);
    // The first hangs until its time is over; in the second the sender dies.
    await receiver.has('/hangs', 2);
    const dying = gateway;
    gateway = await start();
    await dying.kill();
    const posts = await receiver.has('/hangs', 3);
    assert.equal(new Set(posts.map(({ headers }) => headers['webhook-id'])).size, 1);
    assert.equal((await verified(posts[2]!)).data.id, id);
  },
);
