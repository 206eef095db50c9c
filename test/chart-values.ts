/** Value sets for the chart: every switch on and off, several models, every kind of group and of source. */

/** A switch or a choice of the values, by its path, and what else must be said with it. */
interface Variant {
  readonly title: string;
  readonly values: object;
}

const model = (fields: object): object => ({ models: [{ name: 'm', ...fields }] });

const switches: readonly Variant[] = [
  { title: 'as it comes', values: {} },
  { title: 'no models', values: { models: [] } },
  { title: 'no own Redis', values: external({ url: 'redis://redis.example:6379' }) },
  {
    title: 'Redis whose URL is secret',
    values: external({ urlSecret: { name: 'redis' }, ports: [6380, 26379] }),
  },
  {
    title: 'Redis by Sentinels over TLS',
    values: {
      redis: {
        enabled: false,
        external: {
          url: 'rediss+sentinel://a:26379,b:26379/main?ca=/etc/caravan/redis/ca.crt',
          mountSecret: 'redis-files',
          ports: [6379, 26379],
        },
      },
      gateway: { files: { kind: 's3', url: 's3://bucket' } },
    },
  },
  {
    title: 'Redis with a password, on a class of storage',
    values: {
      redis: {
        passwordSecret: { name: 'redis' },
        appendFsync: 'always',
        storage: { className: 'fast', keepOnDelete: false },
        nodeSelector: { disk: 'nvme' },
        priorityClassName: 'high',
        image: { digest: `sha256:${'a'.repeat(64)}` },
      },
    },
  },
  { title: 'gateways on a claim', values: files({ kind: 'claim', claimName: 'files' }) },
  {
    title: 'gateways on a bucket',
    values: files({ kind: 's3', url: 's3://bucket/files?region=eu', secretName: 's3' }),
  },
  {
    title: 'gateways with API keys of a Secret',
    values: { gateway: { apiKeys: { secretName: 'keys' } } },
  },
  {
    title: 'gateways with API keys of the values',
    values: { gateway: { apiKeys: { inline: ['acme:sk-0123456789abcdef'] } } },
  },
  {
    title: 'gateways scaled by CPU',
    values: { gateway: { autoscaling: { enabled: true } } },
  },
  {
    title: 'gateways scaled by streams, too',
    values: { gateway: { autoscaling: { enabled: true, inFlightStreams: 200 } } },
  },
  {
    title: 'gateways with an Ingress, without budget and spread',
    values: {
      gateway: {
        ingress: { enabled: true, host: 'llama.example', tlsSecretName: 'tls', className: 'nginx' },
        disruptionBudget: { enabled: false },
        topologySpread: { keys: [] },
        service: { type: 'LoadBalancer', port: 80, annotations: { a: 'b' } },
        env: [{ name: 'NODE_OPTIONS', value: '--max-old-space-size=512' }],
        extraArgs: ['--max-batches=5'],
      },
    },
  },
  {
    title: 'no network policies, no deletion cost',
    values: { networkPolicy: { enabled: false }, deletionCost: { enabled: false } },
  },
  {
    title: 'narrow network policies, own Pod only',
    values: {
      networkPolicy: {
        gatewayFrom: [{ podSelector: { matchLabels: { app: 'ingress' } } }],
        gatewayEgress: [{ ports: [{ port: 443 }] }],
        engineEgress: [{ ports: [{ port: 443 }] }],
        apiServerCidr: '10.0.0.1/32',
      },
      deletionCost: { ownPodOnly: true },
    },
  },
  {
    title: 'network policies that let in nobody but those of the release',
    values: {
      networkPolicy: { monitoringFrom: [], kedaFrom: [] },
      models: [{ name: 'm' }, { name: 'wide', tp: 4, nodes: 2 }],
    },
  },
  {
    title: 'gateways that serve HTTPS, behind an Ingress for all hosts',
    values: {
      gateway: { https: { secretName: 'https' }, ingress: { enabled: true } },
      ...watched(),
    },
  },
  { title: 'everything watched', values: watched() },
  {
    title: 'names, labels and pull secrets',
    values: {
      nameOverride: 'serving',
      labels: { team: 'llama' },
      imagePullSecrets: ['registry'],
      image: { repository: 'registry.example/caravan', digest: `sha256:${'b'.repeat(64)}` },
      clusterDomain: 'cluster.example',
    },
  },
];

const groups: readonly Variant[] = [
  ...['Deployment', 'StatefulSet', 'LeaderWorkerSet'].flatMap((workload) => [
    { title: `${workload} on CPUs`, values: model({ workload }) },
    { title: `${workload} on GPUs`, values: model({ workload, device: 'cuda', tp: 4 }) },
    {
      title: `${workload} with all GPUs in one container`,
      values: model({ workload, device: 'cuda', tp: 4, gpuDirect: true }),
    },
    {
      title: `${workload} scaled by KEDA`,
      values: model({ workload, autoscaling: { enabled: true, tokensPerSecond: 2500.5 } }),
    },
  ]),
  { title: 'group over nodes', values: model({ device: 'cuda', tp: 8, nodes: 2 }) },
  {
    title: 'group over nodes, GPU-direct within each, scaled, in one rack',
    values: model({
      device: 'cuda',
      tp: 16,
      nodes: 2,
      gpuDirect: true,
      autoscaling: { enabled: true, minReplicas: 1 },
      exclusiveTopologyKey: 'topology.example/rack',
    }),
  },
  {
    title: 'everything that a model can say',
    values: model({
      servedModelName: 'meta-llama/Llama-2-7b',
      exact: true,
      weights: 'int8',
      transport: 'grpc',
      maxSeqLen: 1_048_576,
      maxBatchSize: 64,
      threads: 4,
      env: [{ name: 'A', value: 'b' }],
      coordinatorArgs: ['--log-level=debug'],
      rankArgs: ['--log-level=debug'],
      disruptionBudget: { enabled: false },
      topologySpread: { keys: ['topology.kubernetes.io/zone'], whenUnsatisfiable: 'DoNotSchedule' },
      rollout: { maxSurge: '25%', maxUnavailable: 1 },
      podAnnotations: { a: 'b' },
      nodeSelector: { gpu: 'h100' },
      tolerations: [{ key: 'nvidia.com/gpu', operator: 'Exists', effect: 'NoSchedule' }],
      affinity: { nodeAffinity: {} },
      priorityClassName: 'high',
      runtimeClassName: 'nvidia',
    }),
  },
];

const caches: readonly Variant[] = [
  {
    title: 'weights cached on a claim',
    values: model({ weightCache: { kind: 'claim', claimName: 'weights' } }),
  },
  { title: 'keys and values in 8 bits', values: model({ kv: 'int8' }) },
  { title: 'weights cached on "kind":"node"', values: model({ weightCache: { kind: 'node' } }) },
];

const sources: readonly Variant[] = [
  { kind: 'claim', claim: { name: 'models', path: 'llama-2-7b' } },
  { kind: 'pull', pull: { model: 'hf:org/name@v1' } },
  {
    kind: 'pull',
    pull: {
      model: 'hf:org/name',
      endpoint: 'https://hub.example',
      tokenSecret: { name: 'hub' },
      cache: { kind: 'claim', claimName: 'shared', accessMode: 'ReadWriteOnce' },
    },
  },
  { kind: 'pull', pull: { model: 'hf:org/name', cache: { kind: 'node' } } },
  { kind: 'pull', pull: { model: 'hf:org/name', cache: { kind: 'emptyDir', size: '20Gi' } } },
  { kind: 'image', image: { reference: 'registry.example/llama-2-7b:1', path: 'model.gguf' } },
].flatMap((source) => [
  { title: `a Pod with ${JSON.stringify(source)}`, values: model({ source }) },
  {
    title: `a group over nodes with ${JSON.stringify(source)}`,
    values: model({ source, tp: 4, nodes: 2 }),
  },
]);

/** Three models side by side, of three kinds. */
export const severalModels = {
  engine: { logLevel: 'warn', maxBatchSize: 32, exact: true, replicas: 3 },
  models: [
    { name: 'tiny', exact: false, replicas: 0 },
    {
      name: 'llama-7b',
      threads: 8,
      tp: 2,
      workload: 'StatefulSet',
      source: { kind: 'claim', claim: { name: 'models', path: 'llama-2-7b' } },
    },
    {
      name: 'llama-70b',
      device: 'cuda',
      exact: false,
      tp: 16,
      nodes: 2,
      source: { kind: 'pull', pull: { model: 'hf:meta-llama/Llama-2-70b-chat-hf' } },
      autoscaling: { enabled: true },
    },
  ],
};

export const variants: readonly Variant[] = [
  ...switches,
  ...groups,
  ...caches,
  ...sources,
  { title: 'several models', values: severalModels },
  {
    title: 'several models, mutual TLS',
    values: { ...severalModels, mtls: { secretName: 'links' } },
  },
  { title: 'several models, everything watched', values: { ...severalModels, ...watched() } },
];

function external(fields: object): object {
  return { redis: { enabled: false, external: fields } };
}

function files(fields: object): object {
  return { gateway: { files: fields } };
}

function watched(): object {
  return {
    monitoring: {
      serviceMonitor: { enabled: true, labels: { release: 'prometheus' } },
      prometheusRule: { enabled: true, labels: { release: 'prometheus' } },
      dashboards: { enabled: true, annotations: { folder: 'Caravan' } },
    },
  };
}
