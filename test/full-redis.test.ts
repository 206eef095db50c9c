/**
 * A Redis without memory refuses writes: engines wait, and go on where they stood when there is room again; gateways refuse
 * what is submitted, and say why.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { setImmediate as turn } from 'node:timers/promises';
import { Redis } from 'ioredis';
import { Journal, newJobId } from '../coordinator/journal.js';
import { JobQueue } from '../coordinator/queue.js';
import type { Request } from '../coordinator/request.js';
import { startGatewayProcess } from './gateway-process.js';
import { startEngine, tinyTokenizer, type RealEngine } from './real-engine.js';
import { startRedis } from './redis-server.js';

const TOKENS = 200;
const TIMEOUT_MS = 60_000;
const terms = { priority: 100, deadlineMs: null };

const redis = await startRedis();
after(() => redis.stop());
const raw = new Redis(redis.url);
after(() => {
  raw.disconnect();
});
const fill = () => raw.config('SET', 'maxmemory', '1');
const empty = () => raw.config('SET', 'maxmemory', '0');

/** Waits until Redis has refused more writes than `before`. */
async function refusals(before = -1): Promise<number> {
  const giveUpMs = performance.now() + TIMEOUT_MS;
  for (;;) {
    const count = Number(/errorstat_OOM:count=(\d+)/.exec(await raw.info('errorstats'))?.[1] ?? 0);
    if (count > before) return count;
    assert.ok(performance.now() < giveUpMs, 'nothing was refused');
    await turn();
  }
}

/** What a client is told whose job finds no room. */
async function refused(url: string): Promise<void> {
  const response = await fetch(`${url}/v1/completions`, {
    method: 'POST',
    headers: { 'content-type': 'application/json' },
    body: JSON.stringify({ prompt: 'Once', max_tokens: 4 }),
  });
  assert.equal(response.status, 503);
  const { error } = (await response.json()) as { error: Record<string, string | null> };
  assert.equal(error['code'], 'redis_unavailable');
  assert.equal(error['type'], 'server_error');
  assert.match(error['message']!, /Redis refused: OOM/);
}

/** What the journal and the queue have. */
const jobKeys = async (): Promise<string[]> =>
  (await Promise.all(['caravan:{job_*', 'bull:*:job_*'].map((mask) => raw.keys(mask)))).flat();

void test('an engine waits for room in Redis, at its start and in the middle of a job', async () => {
  await fill();
  const before = await refusals();
  let engine: RealEngine | null = null;
  const starting = startEngine(redis.url, { tp: 1, maxBatchSize: 2 });
  try {
    // The card was refused: the ranks must be free for the next attempt.
    await refusals(before);
    await empty();
    engine = await starting;

    const tokenizer = tinyTokenizer();
    const request: Request = {
      version: 1,
      model: engine.model,
      promptTokenIds: [tokenizer.bosTokenId, ...tokenizer.encode('Once upon a time')],
      sampling: { temperature: 0.8, topP: 1, topK: 0, seed: 3 },
      maxTokens: TOKENS,
      stop: [],
      ignoreEos: true,
      isTextStart: false,
    };
    const journal = await Journal.open(redis.url, 'patient');
    const queue = new JobQueue(redis.url, engine.model);
    const files = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-full-'));
    const gateway = await startGatewayProcess(redis.url, ['--files', files], 256);
    const run = async (isDisturbed: boolean): Promise<number[]> => {
      const id = newJobId();
      await journal.create(id, request, terms);
      await queue.submit(id, terms);
      const tokenIds: number[] = [];
      let isFilled = false;
      for await (const entry of journal.read(id, 0, 0, AbortSignal.timeout(TIMEOUT_MS))) {
        if (entry.kind === 'end') {
          assert.equal(entry.ending.status, 'completed');
          break;
        }
        tokenIds.push(...entry.tokenIds);
        if (!isDisturbed || isFilled || tokenIds.length < 20) continue;
        isFilled = true;
        const count = await refusals();
        await fill();
        await refusals(count);
        const keys = await jobKeys();
        await refused(gateway.url);
        assert.deepEqual(await jobKeys(), keys, 'nothing is left of what was refused');
        await empty();
      }
      return tokenIds;
    };
    try {
      const undisturbed = await run(false);
      assert.equal(undisturbed.length, TOKENS);
      assert.deepEqual(await run(true), undisturbed);
    } finally {
      await gateway.kill();
      await queue.close();
      journal.close();
      fs.rmSync(files, { recursive: true });
    }
  } finally {
    await empty();
    await (engine ?? (await starting.catch(() => null)))?.stop();
  }
});
