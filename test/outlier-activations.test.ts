/** A row with one channel that is far larger than the others keeps the others, in 8-bit weights. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { GraphBuilder, type Activations } from '../worker/graph-builder.js';
import { KernelProbe } from '../worker/kernel-probe.js';
import { linearWriter } from '../worker/linear.js';
import { elementType, Ort } from '../worker/ort.js';
import { Random } from './random.js';

const [outputs, inputs] = [48, 256];
const random = new Random(3);
const weights = Float32Array.from({ length: outputs * inputs }, () => random.next() - 0.5);
const ort = new Ort(1);
const kernels = new KernelProbe(ort);

/** (rows, outputs) of rows · weightsᵀ. */
function multiply(rows: readonly (readonly number[])[], activations: Activations): number[] {
  const writer = linearWriter({ kind: 'int8' }, outputs, inputs, {
    take: (n) => new ArrayBuffer(n),
  });
  writer.write(weights, 0, outputs);
  const graph = new GraphBuilder(kernels);
  graph.input('x', elementType.float32, [1, 'rows', inputs]);
  graph.linear('x', writer.linear, 'y', activations);
  graph.output('y', elementType.float32, [1, 'rows', outputs]);
  const session = ort.createSession(graph.finish());
  const x = ort.tensor(Float32Array.from(rows.flat()), [1, rows.length, inputs]);
  const y = ort.tensor(new Float32Array(rows.length * outputs), [1, rows.length, outputs]);
  session.run([x], [y]);
  session.release();
  return [...(y.array as Float32Array)];
}

const row = (outlier: number): number[] =>
  Array.from({ length: inputs }, (_, i) => (i === 7 ? outlier : random.next() - 0.5));

/** What the row's other channels bring to each output, as computed: the outlier's own share taken away. */
function distanceFromOthers(activations: Activations): number {
  const x = row(2000);
  const computed = multiply([x], activations);
  let [error, size] = [0, 0];
  for (let output = 0; output < outputs; output += 1) {
    const own = weights.subarray(output * inputs, (output + 1) * inputs);
    const step = own.reduce((most, w) => Math.max(most, Math.abs(w)), 0) / 127;
    const held = Math.round(own[7]! / step) * step;
    const others = x.reduce((sum, value, i) => sum + (i === 7 ? 0 : value * own[i]!), 0);
    error += (computed[output]! - 2000 * held - others) ** 2;
    size += others ** 2;
  }
  return Math.sqrt(error / size);
}

void test('activations of 16 bits keep what 8 bits lose beside an outlier', (t) => {
  const [coarse, fine] = [distanceFromOthers('coarse'), distanceFromOthers('fine')];
  t.diagnostic(`error of the other channels' share: ${coarse.toFixed(3)}, fine ${fine.toFixed(3)}`);
  // Where bytes have 7 bits, both are fine.
  if (kernels.byteLevels === 63) assert.ok(coarse < 0.4, String(coarse));
  else assert.ok(coarse > 0.5, 'the outlier is one that 8 bits cannot bear');
  // Two products of 8 bits keep 16; two of 7, where products of 8 would overflow, keep 14.
  assert.ok(fine < (kernels.byteLevels === 127 ? 0.2 : 0.4), String(fine));
});

void test('activations of 16 bits give a row the same bits beside any others', () => {
  const rows = [row(2000), row(0.1), row(-30), Array.from({ length: inputs }, () => 0)];
  const together = multiply(rows, 'fine');
  const alone = rows.flatMap((one) => multiply([one], 'fine'));
  assert.deepEqual(together, alone);
});
