/** Which engines live is known without going through the keys of all jobs. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Redis } from 'ioredis';
import { Store, type EngineBeat } from '../coordinator/store.js';
import { startRedis } from './redis-server.js';

const redis = await startRedis();
after(() => redis.stop());
const raw = new Redis(redis.url);
after(() => {
  raw.disconnect();
});

const beatOf = (engineId: string): EngineBeat => ({
  ...{ model: 'm', engineId, active: 0, slots: 1, tp: 1 },
});
const keyOf = (engineId: string): string => `caravan:engine:{m}:${engineId}`;
const idsOf = async (store: Store): Promise<string[]> =>
  (await store.engines()).map(({ engineId }) => engineId).sort();
const scans = async (): Promise<number> =>
  Number(/^cmdstat_scan:calls=(\d+)/m.exec(await raw.info('commandstats'))?.[1] ?? 0);

void test('engines are listed while they beat; those that retire or fall silent are not', async () => {
  const store = await Store.open(redis.url, 'impatient');
  assert.deepEqual(await idsOf(store), []);
  const before = await scans();
  await store.beat(beatOf('one'));
  await store.beat(beatOf('two'));
  await store.beat(beatOf('three'));
  assert.deepEqual(await idsOf(store), ['one', 'three', 'two']);
  await store.retire('m', 'two');
  assert.deepEqual(await idsOf(store), ['one', 'three']);
  // One that died: its key has run out, and so has its place in the set.
  await raw.del(keyOf('three'));
  await raw.zadd('caravan:engines', 1, keyOf('three'));
  assert.deepEqual(await idsOf(store), ['one']);
  await store.beat(beatOf('one'));
  assert.deepEqual(await raw.zrange('caravan:engines', 0, '-1'), [keyOf('one')]);
  await store.retire('m', 'one');
  assert.equal(await scans(), before);
  store.close();
});

void test('an engine of a release that kept no set is listed for as long as it beats', async () => {
  await raw.set(keyOf('earlier'), JSON.stringify(beatOf('earlier')));
  const store = await Store.open(redis.url, 'impatient');
  await store.beat(beatOf('later'));
  assert.deepEqual(await idsOf(store), ['earlier', 'later']);
  assert.deepEqual(await idsOf(store), ['earlier', 'later']);
  await raw.del(keyOf('earlier'));
  assert.deepEqual(await idsOf(store), ['later']);
  store.close();
});
