/** What the chart's values may be: wrong ones are refused with a line that names them, and all are documented. */
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import path from 'node:path';
import { test } from 'node:test';
import { packageRoot } from '../coordinator/package-root.js';
import { refusal, schemaRefusals, skipWithoutHelm } from './chart.js';

const model = (fields: object): object => ({ models: [{ name: 'm', ...fields }] });

type Refused = readonly (readonly [object, RegExp])[];

/** Values that the schema refuses by names, types and bounds, and what must be said of them. */
const malformed: Refused = [
  [{ gatway: {} }, /additional properties 'gatway' not allowed/],
  [{ gateway: { replica: 1 } }, /at '\/gateway': additional properties 'replica' not allowed/],
  [{ gateway: { replicas: -1 } }, /at '\/gateway\/replicas': minimum: got -1, want 0/],
  [{ gateway: { port: 'http' } }, /at '\/gateway\/port': got string, want integer/],
  [{ gateway: { port: 80 } }, /at '\/gateway\/port': minimum: got 80, want 1,024/],
  [{ redis: { external: { url: 'http://x' } } }, /at '\/redis\/external\/url': .* does not match/],
  [{ redis: { maxMemory: '2 GB' } }, /at '\/redis\/maxMemory'/],
  [{ redis: { appendFsync: 'no' } }, /at '\/redis\/appendFsync': value must be one of/],
  [{ models: [{}] }, /at '\/models\/0': missing property 'name'/],
  [{ models: [{ name: 'Llama_2' }] }, /at '\/models\/0\/name': .* does not match/],
  [model({ tp: 0 }), /at '\/models\/0\/tp': minimum: got 0, want 1/],
  [model({ device: 'tpu' }), /at '\/models\/0\/device': value must be one of 'cpu', 'cuda'/],
  [model({ shmSize: '1 GB' }), /at '\/models\/0\/shmSize'/],
  [model({ souce: {} }), /at '\/models\/0': additional properties 'souce' not allowed/],
  [model({ source: { pull: { model: 'org/name' } } }), /at '\/models\/0\/source\/pull\/model'/],
  [model({ source: { pull: { cache: { mode: 1 } } } }), /additional properties 'mode' not allowed/],
  [{ engine: { workload: 'DaemonSet' } }, /at '\/engine\/workload': value must be one of/],
  [{ monitoring: { prometheusRule: { errorRatio: 5 } } }, /errorRatio': maximum: got 5, want 1/],
];

/** Relations that only the templates can see. */
const contradictory: Refused = [
  [{ models: [{ name: 'a' }, { name: 'a' }] }, /models: a: two models have this name/],
  [model({ tp: 3, nodes: 2 }), /models: m: tp 3 cannot be spread evenly over 2 nodes/],
  [model({ gpuDirect: true }), /models: m: gpuDirect needs device cuda/],
  [
    model({ exact: true, weights: 'int4+int8' }),
    /models: m: weights int4\+int8 .* cannot be exact/,
  ],
  [model({ device: 'cuda', kv: 'int8' }), /models: m: kv int8 is for cpu, and cannot be exact/],
  [model({ device: 'cuda', transport: 'direct' }), /models: m: transport direct needs gpuDirect/],
  [model({ tp: 4, nodes: 2, transport: 'shm' }), /models: m: transport shm cannot reach other/],
  [model({ tp: 4, nodes: 2, workload: 'StatefulSet' }), /is a LeaderWorkerSet, not a StatefulSet/],
  [model({ source: { kind: 'claim' } }), /models: m: source\.claim\.name must name/],
  [model({ source: { kind: 'pull' } }), /models: m: source\.pull\.model must be hf:ORG\/NAME/],
  [model({ source: { kind: 'image' } }), /models: m: source\.image\.reference must name an image/],
  [model({ weightCache: { kind: 'claim' } }), /models: m: weightCache\.claimName must name/],
  [model({ autoscaling: { minReplicas: 9 } }), /models: m: autoscaling\.minReplicas is above max/],
  [{ redis: { external: { url: 'redis://x' } } }, /redis: either enabled, or external\.url/],
  [{ redis: { enabled: false } }, /redis: with enabled false, external\.url or/],
  [{ gateway: { ingress: { tlsSecretName: 'tls' } } }, /gateway\.ingress\.host must name the host/],
  [{ gateway: { files: { kind: 's3' } } }, /gateway\.files\.url must be s3:/],
  [{ gateway: { files: { kind: 'claim' } } }, /gateway\.files\.claimName must name/],
  [
    { gateway: { autoscaling: { enabled: true, minReplicas: 11 } } },
    /gateway\.autoscaling\.minReplicas is above maxReplicas/,
  ],
];

void test(
  'wrong values are refused, and helm says which and why',
  { skip: skipWithoutHelm },
  () => {
    const said = schemaRefusals(malformed.map(([values]) => values));
    for (const [i, [values, line]] of malformed.entries()) {
      assert.match(said[i]!, line, JSON.stringify(values));
    }
    // By itself it is refused, too.
    assert.match(refusal(malformed[0]![0]), malformed[0]![1]);
    for (const [values, line] of contradictory) {
      assert.match(refusal(values), line, JSON.stringify(values));
    }
  },
);

void test("the chart's README tells of every value what it is, and what it is by default", () => {
  const script = path.join(packageRoot, 'scripts/document-values.mjs');
  const { status, stderr } = spawnSync(process.execPath, [script, '--check'], { encoding: 'utf8' });
  assert.equal(status, 0, stderr);
});
