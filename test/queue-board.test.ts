/** Bull Board sees the jobs of a real queue in every state, and can change none of them. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { Job, Queue, Worker } from 'bullmq';
import { queueName } from '../coordinator/queue-connection.js';
import { startGateway } from './gateway.js';

const gateway = await startGateway();
after(() => gateway.stop());
const name = queueName('caravan-tiny');
const connection = { host: '127.0.0.1', port: gateway.redis.port };

interface Board {
  readonly queues: readonly {
    readonly name: string;
    readonly displayName: string;
    readonly readOnlyMode: boolean;
    readonly counts: Readonly<Record<string, number>>;
    readonly jobs: readonly { readonly id: string }[];
  }[];
}

const board = async (status: string): Promise<Board['queues'][0]> => {
  const query = `activeQueue=${name}&status=${status}&page=1&jobsPerPage=50`;
  const response = await fetch(`${gateway.url}/queues/api/queues?${query}`);
  assert.equal(response.status, 200);
  return ((await response.json()) as Board).queues.find((queue) => queue.name === name)!;
};

void test('the board shows jobs in every state', async () => {
  const queue = new Queue(name, { connection });
  const worker = new Worker(name, null, { connection, autorun: false });
  try {
    const submit = async (): Promise<string> => {
      const body = { prompt: 'a', stream: true };
      const headers = {
        'content-type': 'application/json',
        'idempotency-key': String(Math.random()),
      };
      const response = await fetch(`${gateway.url}/v1/completions`, {
        ...{ method: 'POST', headers, body: JSON.stringify(body) },
      });
      await response.body!.cancel();
      return response.headers.get('x-caravan-job')!;
    };
    const ids = [await submit(), await submit(), await submit(), await submit(), await submit()];
    const take = async (): Promise<Job> => await worker.getNextJob('token', { block: false });
    const [active, completed, failed, delayed] = [
      await take(),
      await take(),
      await take(),
      await take(),
    ];
    await completed.moveToCompleted({}, 'token', false);
    await failed.moveToFailed(new Error('see the journal'), 'token', false);
    await delayed.moveToDelayed(Date.now() + 60_000, 'token');
    const waiting = ids.find(
      (id) => ![active, completed, failed, delayed].some((job) => job.id === id),
    );

    for (const [status, id] of [
      ['prioritized', waiting],
      ['active', active.id],
      ['completed', completed.id],
      ['failed', failed.id],
      ['delayed', delayed.id],
    ] as const) {
      const shown = await board(status);
      assert.equal(shown.displayName, 'caravan-tiny');
      assert.equal(shown.readOnlyMode, true);
      assert.deepEqual(
        shown.jobs.map((job) => job.id),
        [id],
        status,
      );
      assert.equal(shown.counts[status], 1);
    }
    const page = await fetch(`${gateway.url}/queues/`);
    assert.match(await page.text(), /<title>.*Caravan/s);

    const removal = `${gateway.url}/queues/api/queues/${name}/${waiting!}/clean`;
    assert.equal((await fetch(removal, { method: 'PUT' })).status, 405);
    const retry = `${gateway.url}/queues/api/queues/${name}/${failed.id!}/retry/failed`;
    assert.ok((await fetch(retry, { method: 'PUT' })).status >= 400);
    assert.equal((await queue.getJob(waiting!))?.id, waiting);
    assert.equal(await failed.getState(), 'failed');
  } finally {
    await worker.close(true);
    await queue.close();
  }
});

void test('the description of the API leaves the board out', async () => {
  const { paths } = (await (await fetch(`${gateway.url}/openapi.json`)).json()) as {
    paths: Readonly<Record<string, unknown>>;
  };
  assert.ok('/v1/completions' in paths);
  assert.deepEqual(
    Object.keys(paths).filter((path) => path.startsWith('/queues')),
    [],
  );
});
