/** What the chart makes of gateways and Redis, and who may talk to whom. */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { Redis } from 'ioredis';
import {
  at,
  find,
  podOf,
  podTemplates,
  render,
  renderAll,
  skipWithoutHelm,
  type Manifest,
} from './chart.js';
import { severalModels } from './chart-values.js';
import { freePort } from './redis-server.js';

const skip = skipWithoutHelm;

void test('a gateway takes requests until it is out of the Service, then drains', { skip }, () => {
  const objects = render({ gateway: { drainSeconds: 200, preStopSeconds: 7 } });
  const { spec } = podOf(objects, 'Deployment', 'llama-gateway');
  const [gateway] = spec.containers;
  assert.deepEqual(gateway!.lifecycle, { preStop: { sleep: { seconds: 7 } } });
  assert.ok(gateway!.args.includes('--drain-timeout=200'));
  assert.ok(spec.terminationGracePeriodSeconds >= 207);
  assert.equal(gateway!.livenessProbe!.httpGet!.path, '/livez');
  // By itself it fails without engines: at zero engines no job could come, and none would ever start.
  assert.equal(gateway!.readinessProbe!.httpGet!.path, '/health');
});

void test('HTTPS ends at the Ingress, at the gateway, or at both', { skip }, () => {
  const ingress = { enabled: true, host: 'llama.example', tlsSecretName: 'outer' };
  const monitoring = { serviceMonitor: { enabled: true } };
  const [outer, inner] = renderAll([
    { gateway: { ingress }, monitoring },
    { gateway: { https: { secretName: 'own' } }, monitoring },
  ]);
  const spec = find(outer!, 'Ingress', 'llama-gateway').spec;
  assert.deepEqual(at(spec, 'tls'), [{ hosts: ['llama.example'], secretName: 'outer' }]);
  assert.equal(at(spec, 'rules.0.host'), 'llama.example');
  const port = at(spec, 'rules.0.http.paths.0.backend.service');
  assert.deepEqual(port, { name: 'llama-gateway', port: { name: 'http' } });
  for (const [objects, scheme] of [
    [outer!, 'HTTP'],
    [inner!, 'HTTPS'],
  ] as const) {
    const [gateway] = podOf(objects, 'Deployment', 'llama-gateway').spec.containers;
    const { startupProbe, livenessProbe, readinessProbe } = gateway!;
    for (const probe of [startupProbe, livenessProbe, readinessProbe]) {
      assert.equal(at(probe, 'httpGet.scheme'), scheme);
    }
    const monitor = find(objects, 'ServiceMonitor', 'llama-gateway');
    const isHttps = scheme === 'HTTPS';
    assert.equal(at(monitor, 'spec.endpoints.0.scheme'), isHttps ? 'https' : undefined);
    const files = gateway!.args.filter((arg) => arg.startsWith('--https-'));
    const mounted = gateway!.volumeMounts!.find(({ name }) => name === 'https');
    assert.deepEqual(
      files,
      isHttps
        ? ['cert=/etc/caravan/https/tls.crt', 'key=/etc/caravan/https/tls.key'].map(
            (file) => `--https-${file}`,
          )
        : [],
    );
    assert.equal(mounted?.mountPath, isHttps ? '/etc/caravan/https' : undefined);
  }
  const { volumes } = podOf(inner!, 'Deployment', 'llama-gateway').spec;
  const secret = volumes!.find(({ name }) => name === 'https');
  assert.deepEqual(at(secret, 'secret'), { secretName: 'own', defaultMode: 0o440 });
});

void test(
  'API keys are mounted as a folder, from a Secret that is there or one of the chart',
  { skip },
  () => {
    const hash = 'f'.repeat(64);
    for (const [apiKeys, secretName, file] of [
      [{ secretName: 'keys', secretKey: 'list' }, 'keys', 'list'],
      [{ inline: ['acme:sk-0123456789abcdef', `b:sha256:${hash}`] }, 'llama-api-keys', 'keys'],
    ] as const) {
      const objects = render({ gateway: { apiKeys } });
      const { spec } = podOf(objects, 'Deployment', 'llama-gateway');
      const [container] = spec.containers;
      assert.ok(container!.args.includes(`--api-keys=/etc/caravan/api-keys/${file}`));
      const volume = spec.volumes!.find(({ name }) => name === 'api-keys');
      assert.deepEqual(at(volume, 'secret'), { secretName, defaultMode: 0o440 });
      // With a subPath a change of the Secret would never be seen.
      const mount = container!.volumeMounts!.find(({ name }) => name === 'api-keys');
      assert.deepEqual(mount, {
        ...{ name: 'api-keys', mountPath: '/etc/caravan/api-keys', readOnly: true },
      });
      if (!('inline' in apiKeys)) continue;
      const secret = find(objects, 'Secret', secretName);
      assert.deepEqual(at(secret, 'stringData'), { keys: `${apiKeys.inline.join('\n')}\n` });
    }
    const plain = podOf(render({}), 'Deployment', 'llama-gateway').spec.containers[0]!.args;
    assert.ok(plain.every((arg) => !arg.startsWith('--api-keys')));
    const both = { secretName: 'keys', inline: ['acme:sk-0123456789abcdef'] };
    assert.throws(() => render({ gateway: { apiKeys: both } }), /either secretName or inline/);
    assert.throws(() => render({ gateway: { apiKeys: { inline: ['acme sk-0123'] } } }), /inline/);
  },
);

void test(
  'gateways are scaled by CPU and by open streams, spread and kept from going together',
  { skip },
  () => {
    const objects = render({
      gateway: { autoscaling: { enabled: true, minReplicas: 3, inFlightStreams: 150 } },
    });
    const scaler = find(objects, 'HorizontalPodAutoscaler', 'llama-gateway');
    assert.equal(at(scaler, 'spec.minReplicas'), 3);
    assert.equal(at(scaler, 'spec.metrics.0.resource.target.averageUtilization'), 70);
    assert.deepEqual(at(scaler, 'spec.metrics.1.pods'), {
      metric: { name: 'caravan_answers_in_flight' },
      target: { type: 'AverageValue', averageValue: '150' },
    });
    const gateway = find(objects, 'Deployment', 'llama-gateway');
    assert.equal(at(gateway, 'spec.replicas'), undefined);
    assert.equal(
      at(gateway, 'spec.template.spec.topologySpreadConstraints.0.topologyKey'),
      'kubernetes.io/hostname',
    );
    const budget = find(objects, 'PodDisruptionBudget', 'llama-gateway');
    assert.equal(at(budget, 'spec.maxUnavailable'), 1);
    assert.deepEqual(at(budget, 'spec.selector'), at(gateway, 'spec.selector'));
  },
);

void test('Redis of the release keeps jobs, and nothing else may be asked of it', { skip }, () => {
  const objects = render({ redis: { passwordSecret: { name: 'redis', key: 'word' } } });
  const redis = find(objects, 'StatefulSet', 'llama-redis');
  const { args, env } = podOf(objects, 'StatefulSet', 'llama-redis').spec.containers[0]!;
  const option = (name: string): string => args[args.indexOf(`--${name}`) + 1]!;
  assert.equal(option('appendonly'), 'yes');
  assert.equal(option('appendfsync'), 'everysec');
  assert.equal(option('maxmemory-policy'), 'noeviction');
  assert.equal(option('dir'), '/data');
  assert.equal(option('requirepass'), '$(REDISCLI_AUTH)');
  const secretKeyRef = { name: 'redis', key: 'word' };
  assert.deepEqual(env, [{ name: 'REDISCLI_AUTH', valueFrom: { secretKeyRef } }]);
  assert.equal(at(redis, 'spec.volumeClaimTemplates.0.metadata.name'), 'data');
  assert.equal(at(redis, 'spec.persistentVolumeClaimRetentionPolicy.whenDeleted'), 'Retain');
  for (const [kind, name] of [
    ['Deployment', 'llama-gateway'],
    ['Deployment', 'llama-engine-caravan-tiny'],
  ] as const) {
    const variables = podOf(objects, kind, name).spec.containers[0]!.env!;
    const names = variables.map((variable) => variable.name);
    assert.ok(
      names.indexOf('REDIS_PASSWORD') < names.indexOf('CARAVAN_REDIS'),
      'expanded in order',
    );
    const url = variables.find((variable) => variable.name === 'CARAVAN_REDIS')!.value;
    assert.equal(url, 'redis://:$(REDIS_PASSWORD)@llama-redis:6379');
  }
});

void test(
  'a real Redis takes its arguments, keeps jobs, and is not closed to other Pods',
  { skip },
  async () => {
    const { args } = podOf(render({}), 'StatefulSet', 'llama-redis').spec.containers[0]!;
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-redis-'));
    const port = await freePort();
    const own = args.map((arg) => (arg === '/data' ? folder : arg));
    const child = spawn('redis-server', [...own, '--port', String(port)], {
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    const gone = once(child, 'exit');
    try {
      let said = '';
      for await (const chunk of child.stdout.setEncoding('utf8')) {
        said += String(chunk);
        if (said.includes('Ready to accept connections')) break;
      }
      assert.match(said, /Ready to accept connections/);
      const redis = new Redis(port);
      const setting = async (name: string): Promise<unknown> =>
        (await redis.config('GET', name))[1];
      assert.equal(await setting('protected-mode'), 'no');
      assert.equal(await setting('appendonly'), 'yes');
      assert.equal(await setting('maxmemory-policy'), 'noeviction');
      assert.equal(await setting('save'), '');
      redis.disconnect();
    } finally {
      child.kill();
      await gone;
      fs.rmSync(folder, { recursive: true });
    }
  },
);

void test('files of an external Redis are mounted where its URL names them', { skip }, () => {
  const url = 'rediss+sentinel://a:26379/main?ca=/etc/caravan/redis/ca.crt';
  const redis = { enabled: false, external: { url, mountSecret: 'files', ports: [26_379, 6380] } };
  const objects = render({ redis });
  for (const name of ['llama-gateway', 'llama-engine-caravan-tiny']) {
    const { spec } = podOf(objects, 'Deployment', name);
    assert.deepEqual(
      at(
        spec.volumes!.find((volume) => volume.name === 'redis'),
        'secret',
      ),
      {
        secretName: 'files',
        defaultMode: 0o440,
      },
    );
    const [container] = spec.containers;
    assert.ok(container!.volumeMounts!.some((mount) => mount.mountPath === '/etc/caravan/redis'));
    assert.equal(container!.env!.find((variable) => variable.name === 'CARAVAN_REDIS')!.value, url);
    const egress = at(find(objects, 'NetworkPolicy', name), 'spec.egress.1.ports');
    assert.deepEqual(egress, [
      { port: 26_379, protocol: 'TCP' },
      { port: 6380, protocol: 'TCP' },
    ]);
    const rank = (spec.initContainers ?? []).flatMap(({ volumeMounts }) => volumeMounts ?? []);
    assert.ok(rank.every((mount) => mount.name !== 'redis'));
  }
  assert.ok(objects.every(({ kind }) => kind !== 'StatefulSet'));
});

/** Whether Pods with these labels are the ones that a selector means. */
const selects = (matchLabels: unknown, labels: Readonly<Record<string, string>>): boolean =>
  Object.entries(matchLabels as Record<string, string>).every(
    ([key, value]) => labels[key] === value,
  );

void test(
  'Services, monitors, budgets and policies select the Pods that they are for',
  { skip },
  () => {
    const objects = render({
      ...severalModels,
      monitoring: { serviceMonitor: { enabled: true } },
    });
    const pods = podTemplates(objects);
    const services = objects.filter(({ kind }) => kind === 'Service');
    for (const { metadata, spec } of services) {
      const chosen = pods.filter((pod) => selects(at(spec, 'selector'), pod.metadata.labels));
      assert.ok(chosen.length > 0, metadata.name);
      for (const port of (at(spec, 'ports') as { targetPort: string }[] | undefined) ?? []) {
        for (const pod of chosen) {
          const names = pod.spec.containers.flatMap(({ ports }) => ports?.map((p) => p.name) ?? []);
          assert.ok(names.includes(port.targetPort), `${metadata.name}: ${port.targetPort}`);
        }
      }
    }
    for (const { metadata, spec } of objects.filter(({ kind }) => kind === 'ServiceMonitor')) {
      const chosen = services.filter(({ metadata: { labels } }) =>
        selects(at(spec, 'selector.matchLabels'), labels),
      );
      const port = at(spec, 'endpoints.0.port');
      const scraped = chosen.filter(({ spec: s }) =>
        (at(s, 'ports') as { name: string }[] | undefined)?.some(({ name }) => name === port),
      );
      assert.equal(scraped.length, 1, `${metadata.name} scrapes each Pod once`);
    }
    for (const kind of ['PodDisruptionBudget', 'NetworkPolicy']) {
      const key = kind === 'NetworkPolicy' ? 'podSelector' : 'selector';
      for (const { metadata, spec } of objects.filter((object) => object.kind === kind)) {
        const matchLabels = at(spec, `${key}.matchLabels`);
        assert.ok(
          pods.some((pod) => selects(matchLabels, pod.metadata.labels)),
          `${kind}/${metadata.name}`,
        );
      }
    }
  },
);

/** Ports that Pods of one kind may be reached on by others, by NetworkPolicies: `FROM → PORT`. */
function ingressOf(objects: readonly Manifest[], name: string): unknown {
  return at(find(objects, 'NetworkPolicy', name), 'spec.ingress');
}

void test('only those talk to each other that must', { skip }, () => {
  const objects = render({
    models: [{ name: 'one' }, { name: 'wide', tp: 8, nodes: 2, workload: 'LeaderWorkerSet' }],
  });
  const pods = podTemplates(objects);
  const policies = objects.filter(({ kind }) => kind === 'NetworkPolicy');
  for (const pod of pods) {
    const closed = policies.filter(({ spec }) =>
      selects(at(spec, 'podSelector.matchLabels'), pod.metadata.labels),
    );
    assert.equal(closed.length, 1);
    assert.deepEqual(at(closed[0], 'spec.policyTypes'), ['Ingress', 'Egress']);
  }
  const keda = ingressOf(objects, 'llama-gateway') as unknown[];
  assert.deepEqual(at(keda, '1.ports.0.port'), 'scaler');
  assert.deepEqual(at(keda, '1.from.0.namespaceSelector.matchLabels'), {
    'kubernetes.io/metadata.name': 'keda',
  });
  const [closed] = renderAll([
    { networkPolicy: { monitoringFrom: [], kedaFrom: [] }, models: [{ name: 'one' }] },
  ]);
  // An empty list of peers would be everybody.
  assert.equal((ingressOf(closed!, 'llama-gateway') as unknown[]).length, 1);
  assert.equal(ingressOf(closed!, 'llama-engine-one'), undefined);
  // Ranks of one Pod are on its loopback interface: nobody else comes in but for metrics.
  const single = ingressOf(objects, 'llama-engine-one') as unknown[];
  assert.equal(single.length, 1);
  assert.equal(at(single, '0.ports.0.port'), 'metrics');
  const wide = ingressOf(objects, 'llama-engine-wide') as unknown[];
  assert.deepEqual(at(wide, '1.ports.0'), { port: 7000, endPort: 7003, protocol: 'TCP' });
  const labels = podTemplates([find(objects, 'LeaderWorkerSet', 'llama-engine-wide')])[1]!.metadata
    .labels;
  assert.ok(selects(at(wide, '1.from.0.podSelector.matchLabels'), labels));
  const redis = ingressOf(objects, 'llama-redis') as unknown[];
  const mayAsk = (at(redis, '0.from') as unknown[]).map((peer) =>
    at(peer, 'podSelector.matchLabels'),
  );
  for (const pod of pods) {
    const isRedis = pod.metadata.labels['app.kubernetes.io/component'] === 'redis';
    const may = mayAsk.some((matchLabels) => selects(matchLabels, pod.metadata.labels));
    assert.equal(may, !isRedis);
  }
  assert.deepEqual(at(find(objects, 'NetworkPolicy', 'llama-redis'), 'spec.egress'), undefined);
});

void test('a hub is reached by those alone that pull', { skip }, () => {
  const objects = render({
    deletionCost: { enabled: false },
    models: [{ name: 'one' }, { name: 'two', source: { kind: 'pull', pull: { model: 'hf:a/b' } } }],
  });
  const reaches443 = (name: string): boolean =>
    JSON.stringify(at(find(objects, 'NetworkPolicy', name), 'spec.egress')).includes('443');
  assert.equal(reaches443('llama-engine-one'), false);
  assert.equal(reaches443('llama-engine-two'), true);
});
