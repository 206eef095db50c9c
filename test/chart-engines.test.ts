/** What the chart makes of an engine: who has which device, how much is shared, when it is well, how it ends. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { after, test } from 'node:test';
import { packageRoot } from '../coordinator/package-root.js';
import {
  at,
  containerOf,
  containersOf,
  find,
  podOf,
  podTemplates,
  render,
  renderAll,
  skipWithoutHelm,
  type Container,
  type Manifest,
} from './chart.js';
import { severalModels } from './chart-values.js';
import { freePort } from './redis-server.js';

const skip = skipWithoutHelm;

const model = (fields: object): object => ({ models: [{ name: 'm', ...fields }] });
const only = (fields: object): Manifest[] => render(model(fields));
/** The same for each of these, in one run. */
const each = (...sets: readonly object[]): Manifest[][] => renderAll(sets.map(model));
const NAME = 'llama-engine-m';

/** The value of a container's flag. */
const flag = (container: Container, name: string): string | undefined =>
  container.args.find((arg) => arg.startsWith(`--${name}=`))?.slice(name.length + 3);

const gpus = (container: Container): unknown => container.resources.limits?.['nvidia.com/gpu'];

void test('a rank is a container with one GPU, beside which it sees no other', { skip }, () => {
  const pod = podOf(only({ device: 'cuda', tp: 4 }), 'Deployment', NAME);
  const ranks = pod.spec.initContainers!;
  assert.deepEqual(
    ranks.map(({ name }) => name),
    ['rank-0', 'rank-1', 'rank-2', 'rank-3'],
  );
  for (const [index, rank] of ranks.entries()) {
    assert.equal(gpus(rank), 1);
    assert.equal(flag(rank, 'device'), 'cuda:0');
    assert.equal(flag(rank, 'listen'), `127.0.0.1:${7000 + index}`);
    assert.equal(rank.image, 'caravan-cuda:0.1.0');
    // A sidecar: it starts before the coordinator, and ends after it.
    assert.equal(rank.restartPolicy, 'Always');
  }
  const [coordinator, ...others] = pod.spec.containers;
  assert.deepEqual(others, []);
  assert.equal(gpus(coordinator!), undefined);
  assert.equal(flag(coordinator!, 'device'), 'cuda');
  assert.equal(
    flag(coordinator!, 'ranks'),
    '127.0.0.1:7000,127.0.0.1:7001,127.0.0.1:7002,127.0.0.1:7003',
  );
});

void test(
  'GPU-direct: one container with all GPUs, each process bound to its own',
  { skip },
  () => {
    const values = { device: 'cuda', tp: 4, gpuDirect: true, gpuResource: 'example.com/gpu' };
    const pod = podOf(only(values), 'Deployment', NAME);
    const [ranks, ...others] = pod.spec.initContainers!;
    assert.deepEqual(others, []);
    assert.equal(ranks!.resources.limits!['example.com/gpu'], 4);
    assert.match(ranks!.args[0]!, /for device in 0 1 2 3; do/);
    assert.match(ranks!.args[0]!, /--listen=127\.0\.0\.1:\$\(\(7000 \+ device\)\)/);
    assert.match(ranks!.args[0]!, /--device=cuda:\$device/);
  },
);

void test(
  'GPU-direct: all ranks start, and one that dies or a signal ends all',
  { skip },
  async () => {
    const pod = podOf(only({ device: 'cuda', tp: 2, gpuDirect: true }), 'Deployment', NAME);
    const { command, args } = pod.spec.initContainers![0]!;
    assert.deepEqual(command, ['tini', '--', 'bash', '-c']);
    const first = Math.min(await freePort(), 65_000);
    // No GPU is here, and the ports may be taken.
    const [script, ...rest] = args.map((arg) =>
      arg
        .replace('cuda:$device', 'cpu')
        .replace('7000 + device', `${first} + device`)
        .replace('--health-port=$((7100 + device))', '--health-port=0'),
    );
    const start = async () => {
      const child = spawn('bash', ['-c', script!, ...rest, '--log-level=info'], {
        cwd: packageRoot,
        stdio: ['ignore', 'ignore', 'pipe'],
      });
      after(() => child.kill('SIGKILL'));
      const pids: number[] = [];
      await new Promise<void>((resolve, reject) => {
        child.once('exit', () => {
          reject(new Error('the ranks ended'));
        });
        let log = '';
        child.stderr.setEncoding('utf8').on('data', (text: string) => {
          const lines = (log + text).split('\n');
          log = lines.pop()!;
          for (const line of lines) {
            if (!line.startsWith('{')) continue;
            const { msg, pid } = JSON.parse(line) as { msg: string; pid: number };
            if (msg === 'listening') pids.push(pid);
          }
          if (pids.length === 2) resolve();
        });
      });
      return { child, pids };
    };
    const isAlive = (pid: number): boolean => {
      try {
        return process.kill(pid, 0);
      } catch {
        return false;
      }
    };

    const crashed = await start();
    process.kill(crashed.pids[1]!, 'SIGKILL');
    const [code] = (await once(crashed.child, 'exit')) as [number];
    assert.equal(code, 137, 'the kubelet sees the failure');
    assert.deepEqual(crashed.pids.filter(isAlive), []);

    const ended = await start();
    ended.child.kill('SIGTERM');
    await once(ended.child, 'exit');
    assert.deepEqual(ended.pids.filter(isAlive), []);
  },
);

void test('a group over nodes is a LeaderWorkerSet whose ranks find each other', { skip }, () => {
  const objects = only({ device: 'cuda', tp: 8, nodes: 2, replicas: 3 });
  const set = find(objects, 'LeaderWorkerSet', NAME);
  assert.equal(at(set, 'spec.replicas'), 3);
  assert.equal(at(set, 'spec.leaderWorkerTemplate.size'), 2);
  assert.equal(at(set, 'spec.leaderWorkerTemplate.restartPolicy'), 'None');
  const [leader, worker] = podTemplates([set]);
  assert.equal(leader!.spec.initContainers!.length, 4);
  assert.deepEqual(
    worker!.spec.containers.map(({ name }) => name),
    ['rank-0', 'rank-1', 'rank-2', 'rank-3'],
  );
  for (const rank of [...leader!.spec.initContainers!, ...worker!.spec.containers]) {
    assert.equal(gpus(rank), 1);
    assert.match(flag(rank, 'listen')!, /^0\.0\.0\.0:700[0-3]$/);
  }
  const coordinator = containerOf(leader!, 'coordinator');
  // LeaderWorkerSet names a group's Pods SET-GROUP and SET-GROUP-WORKER, in a headless Service of the set's name.
  assert.deepEqual(flag(coordinator, 'ranks')!.split(','), [
    ...[0, 1, 2, 3].map((i) => `$(POD_NAME).${NAME}.prod.svc.cluster.local:700${i}`),
    ...[0, 1, 2, 3].map((i) => `$(POD_NAME)-1.${NAME}.prod.svc.cluster.local:700${i}`),
  ]);
  // Kubernetes expands what stands before it in the list.
  assert.equal(coordinator.env![0]!.name, 'POD_NAME');
  assert.deepEqual(coordinator.env![0]!.valueFrom, { fieldRef: { fieldPath: 'metadata.name' } });
});

void test('engines know their ordinal where the highest goes first', { skip }, () => {
  const kinds = each({ workload: 'StatefulSet' }, { tp: 4, nodes: 2 }, {});
  for (const [i, [kind, label]] of (
    [
      ['StatefulSet', 'apps.kubernetes.io/pod-index'],
      ['LeaderWorkerSet', 'leaderworkerset.sigs.k8s.io/group-index'],
      ['Deployment', null],
    ] as const
  ).entries()) {
    const { env } = containerOf(podOf(kinds[i]!, kind, NAME), 'coordinator');
    const ordinal = env!.find(({ name }) => name === 'CARAVAN_ORDINAL');
    assert.equal(
      at(ordinal, 'valueFrom.fieldRef.fieldPath'),
      label === null ? undefined : `metadata.labels['${label}']`,
    );
  }
});

void test('weights are kept where values say', { skip }, () => {
  const pod = podOf(
    only({ weightCache: { kind: 'claim', claimName: 'weights' } }),
    'Deployment',
    NAME,
  );
  const { env } = containerOf(pod, 'coordinator');
  assert.equal(env!.find(({ name }) => name === 'CARAVAN_WEIGHT_CACHE')!.value, '/weights');
  const { volumeMounts } = containerOf(pod, 'rank-0');
  assert.ok(volumeMounts!.some((m) => m.name === 'weights' && m.mountPath === '/weights'));
});

void test('all links of a release are mutual TLS, KEDA to the scaler included', { skip }, () => {
  const models = [{ name: 'm', autoscaling: { enabled: true } }];
  const mtls = { secretName: 'links', issuer: { name: 'own-ca' } };
  const objects = render({ models, mtls });
  const gateway = podOf(objects, 'Deployment', 'llama-gateway').spec.containers;
  for (const container of [...containersOf(podOf(objects, 'Deployment', NAME)), ...gateway]) {
    for (const file of ['cert', 'key', 'ca']) {
      const folder = flag(container, `tls-${file}`)!.replace(/\/(tls|ca)\.(crt|key)$/, '');
      assert.ok(container.volumeMounts!.some(({ mountPath }) => mountPath === folder));
    }
    const dialled = container.name === 'gateway' ? undefined : 'caravan';
    assert.equal(flag(container, 'tls-server-name'), dialled);
  }
  const trigger = at(find(objects, 'ScaledObject', NAME), 'spec.triggers.0');
  assert.deepEqual(at(trigger, 'authenticationRef'), { name: 'llama-scaler' });
  find(objects, 'TriggerAuthentication', 'llama-scaler');
  const [host] = String(at(trigger, 'metadata.scalerAddress')).split(':');
  const certificate = find(objects, 'Certificate', 'llama');
  assert.deepEqual(at(certificate, 'spec.dnsNames'), ['caravan', host]);
  assert.equal(at(certificate, 'spec.secretName'), 'links');
});

void test('ranks of a Pod share /dev/shm of the size that values say', { skip }, () => {
  const [single, spread] = each({ shmSize: '3Gi' }, { shmSize: '3Gi', tp: 8, nodes: 2 });
  for (const [objects, kind] of [
    [single, 'Deployment'],
    [spread, 'LeaderWorkerSet'],
  ] as const) {
    for (const pod of podTemplates([find(objects!, kind, NAME)])) {
      const shm = pod.spec.volumes!.find(({ name }) => name === 'shm');
      assert.deepEqual(shm, { name: 'shm', emptyDir: { medium: 'Memory', sizeLimit: '3Gi' } });
      const ranks = containersOf(pod).filter(({ name }) => name.startsWith('rank'));
      assert.ok(ranks.length > 1);
      for (const rank of ranks) {
        assert.ok(
          rank.volumeMounts!.some((m) => m.name === 'shm' && m.mountPath === '/dev/shm'),
          rank.name,
        );
      }
    }
  }
});

void test(
  'probes ask for progress, and weights may load for as long as they move',
  { skip },
  () => {
    const pod = podOf(only({ startupSeconds: 7200, stallSeconds: 33 }), 'Deployment', NAME);
    const coordinator = containerOf(pod, 'coordinator');
    const { startupProbe, livenessProbe, readinessProbe } = coordinator;
    assert.equal(startupProbe!.httpGet!.path, '/startupz');
    assert.ok(startupProbe!.failureThreshold * startupProbe!.periodSeconds >= 7200);
    assert.equal(livenessProbe!.httpGet!.path, '/livez');
    assert.equal(readinessProbe!.httpGet!.path, '/readyz');
    const port = coordinator.ports!.find(({ name }) => name === 'metrics')!.containerPort;
    assert.equal(flag(coordinator, 'metrics-port'), String(port));
    // The kubelet asks from outside the Pod.
    assert.equal(flag(coordinator, 'host'), '0.0.0.0');
    for (const container of containersOf(pod)) {
      assert.equal(flag(container, 'stall-timeout'), '33', container.name);
      const probed = container.livenessProbe!.httpGet!;
      assert.equal(probed.path, '/livez');
      assert.ok(
        container.ports!.some(({ name }) => name === probed.port),
        container.name,
      );
    }
    const rank = containerOf(pod, 'rank-1');
    assert.equal(rank.readinessProbe, undefined, 'nobody sends a rank traffic by a Service');
    assert.equal(flag(rank, 'health-host'), '0.0.0.0');
    assert.equal(flag(rank, 'health-port'), String(rank.ports![0]!.containerPort));
  },
);

void test('an engine drains within its grace period, and its ranks outlast it', { skip }, () => {
  const kinds = [{}, { workload: 'StatefulSet' }, { tp: 4, nodes: 2 }];
  for (const objects of each(
    ...kinds.map((values) => ({ ...values, terminationGracePeriodSeconds: 90 })),
  )) {
    const pods = podTemplates(objects.filter(({ metadata }) => metadata.name === NAME));
    for (const pod of pods) {
      assert.equal(pod.spec.terminationGracePeriodSeconds, 90);
      for (const container of containersOf(pod)) {
        const seconds = Number(flag(container, 'drain-timeout'));
        if (container.name === 'coordinator') assert.ok(seconds < 90 && seconds >= 60);
        else assert.equal(seconds, 90);
      }
    }
  }
});

void test(
  'several models stand side by side, each with what it says and the rest from engine',
  { skip },
  () => {
    const objects = render(severalModels);
    const tiny = find(objects, 'Deployment', 'llama-engine-tiny');
    // false and 0 are values, not absences.
    assert.equal(at(tiny, 'spec.replicas'), 0);
    const args = (kind: string, name: string): readonly string[] =>
      containerOf(podOf(objects, kind, name), 'coordinator').args;
    assert.ok(!args('Deployment', 'llama-engine-tiny').includes('--exact'));
    const seven = args('StatefulSet', 'llama-engine-llama-7b');
    assert.ok(seven.includes('--exact'));
    assert.ok(seven.includes('--model=/models/llama-2-7b'));
    assert.ok(seven.includes('--served-model-name=llama-7b'));
    assert.ok(seven.includes('--log-level=warn'));
    const seventy = args('LeaderWorkerSet', 'llama-engine-llama-70b');
    assert.ok(seventy.includes('--model=/models/meta-llama--Llama-2-70b-chat-hf'));
    const selectors = ['Deployment/llama-engine-tiny', 'StatefulSet/llama-engine-llama-7b'].map(
      (name) =>
        at(find(objects, ...(name.split('/') as [string, string])), 'spec.selector.matchLabels'),
    );
    assert.notDeepEqual(selectors[0], selectors[1], 'one must not take the Pods of the other');
  },
);

void test('a model is pulled once into a cache that ranks only read', { skip }, () => {
  const source = {
    kind: 'pull',
    pull: { model: 'hf:org/name@v1', tokenSecret: { name: 'hub', key: 'token' } },
  };
  const objects = only({ source });
  const pod = podOf(objects, 'Deployment', NAME);
  const [pull, rank] = pod.spec.initContainers!;
  assert.equal(pull!.name, 'pull');
  assert.equal(pull!.restartPolicy, undefined, 'it must end before ranks start');
  assert.deepEqual(pull!.args.slice(1), ['pull', 'hf:org/name@v1', '--to=/models/org--name@v1']);
  assert.deepEqual(pull!.env, [
    { name: 'HF_TOKEN', valueFrom: { secretKeyRef: { name: 'hub', key: 'token' } } },
  ]);
  assert.equal(pull!.volumeMounts![0]!.readOnly, undefined);
  const models = rank!.volumeMounts!.find(({ name }) => name === 'models')!;
  assert.equal(models.readOnly, true);
  assert.equal(flag(containerOf(pod, 'coordinator'), 'model'), '/models/org--name@v1');
  const claim = find(objects, 'PersistentVolumeClaim', `${NAME}-models`);
  assert.equal(claim.metadata.annotations!['helm.sh/resource-policy'], 'keep');
  assert.deepEqual(at(claim, 'spec.accessModes'), ['ReadWriteMany']);
});

void test(
  'KEDA scales what holds the Pods, and asks for the name that requests use',
  { skip },
  () => {
    const targets = [
      [{}, 'apps/v1', 'Deployment'],
      [{ workload: 'StatefulSet' }, 'apps/v1', 'StatefulSet'],
      [{ workload: 'LeaderWorkerSet' }, 'leaderworkerset.x-k8s.io/v1', 'LeaderWorkerSet'],
      [{ tp: 4, nodes: 2 }, 'leaderworkerset.x-k8s.io/v1', 'LeaderWorkerSet'],
    ] as const;
    const sets = targets.map(([fields]) => ({
      ...fields,
      servedModelName: 'meta/llama',
      replicas: 7,
      autoscaling: { enabled: true, minReplicas: 0, maxReplicas: 5, targetSeconds: 12.5 },
    }));
    for (const [i, objects] of each(...sets).entries()) {
      const [, apiVersion, kind] = targets[i]!;
      const scaled = find(objects, 'ScaledObject', NAME);
      assert.deepEqual(at(scaled, 'spec.scaleTargetRef'), { apiVersion, kind, name: NAME });
      assert.equal(at(scaled, 'spec.minReplicaCount'), 0);
      assert.equal(at(scaled, 'spec.maxReplicaCount'), 5);
      assert.deepEqual(at(scaled, 'spec.triggers.0.metadata'), {
        scalerAddress: 'llama-scaler.prod.svc.cluster.local:6000',
        model: 'meta/llama',
        targetSeconds: '12.5',
      });
      // Or every upgrade of the release would undo what KEDA did.
      assert.equal(at(find(objects, kind, NAME), 'spec.replicas'), undefined);
      const service = find(objects, 'Service', 'llama-scaler');
      assert.equal(at(service, 'spec.ports.0.port'), 6000);
    }
  },
);

void test(
  'only engines of Deployments change their Pod, and only coordinators have the token',
  { skip },
  () => {
    const objects = only({ source: { kind: 'claim', claim: { name: 'models' } } });
    const pod = podOf(objects, 'Deployment', NAME);
    assert.equal(pod.spec.serviceAccountName, 'llama-engine');
    const holders = containersOf(pod).filter(({ volumeMounts }) =>
      volumeMounts!.some(({ name }) => name === 'service-account'),
    );
    assert.deepEqual(
      holders.map(({ name }) => name),
      ['coordinator'],
    );
    assert.ok(holders[0]!.args.includes('--pod-deletion-cost'));
    const role = find(objects, 'Role', 'llama-engine') as Manifest & { rules: unknown };
    assert.deepEqual(role.rules, [{ apiGroups: [''], resources: ['pods'], verbs: ['patch'] }]);
    for (const [workload, objects] of [
      ['StatefulSet', only({ workload: 'StatefulSet' })],
      ['Deployment', render({ deletionCost: { enabled: false }, models: [{ name: 'm' }] })],
    ] as const) {
      const { spec } = podOf(objects, workload, NAME);
      assert.equal(spec.serviceAccountName, undefined);
      assert.ok(!spec.containers[0]!.args.includes('--pod-deletion-cost'));
    }
  },
);
