/** The Helm chart, rendered by helm itself, and its objects checked as an API server would. */
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { parseDocument, stringify } from 'yaml';
import { packageRoot } from '../coordinator/package-root.js';

export const chartFolder = path.join(packageRoot, 'helm/caravan');

/** Where scripts/fetch-helm.sh puts it. */
const fetched = path.join(packageRoot, 'node_modules/.cache/caravan/helm/helm');

/** `helm` of this machine, or the one that was fetched. */
const helmCommand = fs.existsSync(fetched) ? fetched : 'helm';

const isInstalled = (): boolean =>
  fs.existsSync(fetched) || spawnSync('helm', ['version']).status === 0;

/** For node:test's `skip`: false where helm is there, or in CI, else the reason. */
export const skipWithoutHelm: string | false =
  process.env['CI'] === 'true' || isInstalled()
    ? false
    : 'helm is not here: scripts/fetch-helm.sh gets it';

/** What tests read of an object; schemas check the rest. */
export interface Manifest {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: {
    readonly name: string;
    readonly labels: Readonly<Record<string, string>>;
    readonly annotations?: Readonly<Record<string, string>>;
  };
  readonly spec: unknown;
  readonly data?: Readonly<Record<string, string>>;
}

export interface Probe {
  readonly httpGet?: { readonly path: string; readonly port: string };
  readonly exec?: { readonly command: readonly string[] };
  readonly periodSeconds: number;
  readonly failureThreshold: number;
}

export interface Container {
  readonly name: string;
  readonly image: string;
  readonly restartPolicy?: string;
  readonly command?: readonly string[];
  readonly args: readonly string[];
  readonly env?: readonly {
    readonly name: string;
    readonly value?: string;
    readonly valueFrom?: unknown;
  }[];
  readonly ports?: readonly { readonly name: string; readonly containerPort: number }[];
  readonly resources: { readonly limits?: Readonly<Record<string, unknown>> };
  readonly securityContext: Readonly<Record<string, unknown>>;
  readonly volumeMounts?: readonly {
    readonly name: string;
    readonly mountPath: string;
    readonly readOnly?: boolean;
  }[];
  readonly startupProbe?: Probe;
  readonly livenessProbe?: Probe;
  readonly readinessProbe?: Probe;
  readonly lifecycle?: unknown;
}

export interface PodTemplate {
  readonly metadata: { readonly labels: Readonly<Record<string, string>> };
  readonly spec: {
    readonly initContainers?: readonly Container[];
    readonly containers: readonly Container[];
    readonly volumes?: readonly (Readonly<Record<string, unknown>> & { readonly name: string })[];
    readonly securityContext: Readonly<Record<string, unknown>>;
    readonly terminationGracePeriodSeconds: number;
    readonly automountServiceAccountToken: boolean;
    readonly serviceAccountName?: string;
    readonly [field: string]: unknown;
  };
}

/** The value at a path of names and numbers, `spec.ports.0.port`; undefined where there is none. */
export const at = (value: unknown, path: string): unknown =>
  path
    .split('.')
    .reduce<unknown>(
      (inner, key) =>
        typeof inner === 'object' && inner !== null
          ? (inner as Readonly<Record<string, unknown>>)[key]
          : undefined,
      value,
    );

export interface HelmRun {
  readonly status: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export function helm(args: readonly string[], input = ''): HelmRun {
  const { status, stdout, stderr, error } = spawnSync(helmCommand, args, {
    input,
    encoding: 'utf8',
    maxBuffer: 64 * 1024 * 1024,
    // Neither a cluster's settings nor a user's plugins must matter.
    env: { PATH: process.env['PATH'] ?? '', HOME: '/nonexistent', KUBECONFIG: '/nonexistent' },
  });
  if (error !== undefined) throw error;
  return { status, stdout, stderr };
}

/** `helm template` of a release `llama` in namespace `prod`. */
const template = (chart: string, values: object): HelmRun =>
  helm(['template', 'llama', chart, '--namespace', 'prod', '--values', '-'], stringify(values));

/** Objects by their text: most sets of values share most of their objects. */
const parsed = new Map<string, Manifest | null>();

function parseObject(text: string): Manifest | null {
  const known = parsed.get(text);
  if (known !== undefined) return known;
  const document = parseDocument(text);
  const [problem] = document.errors;
  if (problem !== undefined) throw problem;
  const object = document.toJS() as Manifest | null;
  parsed.set(text, object);
  return object;
}

/** Each object that helm printed, with the file that it says it is of. */
function objectsOf(stdout: string): { readonly source: string; readonly object: Manifest }[] {
  return stdout.split(/^---\n/m).flatMap((text) => {
    const [, source = '', yaml = ''] = /^# Source: (.*)\n([^]*)$/.exec(text) ?? [];
    const object = parseObject(yaml);
    return object === null ? [] : [{ source, object }];
  });
}

/** All objects that these values give. @throws Error with helm's own words. */
export function render(values: object): Manifest[] {
  const { status, stdout, stderr } = template(chartFolder, values);
  if (status !== 0) throw new Error(`helm template: ${stderr}`);
  return objectsOf(stdout).map(({ object }) => object);
}

/**
 * One run of helm over many sets of values: each is a dependency of one chart, as in a chart of somebody who uses ours.
 */
function templateTogether(sets: readonly object[]): HelmRun {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-sets-'));
  try {
    fs.cpSync(chartFolder, path.join(folder, 'charts/caravan'), { recursive: true });
    const names = sets.map((_, i) => `set${i}`);
    const dependencies = names.map((alias) => ({ name: 'caravan', version: '*', alias }));
    const chart = { apiVersion: 'v2', name: 'sets', version: '0.1.0', dependencies };
    fs.writeFileSync(path.join(folder, 'Chart.yaml'), stringify(chart));
    return template(folder, Object.fromEntries(names.map((name, i) => [name, sets[i]])));
  } finally {
    fs.rmSync(folder, { recursive: true });
  }
}

/** `render` of each set, in a fraction of the time. */
export function renderAll(sets: readonly object[]): Manifest[][] {
  const { status, stdout, stderr } = templateTogether(sets);
  if (status !== 0) throw new Error(`helm template: ${stderr}`);
  const objects = sets.map((): Manifest[] => []);
  // A dependency's own name is the one that it has there.
  for (const { source, object } of objectsOf(stdout.replaceAll(/: set\d+-/g, ': caravan-'))) {
    objects[Number(/^sets\/charts\/set(\d+)\//.exec(source)![1])]!.push(object);
  }
  return objects;
}

/** What helm says of values that it refuses. */
export function refusal(values: object): string {
  const { status, stderr } = template(chartFolder, values);
  if (status === 0) throw new Error('helm took these values');
  return stderr;
}

/** What the chart's schema says of each set, in one run; empty where it takes one. */
export function schemaRefusals(sets: readonly object[]): string[] {
  const { stderr } = templateTogether(sets);
  const said = stderr.split(/^(set\d+):\n/m);
  return sets.map((_, i) => {
    const at = said.indexOf(`set${i}`);
    return at === -1 ? '' : said[at + 1]!;
  });
}

/** The one object of this kind and name. */
export function find(objects: readonly Manifest[], kind: string, name: string): Manifest {
  const found = objects.filter((o) => o.kind === kind && o.metadata.name === name);
  if (found.length !== 1) {
    const names = objects.map((o) => `${o.kind}/${o.metadata.name}`).join(', ');
    throw new Error(`${found.length} objects are ${kind}/${name}; there are ${names}`);
  }
  return found[0]!;
}

/** Where the Pods' templates of an object lie. */
const templatePaths: Readonly<Record<string, readonly string[]>> = {
  Deployment: ['spec.template'],
  StatefulSet: ['spec.template'],
  LeaderWorkerSet: [
    'spec.leaderWorkerTemplate.leaderTemplate',
    'spec.leaderWorkerTemplate.workerTemplate',
  ],
};

/** Every Pod's template in these objects; of a LeaderWorkerSet, the leader's first. */
export function podTemplates(objects: readonly Manifest[]): PodTemplate[] {
  return objects.flatMap((object) =>
    object.kind === 'Pod'
      ? [object as unknown as PodTemplate]
      : (templatePaths[object.kind] ?? []).map((path) => at(object, path) as PodTemplate),
  );
}

/** The template of one object: of a LeaderWorkerSet, its leader's. */
export const podOf = (objects: readonly Manifest[], kind: string, name: string): PodTemplate =>
  podTemplates([find(objects, kind, name)])[0]!;

/** All containers of a Pod, sidecars and other init containers first. */
export const containersOf = ({ spec }: PodTemplate): readonly Container[] => [
  ...(spec.initContainers ?? []),
  ...spec.containers,
];

export function containerOf(template: PodTemplate, name: string): Container {
  const found = containersOf(template).find((container) => container.name === name);
  if (found === undefined) throw new Error(`the Pod has no container ${name}`);
  return found;
}
