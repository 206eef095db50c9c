/** Old and new engines and gateways on one queue: what one version began another goes on with, or says why it does not. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Queue } from 'bullmq';
import { Redis } from 'ioredis';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import { queueName } from '../coordinator/queue-connection.js';
import type { ModelCard, Request } from '../coordinator/request.js';
import { startGateway } from './gateway.js';
import { Pod } from './pod.js';
import { tinyTokenizer } from './real-engine.js';
import { startRedis } from './redis-server.js';

const limit = { timeout: 120_000 };
const MODEL = 'caravan-tiny';
const TOKENS = 60;
const terms = { priority: 100, deadlineMs: null };
const tokenizer = tinyTokenizer();
const request: Request = {
  version: 1,
  model: MODEL,
  promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
  sampling: { temperature: 0, topP: 1, topK: 0, seed: 1 },
  maxTokens: TOKENS,
  stop: [],
  ignoreEos: true,
  isTextStart: false,
};

const redis = await startRedis();
after(() => redis.stop());
const direct = new Redis(redis.url);
const journal = await Journal.open(redis.url, 'patient');
const queue = new JobQueue(redis.url, MODEL);
after(async () => {
  direct.disconnect();
  journal.close();
  await queue.close();
});
const pod = await Pod.start({ redisUrl: redis.url, tp: 1, maxBatchSize: 4 });
after(() => pod.kill());
await pod.ready;

async function submit(id: string): Promise<void> {
  await journal.create(id, request, terms);
  await queue.submit(id, terms);
}

async function resultOf(id: string): Promise<number[]> {
  const tokenIds: number[] = [];
  for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(60_000))) {
    if (entry.kind === 'tokens') tokenIds.push(...entry.tokenIds);
  }
  assert.equal((await journal.job(id))?.status, 'completed');
  return tokenIds;
}

void test(
  'a job that the first release began is finished, from its next token',
  limit,
  async () => {
    const whole = newJobId();
    await submit(whole);
    const expected = await resultOf(whole);
    assert.equal(expected.length, TOKENS);

    // What version 1 left behind when its engine ended, key by key, before queues had an order of their own.
    const id = newJobId();
    await direct.hset(`caravan:{${id}}:job`, {
      ...{ version: '1', status: 'waiting', model: MODEL, request: JSON.stringify(request) },
      ...{ terms: JSON.stringify(terms), createdMs: String(Date.now()), fence: '1700000000000000' },
      engine: 'old-engine',
    });
    const shown = expected.slice(0, 20);
    const texts = JSON.stringify(shown.map(() => 'x'));
    const fields = ['tokens', shown.join(','), 'texts', texts];
    await direct.xadd(`caravan:{${id}}:journal:0`, '20-0', ...fields);
    const old = new Queue(queueName(MODEL), { connection: { port: redis.port } });
    await old.add('generate', {}, { jobId: id, priority: 100 });
    const result = await resultOf(id);
    await old.close();
    assert.deepEqual(result, expected);
    const [first] = await journal.entries(id, 0, 0);
    assert.ok(
      first?.kind === 'tokens' && first.texts.join('') === 'x'.repeat(20),
      'what was shown stays',
    );
  },
);

void test(
  'a job of a later version is left to a later engine, and holds up nobody',
  limit,
  async () => {
    const [later, own] = [newJobId(), newJobId()];
    await journal.create(later, request, terms);
    await direct.hset(`caravan:{${later}}:job`, 'version', '2');
    await queue.submit(later, terms);
    await assert.rejects(journal.take(later, 'engine'), {
      code: 'protocol_mismatch',
      message: `${later} is of journal version 2, this engine reads up to 1: it is left to a newer one`,
    });
    await submit(own);
    assert.equal((await resultOf(own)).length, TOKENS);
    assert.equal((await journal.job(later))?.status, 'waiting');
    // The engine that reads it has come.
    await direct.hset(`caravan:{${later}}:job`, 'version', '1');
    assert.equal((await resultOf(later)).length, TOKENS);
  },
);

void test('a gateway that is older than a card says so', limit, async () => {
  const gateway = await startGateway();
  after(() => gateway.stop());
  const card = { ...gateway.card, version: 2 } as unknown as ModelCard;
  await gateway.store.publishCard(card);
  const messages = [{ role: 'user', content: 'hello' }];
  const answer = await gateway.post('/v1/chat/completions', { messages });
  assert.equal(answer.status, 500);
  const { error } = (await answer.json()) as { error: { code: string; message: string } };
  const { code, message } = error;
  assert.equal(code, 'protocol_mismatch');
  assert.match(message, /card of caravan-tiny is of version 2, this gateway reads 1: update/);
});
