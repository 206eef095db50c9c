/** Rows whose activations need more than 8 bits: their small channels count, and their neighbours change nothing. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { GraphBuilder, type ByteLevels } from '../worker/graph-builder.js';
import { KernelProbe } from '../worker/kernel-probe.js';
import { linearWriter, type Linear } from '../worker/linear.js';
import { allocateBytes } from '../worker/memory.js';
import { elementType, Ort, type Session } from '../worker/ort.js';
import { Random } from './random.js';

const { float32 } = elementType;
const [INPUTS, OUTPUTS] = [256, 96];
const ort = new Ort(1);
const { byteLevels } = new KernelProbe(ort);
const random = new Random(7);
const uniform = (count: number): Float32Array =>
  Float32Array.from({ length: count }, () => 2 * random.next() - 1);

function randomMatrix(): Extract<Linear, { kind: 'int8' }> {
  const writer = linearWriter({ kind: 'int8' }, OUTPUTS, INPUTS, { take: allocateBytes });
  writer.write(uniform(OUTPUTS * INPUTS), 0, OUTPUTS);
  assert.ok(writer.linear.kind === 'int8');
  return writer.linear;
}

function sessionOf(matrix: Linear, activations: 'coarse' | 'fine', levels: ByteLevels): Session {
  const graph = new GraphBuilder({ byteLevels: levels });
  graph.input('x', float32, [1, 'rows', INPUTS]);
  graph.linear('x', matrix, 'y', activations);
  graph.output('y', float32, [1, 'rows', OUTPUTS]);
  return ort.createSession(graph.finish());
}

function compute(session: Session, x: Float32Array): Float32Array {
  const rows = x.length / INPUTS;
  const y = new Float32Array(rows * OUTPUTS);
  const tensors = [ort.tensor(x, [1, rows, INPUTS]), ort.tensor(y, [1, rows, OUTPUTS])] as const;
  session.run([tensors[0]], [tensors[1]]);
  for (const tensor of tensors) tensor.release();
  return y;
}

const matrix = randomMatrix();
const session = sessionOf(matrix, 'fine', byteLevels);
after(() => {
  session.release();
});

/** Product of a row and the matrix as it is held, in float64. */
const exactRow = (row: Float32Array): number[] =>
  Array.from({ length: OUTPUTS }, (_, output) => {
    let sum = 0;
    for (let input = 0; input < INPUTS; input += 1) {
      sum += row[input]! * matrix.values[input * OUTPUTS + output]!;
    }
    return sum * matrix.scales[output]!;
  });

const largestError = (row: Float32Array, y: Float32Array): number =>
  Math.max(...exactRow(row).map((value, i) => Math.abs(value - y[i]!)));

const rowOf = (x: Float32Array, row: number): Float32Array =>
  x.subarray(row * INPUTS, (row + 1) * INPUTS);

/** Rows of uniform channels; each of `outliers` has one of a thousand. */
function rowsWith(count: number, outliers: readonly number[]): Float32Array {
  const x = uniform(count * INPUTS);
  for (const row of outliers) x[row * INPUTS + ((17 * row) % INPUTS)] = 1000;
  return x;
}

void test('a row with one channel a thousand times larger keeps what the others say', () => {
  const x = rowsWith(5, [1, 4]);
  const y = compute(session, x);
  // A step of 16 bits of 1000, and one of 8 bits of 1, each with 256 weights of up to 1 whose errors mostly cancel.
  const stepOf = (row: number): number =>
    [1, 4].includes(row) ? 1000 / (2 * byteLevels * byteLevels) : 1 / byteLevels;
  for (let row = 0; row < 5; row += 1) {
    const error = largestError(rowOf(x, row), y.subarray(row * OUTPUTS, (row + 1) * OUTPUTS));
    assert.ok(error < 12 * stepOf(row), `row ${row}: off by ${error}`);
  }
  // What it is for: without it the channels beside the large one are lost.
  const coarse = sessionOf(matrix, 'coarse', 127);
  const plain = compute(coarse, rowOf(x, 1).slice());
  coarse.release();
  const lost = largestError(rowOf(x, 1), plain);
  assert.ok(lost > 10 * largestError(rowOf(x, 1), y.subarray(OUTPUTS, 2 * OUTPUTS)));
});

void test('a row has the same bits with and without outliers beside it, and alone', () => {
  const x = rowsWith(9, [0, 3, 8]);
  const together = compute(session, x);
  for (const [first, end] of [
    [0, 1],
    [1, 2],
    [3, 4],
    [1, 3],
    [2, 5],
    [0, 8],
    [8, 9],
  ] as const) {
    const y = compute(session, x.slice(first * INPUTS, end * INPUTS));
    assert.deepEqual(y, together.slice(first * OUTPUTS, end * OUTPUTS), `rows ${first} to ${end}`);
  }
});

void test('rows of zeros are no outliers and give zeros', () => {
  const x = new Float32Array(2 * INPUTS);
  assert.ok(compute(session, x).every((value) => value === 0));
});
