/**
 * How finely activations may be rounded to bytes. On x86 without VNNI the products of bytes are added in pairs in 16 bits,
 * which overflow: 255 · 127 + 255 · 127. Bytes up to 127 cannot. What a machine does is seen by trying it.
 */
import { GraphBuilder } from './graph-builder.js';
import { elementType, type Ort } from './ort.js';

/** Activations are whole numbers from -levels to levels, around a zero point of levels + 1. */
export type ByteLevels = 127 | 63;

const { uint8, int32 } = elementType;
/** Enough columns and rows for the widest kernels. */
const [INPUTS, OUTPUTS] = [64, 32];

/** @returns 63 where the largest bytes give a wrong product. */
export function byteLevelsOf(ort: Ort): ByteLevels {
  const graph = new GraphBuilder();
  graph.input('x', uint8, ['rows', INPUTS]);
  const weights = new Int8Array(INPUTS * OUTPUTS).fill(127);
  graph.node('MatMulInteger', ['x', graph.constant('w', weights, [INPUTS, OUTPUTS])], ['y']);
  graph.output('y', int32, ['rows', OUTPUTS]);
  const session = ort.createSession(graph.finish());
  // One row and several take different kernels.
  const isRight = [1, 5].every((rowCount) => {
    const x = ort.tensor(new Uint8Array(rowCount * INPUTS).fill(255), [rowCount, INPUTS]);
    const products = new Int32Array(rowCount * OUTPUTS);
    const y = ort.tensor(products, [rowCount, OUTPUTS]);
    session.run([x], [y]);
    x.release();
    y.release();
    return products.every((product) => product === 255 * 127 * INPUTS);
  });
  session.release();
  return isRight ? 127 : 63;
}
