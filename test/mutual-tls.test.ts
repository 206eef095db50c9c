/** Links between processes under mutual TLS: who has no valid certificate of the cluster's authority is refused, in one line. */
import assert from 'node:assert/strict';
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import { after, test } from 'node:test';
import fs from 'node:fs';
import { credentials, Metadata, status } from '@grpc/grpc-js';
import { planGroup } from '../coordinator/group-spec.js';
import { workerEntry } from '../coordinator/package-root.js';
import { Ranks } from '../coordinator/ranks.js';
import { ScalerServer } from '../coordinator/scaler.js';
import { WorkMeter } from '../coordinator/work.js';
import { embeddedModelPath, openCheckpoint } from '../model/checkpoint.js';
import { ExternalScalerClient } from '../proto/gen/externalscaler.js';
import { JobsClient } from '../proto/gen/jobs.js';
import { linkSecurity, type LinkSecurity } from '../proto/link-security.js';
import { Authority, type Leaf } from './certificates.js';
import { cleanEnvironment } from './environment.js';
import { startGateway } from './gateway.js';

const limit = { timeout: 90_000 };
const authority = new Authority();
const stranger = new Authority();
after(() => {
  authority.remove();
  stranger.remove();
});
const leafOf = ({ certPath, keyPath }: Leaf, ca = authority): LinkSecurity => ({
  ...{ certPath, keyPath, caPath: ca.caPath },
});
const own = leafOf(authority.leaf('coordinator'));

const children: ChildProcess[] = [];
after(() => {
  for (const child of children) child.kill('SIGKILL');
});
async function startRank(
  security: LinkSecurity | null,
  env: NodeJS.ProcessEnv = {},
): Promise<string> {
  const tls =
    security === null
      ? []
      : [
          '--tls-cert',
          security.certPath,
          '--tls-key',
          security.keyPath,
          '--tls-ca',
          security.caPath,
        ];
  const child = fork(workerEntry, ['--listen', '127.0.0.1:0', '--log-level', 'silent', ...tls], {
    env: { ...cleanEnvironment, ...env },
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  });
  children.push(child);
  const [{ address }] = (await once(child, 'message')) as [{ address: string }];
  return address;
}

async function connect(
  addresses: readonly string[],
  security: LinkSecurity | null,
): Promise<Ranks> {
  const { spec } = planGroup(openCheckpoint(embeddedModelPath()), addresses.length, {
    ...{ weights: 'fp32', exact: true, maxSeqLen: 64, maxBatchSize: 1, maxStepRows: 32 },
    transport: 'grpc',
  });
  return Ranks.connect(addresses, spec, { security, connectTimeoutMs: 1500 });
}

async function refusal(
  addresses: readonly string[],
  security: LinkSecurity | null,
): Promise<string> {
  try {
    (await connect(addresses, security)).close();
  } catch (error) {
    return (error as Error).message;
  }
  throw new Error('it was not refused');
}

void test(
  'coordinator and ranks, and ranks among themselves, speak over mutual TLS',
  limit,
  async () => {
    const addresses = await Promise.all(
      ['rank-0', 'rank-1'].map((name) => startRank(leafOf(authority.leaf(name)))),
    );
    const ranks = await connect(addresses, own);
    const step = {
      number: 1,
      joins: [{ slot: 0, temperature: 0 }],
      decodeSlots: [],
      decodeTokens: [],
    };
    const chunks = [{ slot: 0, tokens: [1, 5, 9], sampledRows: 1, targets: [] }];
    const results = await ranks.forward({ ...step, chunks, topK: 1, masking: undefined } as never);
    assert.equal(results.length, 2);
    ranks.close();
  },
);

void test(
  'ranks take their certificates from the variables that coordinators take theirs from',
  limit,
  async () => {
    const variables = ({ certPath, keyPath }: Leaf, more: NodeJS.ProcessEnv = {}) => ({
      ...{ CARAVAN_TLS_CERT: certPath, CARAVAN_TLS_KEY: keyPath, CARAVAN_TLS_CA: own.caPath },
      ...more,
    });
    // Of the two the second knows its peers by one name, as all Pods of a release do.
    const names = [{}, { CARAVAN_TLS_SERVER_NAME: 'localhost' }];
    const addresses = await Promise.all(
      names.map((more, i) => startRank(null, variables(authority.leaf(`rank-${i}`), more))),
    );
    (await connect(addresses, own)).close();
    assert.match(await refusal(addresses, null), /it asks for TLS, and --tls-cert is not given$/);
    // A flag wins, and a variable that is set to nothing says nothing.
    const stray = variables(stranger.leaf('stray'), { CARAVAN_TLS_SERVER_NAME: '' });
    const flagged = await startRank(leafOf(authority.leaf('flagged')), stray);
    (await connect([flagged], own)).close();
  },
);

void test(
  'a coordinator with another, an expired or no certificate is refused, and says why',
  limit,
  async () => {
    const address = await startRank(leafOf(authority.leaf('rank')));
    const prefix = new RegExp(`^rank 0 at ${address}: not reached within 1500 ms: `);
    for (const [security, reason] of [
      [leafOf(stranger.leaf('intruder')), /it refuses our certificate/],
      [leafOf(authority.leaf('late', -1)), /it refuses our certificate|expired/],
      [leafOf(authority.leaf('misled'), stranger), /its certificate is of another authority$/],
      [null, /it asks for TLS, and --tls-cert is not given$/],
    ] as const) {
      const known =
        security !== null &&
        security.caPath === stranger.caPath &&
        reason.source.includes('refuses')
          ? { ...security, caPath: authority.caPath }
          : security;
      const message = await refusal([address], known);
      assert.match(message, prefix);
      assert.match(message, reason);
    }
  },
);

void test(
  'a rank with an expired certificate, of another name, or without TLS is refused, and named',
  limit,
  async () => {
    const expired = await startRank(leafOf(authority.leaf('old', -1)));
    assert.match(await refusal([expired], own), /its certificate has expired$/);
    const plain = await startRank(null);
    assert.match(await refusal([plain], own), /it speaks no TLS/);
    const fine = await startRank(leafOf(authority.leaf('named')));
    const elsewhere = { ...own, serverName: 'other.example' };
    assert.match(await refusal([fine], elsewhere), /its certificate does not name it/);
    const named = await connect([fine], { ...own, serverName: 'localhost' });
    named.close();
  },
);

void test('the scaler lets in only who has a certificate', limit, async () => {
  const work = new WorkMeter(
    { count: () => Promise.resolve({ jobs: 1, tokens: 1, oldestWaitingMs: 0 }) },
    {
      card: () => Promise.resolve(null),
      engines: () => Promise.resolve([]),
      loadingEngines: () => Promise.resolve([]),
      rememberedSpeeds: () => Promise.resolve([]),
    },
  );
  const scaler = new ScalerServer(work, leafOf(authority.leaf('gateway')));
  after(() => {
    scaler.close();
  });
  const address = `127.0.0.1:${await scaler.listen('127.0.0.1', 0)}`;
  const ask = (channel: ReturnType<typeof credentials.createSsl>): Promise<boolean> => {
    const client = new ExternalScalerClient(address, channel);
    const ref = { name: 'a', namespace: 'b', scalerMetadata: { model: 'm' } };
    return new Promise<boolean>((resolve, reject) => {
      client.isActive(ref, { deadline: Date.now() + 5_000 } as never, (error, answer) => {
        if (error === null) resolve(answer.result);
        else reject(error);
      });
    }).finally(() => {
      client.close();
    });
  };
  const { certPath, keyPath } = authority.leaf('keda');
  const [ca, key, cert] = [authority.caPath, keyPath, certPath].map((file) =>
    fs.readFileSync(file),
  );
  assert.equal(await ask(credentials.createSsl(ca, key, cert)), true);
  await assert.rejects(ask(credentials.createSsl(ca)));
  await assert.rejects(ask(credentials.createInsecure()));
});

void test('jobs over gRPC are served only to who has a certificate', limit, async () => {
  const gateway = await startGateway(undefined, { security: leafOf(authority.leaf('gateway')) });
  const address = `127.0.0.1:${gateway.grpcPort}`;
  const submit = (channel: ReturnType<typeof credentials.createSsl>): Promise<string> => {
    const client = new JobsClient(address, channel);
    const prompt = { $case: 'text', text: 'A' } as const;
    const deadline = { deadline: Date.now() + 20_000 };
    return new Promise<string>((resolve, reject) => {
      client.submit({ prompt, stop: [] }, new Metadata(), deadline, (error, job) => {
        if (error === null) resolve(job.status);
        else reject(error);
      });
    }).finally(() => {
      client.close();
    });
  };
  const bytesOf = ({ certPath, keyPath }: Leaf) =>
    [keyPath, certPath].map((file) => fs.readFileSync(file)) as [Buffer, Buffer];
  const ca = fs.readFileSync(authority.caPath);
  try {
    const [key, cert] = bytesOf(authority.leaf('caller'));
    assert.equal(await submit(credentials.createSsl(ca, key, cert)), 'waiting');
    const unreached = { code: status.UNAVAILABLE };
    await assert.rejects(submit(credentials.createSsl(ca)), unreached);
    await assert.rejects(submit(credentials.createInsecure()), unreached);
    const [strangersKey, strangersCert] = bytesOf(stranger.leaf('intruder'));
    const intruder = credentials.createSsl(ca, strangersKey, strangersCert);
    await assert.rejects(submit(intruder), unreached);
    assert.equal((await gateway.jobIds()).length, 1);
  } finally {
    await gateway.stop();
  }
});

void test('certificates that are not whole are refused at start, by flag', () => {
  const { certPath, keyPath, caPath } = own;
  assert.equal(linkSecurity({}), null);
  assert.throws(
    () => linkSecurity({ tlsCert: certPath }),
    /--tls-cert, --tls-key and --tls-ca belong/,
  );
  const missing = { tlsCert: certPath, tlsKey: '/nowhere', tlsCa: caPath };
  assert.throws(() => linkSecurity(missing), /--tls-key \/nowhere: cannot be read/);
  const mixed = { tlsCert: certPath, tlsKey: authority.leaf('mixed').keyPath, tlsCa: caPath };
  assert.throws(() => linkSecurity(mixed), /--tls-cert .*: .*key values mismatch/);
  assert.ok(linkSecurity({ tlsCert: certPath, tlsKey: keyPath, tlsCa: caPath }));
});
