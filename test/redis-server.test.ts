import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Store } from '../coordinator/store.js';
import { startRedis } from './redis-server.js';

void test('a private Redis keeps what it was told over an orderly restart', async () => {
  const redis = await startRedis();
  try {
    const firstPid = redis.pid;
    const store = await Store.open(redis.url, 'impatient');
    const health = await store.health();
    assert.equal(health.maxmemoryPolicy, 'noeviction');
    assert.ok(health.isAppendOnly);
    await store.beat({ model: 'm', engineId: 'e', active: 0, slots: 1, tp: 1 });
    store.close();
    // SIGTERM syncs the file; what a SIGKILL may lose is the last second.
    await redis.kill('SIGTERM');
    await redis.restart();
    assert.notEqual(redis.pid, firstPid);
    const again = await Store.open(redis.url, 'impatient');
    assert.deepEqual(
      (await again.engines()).map(({ engineId }) => engineId),
      ['e'],
    );
    again.close();
  } finally {
    await redis.stop();
    await redis.stop();
  }
});
