/**
 * Whatever values say: Kubernetes and its extensions take every object and know every field of it, our commands know
 * every flag, and no Pod may do more than it must.
 */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { test } from 'node:test';
import type { Command } from 'commander';
import { createProgram } from '../coordinator/cli/program.js';
import { workerEntry } from '../coordinator/package-root.js';
import {
  at,
  chartFolder,
  containersOf,
  helm,
  podTemplates,
  render,
  renderAll,
  skipWithoutHelm,
  type Manifest,
  type PodTemplate,
} from './chart.js';
import { severalModels, variants } from './chart-values.js';
import { KubernetesSchemas } from './kubernetes-schemas.js';
import { skipWithout } from './shared.js';

const skip = skipWithoutHelm === false ? skipWithout('kubernetes/schemas-core') : skipWithoutHelm;

/** Every set, rendered. */
const objectSets = skipWithoutHelm === false ? renderAll(variants.map(({ values }) => values)) : [];
const rendered = objectSets.map((objects, i) => ({ title: variants[i]!.title, objects }));
// Compiling them takes longer than all else.
const schemas = skip === false ? new KubernetesSchemas() : null;

void test('helm lint --strict has nothing to say', { skip: skipWithoutHelm }, () => {
  const { status, stdout } = helm(['lint', '--strict', chartFolder]);
  assert.equal(status, 0, stdout);
  assert.ok(!/WARNING|ERROR/.test(stdout), stdout);
});

void test('every object is valid, and no field unknown, for every set of values', { skip }, () => {
  const kinds = new Set<string>();
  const checked = new Set<Manifest>();
  for (const { title, objects } of rendered) {
    const unchecked = objects.filter((object) => !checked.has(object));
    assert.deepEqual(
      unchecked.flatMap((object) => schemas!.problems(object)),
      [],
      title,
    );
    for (const object of unchecked) checked.add(object);
    assertNoDuplicates(objects, title);
    for (const { kind } of objects) kinds.add(kind);
  }
  // The sets reach everything that the chart can make.
  for (const kind of ['LeaderWorkerSet', 'ScaledObject', 'ServiceMonitor', 'PrometheusRule']) {
    assert.ok(kinds.has(kind), kind);
  }
});

void test(
  'as a part of another chart it makes what it makes by itself',
  { skip: skipWithoutHelm },
  () => {
    const i = variants.findIndex(({ values }) => values === severalModels);
    assert.deepEqual(objectSets[i], render(severalModels));
  },
);

void test('a field that Kubernetes does not know is noticed', { skip }, () => {
  const objects = render(severalModels);
  const wrongFields = objects.map((object) => {
    const copy = structuredClone(object) as Manifest & { spec?: Record<string, unknown> };
    (copy.metadata as Record<string, unknown>)['lables'] = {};
    if (copy.spec !== undefined) copy.spec['replcas'] = 1;
    return copy;
  });
  for (const object of wrongFields) {
    const problems = schemas!.problems(object);
    assert.ok(
      problems.some((problem) => problem.includes('lables')),
      object.kind,
    );
    if (object.spec !== undefined) {
      assert.ok(
        problems.some((problem) => problem.includes('replcas')),
        object.kind,
      );
    }
  }
});

void test('every flag that the chart gives exists', { skip: skipWithoutHelm }, async () => {
  const known = new Map<string, ReadonlySet<string>>();
  const flagsOf = (command: Command): Set<string> =>
    new Set(command.options.map(({ long }) => long ?? ''));
  const { commands } = await createProgram();
  for (const command of commands) known.set(command.name(), flagsOf(command));
  const { stdout } = spawnSync(process.execPath, [workerEntry, '--help'], { encoding: 'utf8' });
  known.set('worker', new Set([...stdout.matchAll(/^ +(--[\w-]+)/gm)].map(([, flag]) => flag!)));
  const seen = new Set<string>();
  for (const { title, objects } of rendered) {
    for (const pod of podTemplates(objects)) {
      for (const { name, args } of containersOf(pod)) {
        if (name === 'redis') continue;
        const text = args.join(' ');
        const command = text.includes('dist/worker/main.js')
          ? 'worker'
          : /^dist\/coordinator\/cli\/main\.js ([a-z]+)/.exec(text)![1]!;
        for (const [flag] of text.matchAll(/(?<=^| )--[a-z][\w-]*/g)) {
          assert.ok(known.get(command)!.has(flag), `${title}: ${command} ${flag}`);
          seen.add(`${command} ${flag}`);
        }
      }
    }
  }
  for (const one of ['worker --listen', 'coordinator --ranks', 'gateway --files', 'pull --to']) {
    assert.ok(seen.has(one), one);
  }
});

void test(
  'everything of the CPU variant passes the restricted Pod Security Standard',
  { skip: skipWithoutHelm },
  () => {
    const allowedVolumes = [
      ...['configMap', 'csi', 'downwardAPI', 'emptyDir', 'ephemeral', 'persistentVolumeClaim'],
      ...['projected', 'secret', 'image'],
    ];
    let podCount = 0;
    for (const { title, objects } of rendered) {
      if (/"kind":"node"/.test(title)) continue;
      for (const { spec } of podTemplates(objects)) {
        podCount += 1;
        for (const field of ['hostNetwork', 'hostPID', 'hostIPC']) {
          assert.equal(spec[field], undefined, `${title}: ${field}`);
        }
        for (const volume of spec.volumes ?? []) {
          const kinds = Object.keys(volume).filter((key) => key !== 'name');
          assert.ok(allowedVolumes.includes(kinds[0]!), `${title}: ${kinds.join()}`);
        }
        assert.equal(spec.securityContext['runAsNonRoot'], true, title);
        assert.ok(Number(spec.securityContext['runAsUser']) > 0, title);
        assert.deepEqual(spec.securityContext['seccompProfile'], { type: 'RuntimeDefault' });
        for (const { name, securityContext, ports } of containersOf({ spec } as PodTemplate)) {
          assert.equal(securityContext['allowPrivilegeEscalation'], false, `${title}: ${name}`);
          assert.deepEqual(securityContext['capabilities'], { drop: ['ALL'] }, `${title}: ${name}`);
          assert.equal(securityContext['readOnlyRootFilesystem'], true, `${title}: ${name}`);
          assert.equal(securityContext['privileged'], undefined);
          for (const port of ports ?? []) assert.equal(at(port, 'hostPort'), undefined);
        }
      }
    }
    assert.ok(podCount > 100);
  },
);

void test('no Pod has a token of Kubernetes unless it needs one', { skip: skipWithoutHelm }, () => {
  for (const { title, objects } of rendered) {
    for (const { spec } of podTemplates(objects)) {
      assert.equal(spec.automountServiceAccountToken, false, title);
    }
  }
});

function assertNoDuplicates(objects: readonly Manifest[], title: string): void {
  const names = objects.map(({ kind, metadata }) => `${kind}/${metadata.name}`);
  assert.equal(new Set(names).size, names.length, title);
}
