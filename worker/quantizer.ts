/**
 * Turns rows of float32 into the forms that sessions take. The runtime's own kernels do it, in small graphs: they are
 * several times as fast as a loop in JavaScript, and a rank that starts for the first time waits for little else.
 */
import { GraphBuilder, int, type Graph } from './graph-builder.js';
import { zeroBytesOf, type BlockedLinear, type Linear } from './linear.js';
import { elementType, type ElementType, type Ort, type Session, type TensorArray } from './ort.js';

const { float32, uint8, uint4, int8 } = elementType;

type Int8Linear = Extract<Linear, { kind: 'int8' }>;

/** Rows of a run: what is written of a column of the transposed matrix are runs of this many bytes. */
const INT8_ROWS = 256;
/** Weights of a run of blocks: what a run computes stays in a core's caches. */
const RUN_WEIGHTS = 1 << 16;
/** Scales of rows and blocks of zeros, which have none of their own. */
const LEAST_SCALE = 1e-30;
/** What is added to zeros of 4 bits where bytes stand for them. */
const BYTES_BELOW = 240;

export class Quantizer {
  readonly #ort: Ort;
  #int8: Session | null = null;
  /** By what they compute and the block. */
  readonly #blocks = new Map<string, Session>();
  /** What runs write, to be used again. */
  readonly #scratch = new Map<string, TensorArray>();

  constructor(ort: Ort) {
    this.#ort = ort;
  }

  /** @param rows (count, inputs), which become the matrix's rows from `first` on. */
  write(matrix: Linear, rows: Float32Array, first: number, count: number): void {
    switch (matrix.kind) {
      case 'fp32':
        matrix.values.set(rows.subarray(0, count * matrix.inputs), first * matrix.inputs);
        return;
      case 'int8':
        this.#writeInt8(matrix, rows, first, count);
        return;
      case 'int8Blocks':
      case 'int4':
        this.#writeBlocks(matrix, rows, first, count);
    }
  }

  /**
   * What rounding these rows to 4 bits in blocks changes (root mean square), as part of what they are (root mean
   * square); 0 for zeros.
   *
   * @param rows (any number, inputs) of a multiple of `block`.
   */
  errorOf(rows: Float32Array, block: number): number {
    const session = this.#blockSession(block, 'errors');
    const errors = this.#array('errors', RUN_WEIGHTS / block, Float32Array);
    let sum = 0;
    for (let done = 0; done < rows.length; done += RUN_WEIGHTS) {
      const own = rows.subarray(done, done + RUN_WEIGHTS);
      const blocks = own.length / block;
      const found = errors.subarray(0, blocks);
      this.#run(session, [own, [blocks, block]], [found, [blocks]]);
      for (const error of found) sum += error;
    }
    let size = 0;
    for (let i = 0; i < rows.length; i += 1) size += rows[i]! * rows[i]!;
    return size === 0 ? 0 : Math.sqrt(sum / size);
  }

  release(): void {
    this.#int8?.release();
    for (const session of this.#blocks.values()) session.release();
    this.#int8 = null;
    this.#blocks.clear();
    this.#scratch.clear();
  }

  #writeInt8(matrix: Int8Linear, rows: Float32Array, first: number, count: number): void {
    const { inputs, outputs, values, scales } = matrix;
    this.#int8 ??= this.#ort.createSession(int8Graph());
    const scratch = this.#array('columns', INT8_ROWS * inputs, Int8Array);
    for (let done = 0; done < count; done += INT8_ROWS) {
      const own = Math.min(INT8_ROWS, count - done);
      const at = first + done;
      const columns = scratch.subarray(0, own * inputs);
      this.#run(
        this.#int8,
        [rows.subarray(done * inputs, (done + own) * inputs), [own, inputs]],
        [columns, [inputs, own]],
        [scales.subarray(at, at + own), [own]],
      );
      for (let i = 0; i < inputs; i += 1) {
        values.set(columns.subarray(i * own, (i + 1) * own), i * outputs + at);
      }
    }
  }

  #writeBlocks(matrix: BlockedLinear, rows: Float32Array, first: number, count: number): void {
    const { inputs, block } = matrix;
    const blocks = inputs / block;
    const zeroed = matrix.kind === 'int4' ? matrix.zeros : null;
    const session = this.#blockSession(block, wantedOf(matrix));
    const most = Math.max(1, Math.floor(RUN_WEIGHTS / inputs));
    const zeroScratch = this.#array('zeros', most * blocks, Uint8Array);
    const [bytesEach, type] = matrix.kind === 'int4' ? [0.5, uint4] : [1, uint8];
    for (let done = 0; done < count; done += most) {
      const own = Math.min(most, count - done);
      const at = first + done;
      const zeros = zeroScratch.subarray(0, own * blocks);
      const values = matrix.values.subarray(
        at * inputs * bytesEach,
        (at + own) * inputs * bytesEach,
      );
      const outputs = [
        [values, [own * blocks, block], type],
        [matrix.scales.subarray(at * blocks, (at + own) * blocks), [own * blocks]],
        ...(zeroed === null ? [] : [[zeros, [own * blocks]] as const]),
      ] as const;
      const own32 = rows.subarray(done * inputs, (done + own) * inputs);
      this.#run(session, [own32, [own * blocks, block]], ...outputs);
      if (zeroed !== null) packZeros(zeros, zeroed, at, blocks, zeroBytesOf(inputs, block));
    }
  }

  #blockSession(block: number, wanted: Wanted): Session {
    const key = `${wanted} ${block}`;
    let session = this.#blocks.get(key);
    if (session === undefined) {
      const graph = wanted === 'bytes' ? byteBlockGraph(block) : int4Graph(block, wanted);
      session = this.#ort.createSession(graph);
      this.#blocks.set(key, session);
    }
    return session;
  }

  /** Computes into the arrays of all but the first. */
  #run(
    session: Session,
    ...values: readonly (readonly [
      array: TensorArray,
      shape: readonly number[],
      type?: ElementType,
    ])[]
  ): void {
    const [x, ...outputs] = values.map((value) => this.#ort.tensor(...value));
    try {
      session.run([x!], outputs);
    } finally {
      for (const tensor of [x!, ...outputs]) tensor.release();
    }
  }

  #array<T extends Int8Array | Uint8Array | Float32Array>(
    name: string,
    length: number,
    Kind: new (length: number) => T,
  ): T {
    let array = this.#scratch.get(name) as T | undefined;
    if (array === undefined || array.length < length) {
      array = new Kind(length);
      this.#scratch.set(name, array);
    }
    return array;
  }
}

/** Of each row of x its scale, in `scales` (rows): the largest weight becomes ±127. */
function scaleRows(graph: GraphBuilder): void {
  graph.integers('widthAxis', [1]);
  graph.node('Abs', ['x'], ['sizes']);
  graph.node('ReduceMax', ['sizes', 'widthAxis'], ['largest'], [int('keepdims', 0)]);
  graph.node('Div', ['largest', graph.constant('levels', Float32Array.of(127), [])], ['steps']);
  const least = graph.constant('least', Float32Array.of(LEAST_SCALE), []);
  graph.node('Max', ['steps', least], ['scales']);
}

/** Input x (rows, inputs); outputs values (inputs, rows) and scales (rows): the largest weight of a row becomes ±127. */
function int8Graph(): Graph {
  const graph = new GraphBuilder();
  graph.input('x', float32, ['rows', 'inputs']);
  scaleRows(graph);
  graph.node('Shape', ['scales'], ['rowCount']);
  graph.node('Expand', [graph.constant('zero', Int8Array.of(0), []), 'rowCount'], ['zeros']);
  graph.node('QuantizeLinear', ['x', 'scales', 'zeros'], ['bytes'], [int('axis', 0)]);
  graph.node('Transpose', ['bytes'], ['values']);
  graph.output('values', int8, ['inputs', 'rows']);
  graph.output('scales', float32, ['rows']);
  return graph.finish();
}

type Wanted = 'bytes' | 'weights' | 'centred' | 'errors';

function wantedOf(matrix: BlockedLinear): Wanted {
  if (matrix.kind === 'int8Blocks') return 'bytes';
  return matrix.zeros === null ? 'centred' : 'weights';
}

/** Input x (blocks, block); outputs values (blocks, block) around 128, the largest ±127, and scales (blocks). */
function byteBlockGraph(block: number): Graph {
  const graph = new GraphBuilder();
  graph.input('x', float32, ['blocks', block]);
  scaleRows(graph);
  graph.node('Unsqueeze', ['scales', 'widthAxis'], ['scales.column']);
  graph.node('Shape', ['scales.column'], ['columnShape']);
  const centre = graph.constant('centre', Uint8Array.of(128), []);
  graph.node('Expand', [centre, 'columnShape'], ['zeros']);
  const inRows = [int('axis', 1), int('block_size', block)];
  graph.node('QuantizeLinear', ['x', 'scales.column', 'zeros'], ['values'], inRows);
  graph.output('values', uint8, ['blocks', block]);
  graph.output('scales', float32, ['blocks']);
  return graph.finish({ hasBlocks: true });
}

/**
 * Input x (blocks, block); outputs values (blocks, block) in 4 bits, scales and zeros (blocks); or else the sum of the
 * squared errors of each block.
 *
 * Of each block either the weight that is largest in size becomes 0 (−8 steps from a zero of 8), or the smallest becomes
 * 0 and the largest 15: whichever comes nearer. What was 4 bits in such blocks before stays what it was. `centred` has
 * only the former, and no zeros among its outputs.
 *
 * Errors are those of bytes, whose kernels are faster: around zeros of 240 and more they end at 255 where 4 bits end at 15.
 * The runtime quantizes fastest with blocks as part of rows, and back with a row each.
 */
function int4Graph(block: number, wanted: Exclude<Wanted, 'bytes'>): Graph {
  const graph = new GraphBuilder();
  const float = (name: string, value: number) => graph.constant(name, Float32Array.of(value), []);
  const reduce = [int('keepdims', 0)];
  const inRows = [int('axis', 1), int('block_size', block)];
  const toByte = [int('to', uint8)];
  const column = (name: string): string => {
    graph.node('Unsqueeze', [name, 'widthAxis'], [`${name}.column`]);
    return `${name}.column`;
  };
  graph.input('x', float32, ['blocks', block]);
  graph.integers('widthAxis', [1]);
  float('none', 0);
  float('least', LEAST_SCALE);
  float('below', BYTES_BELOW);
  graph.node('ReduceMax', ['x', 'widthAxis'], ['max'], reduce);
  graph.node('ReduceMin', ['x', 'widthAxis'], ['min'], reduce);
  graph.node('Max', ['max', 'none'], ['largest']);
  graph.node('Min', ['min', 'none'], ['smallest']);
  graph.node('Neg', ['smallest'], ['depth']);

  graph.node('Greater', ['largest', 'depth'], ['isUpward']);
  graph.node('Where', ['isUpward', 'largest', 'smallest'], ['farthest']);
  graph.node('Div', ['farthest', float('-8', -8)], ['centred.step']);
  graph.node('Equal', ['centred.step', 'none'], ['isZero']);
  graph.node('Where', ['isZero', 'least', 'centred.step'], ['centred.scale']);
  graph.node('Shape', ['centred.scale'], ['blockCount']);
  graph.node('Expand', [float('centre', 8), 'blockCount'], ['centred.zero']);

  if (wanted === 'centred') {
    graph.node('Cast', [column('centred.zero')], ['zeros.4'], [int('to', uint4)]);
    graph.node('QuantizeLinear', ['x', column('centred.scale'), 'zeros.4'], ['values'], inRows);
    graph.output('values', uint4, ['blocks', block]);
    graph.node('Identity', ['centred.scale'], ['scales']);
    graph.output('scales', float32, ['blocks']);
    return graph.finish({ hasBlocks: true });
  }
  graph.node('Sub', ['largest', 'smallest'], ['range']);
  graph.node('Div', ['range', float('15', 15)], ['spread.step']);
  graph.node('Max', ['spread.step', 'least'], ['spread.scale']);
  graph.node('Div', ['depth', 'spread.scale'], ['spread.depth']);
  graph.node('Round', ['spread.depth'], ['spread.zero']);

  for (const name of ['centred', 'spread']) {
    const part = (of: string): string => `${name}.${of}`;
    graph.node('Add', [part('zero'), 'below'], [part('place')]);
    graph.node('Cast', [part('place')], [part('byte')], toByte);
    const grid = [part('scale'), part('byte')];
    graph.node('QuantizeLinear', ['x', ...grid.map(column)], [part('bytes')], inRows);
    graph.node('DequantizeLinear', [part('bytes'), ...grid], [part('held')], [int('axis', 0)]);
    graph.node('Sub', ['x', part('held')], [part('errors')]);
    graph.node('Mul', [part('errors'), part('errors')], [part('squares')]);
    graph.node('ReduceSum', [part('squares'), 'widthAxis'], [part('error')], reduce);
  }
  if (wanted === 'errors') {
    graph.node('Min', ['centred.error', 'spread.error'], ['errors']);
    graph.output('errors', float32, ['blocks']);
    return graph.finish({ hasBlocks: true });
  }
  graph.node('LessOrEqual', ['centred.error', 'spread.error'], ['isCentred']);
  graph.node('Where', ['isCentred', 'centred.scale', 'spread.scale'], ['scales']);
  graph.node('Where', ['isCentred', 'centred.zero', 'spread.zero'], ['zero']);
  graph.node('Cast', ['zero'], ['zeros'], toByte);
  graph.node('Cast', [column('zeros')], ['zeros.4'], [int('to', uint4)]);
  graph.node('QuantizeLinear', ['x', column('scales'), 'zeros.4'], ['values'], inRows);
  graph.output('values', uint4, ['blocks', block]);
  graph.output('scales', float32, ['blocks']);
  graph.output('zeros', uint8, ['blocks']);
  return graph.finish({ hasBlocks: true });
}

/** Two zeros become a byte, the earlier one low, row by row: an odd last one stands alone. */
function packZeros(
  zeros: Uint8Array,
  target: Uint8Array,
  firstRow: number,
  blocks: number,
  rowBytes: number,
): void {
  const rows = zeros.length / blocks;
  for (let row = 0; row < rows; row += 1) {
    const to = (firstRow + row) * rowBytes;
    for (let b = 0; b < blocks; b += 2) {
      const next = b + 1 < blocks ? zeros[row * blocks + b + 1]! : 0;
      target[to + (b >> 1)] = zeros[row * blocks + b]! | (next << 4);
    }
  }
}
