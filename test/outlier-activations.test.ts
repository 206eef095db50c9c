/** A row with one channel that is far larger than the others keeps the others, in 8-bit weights. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { GraphBuilder, type Activations } from '../worker/graph-builder.js';
import { KernelProbe } from '../worker/kernel-probe.js';
import { emptyLinear } from '../worker/linear.js';
import { elementType, Ort } from '../worker/ort.js';
import { Quantizer } from '../worker/quantizer.js';
import { Random } from './random.js';

const [outputs, inputs] = [48, 256];
const random = new Random(3);
const weights = Float32Array.from({ length: outputs * inputs }, () => random.next() - 0.5);
const ort = new Ort(1);
const quantizer = new Quantizer(ort);
const kernels = new KernelProbe(ort, quantizer);

/** (rows, outputs) of rows · weightsᵀ. */
function multiply(rows: readonly (readonly number[])[], activations: Activations): number[] {
  const matrix = emptyLinear({ kind: 'int8' }, outputs, inputs, {
    take: (n) => new ArrayBuffer(n),
  });
  quantizer.write(matrix, weights, 0, outputs);
  const graph = new GraphBuilder(kernels);
  graph.input('x', elementType.float32, [1, 'rows', inputs]);
  graph.linear('x', matrix, 'y', activations);
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

void test('a row has the same bits beside rows with and without an outlier, and alone', () => {
  const zeros = Array.from({ length: inputs }, () => 0);
  const rows = [row(2000), row(0.1), row(-30), zeros, row(0.2), row(-900)];
  const together = multiply(rows, 'fine');
  for (let first = 0; first < rows.length; first += 1) {
    for (let end = first + 1; end <= rows.length; end += 1) {
      const some = multiply(rows.slice(first, end), 'fine');
      assert.deepEqual(some, together.slice(first * outputs, end * outputs), `${first} to ${end}`);
    }
  }
  assert.ok(together.slice(3 * outputs, 4 * outputs).every((value) => value === 0));
});
