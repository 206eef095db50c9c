/**
 * Finds out how many rows a device's attention takes at once. ONNX Runtime has another kernel for WebGPU from 32 rows on,
 * which counts on subgroups of a size that not every driver has (software Vulkan's have 4): what it gives is compared
 * with what the same rows give in two parts.
 */
import type { DeviceShape } from './device-graph-builder.js';
import { Made, type Bound } from './device-runs.js';
import { GraphBuilder, int, MICROSOFT } from './graph-builder.js';
import { elementType } from './ort.js';
import type { DeviceSession } from './ort-binding.js';
import type { DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';

const { float32, int32 } = elementType;

/** From here on the runtime takes the other kernel. */
const MANY_ROWS = 32;
const PROBED_ROWS = 40;
/** Above what 16 bits differ by; what a wrong kernel gives is as far from the truth as the values are large. */
const TOLERANCE = 0.02;

/** One head of attention over rows of float32. */
function attentionProbeGraph({ config, attention }: DeviceShape) {
  const { headSize } = config;
  const graph = new GraphBuilder();
  const rows = [1, 'rows', headSize];
  const cache = [1, 1, PROBED_ROWS, headSize];
  const operands = ['q', 'k', 'v'].map((name) => {
    graph.input(name, float32, rows);
    if (attention === float32) return name;
    graph.node('Cast', [name], [`${name}.cast`], [int('to', attention)]);
    return `${name}.cast`;
  });
  for (const name of ['keys', 'values']) graph.input(name, attention, cache);
  graph.input('lastPositions', int32, [1]);
  graph.input('totalLength', int32, [1]);
  const raw = attention === float32 ? 'attended' : 'attended.raw';
  graph.node(
    'GroupQueryAttention',
    [...operands, 'keys', 'values', 'lastPositions', 'totalLength'],
    [raw, 'newKeys', 'newValues'],
    [int('num_heads', 1), int('kv_num_heads', 1)],
    MICROSOFT,
  );
  if (raw !== 'attended') graph.node('Cast', [raw], ['attended'], [int('to', float32)]);
  graph.output('attended', float32, rows);
  for (const name of ['newKeys', 'newValues']) graph.output(name, attention, cache);
  return graph.finish();
}

/** @returns Infinity where all numbers of rows give the same. */
export function mostAttentionRows(device: OrtDevice, shape: DeviceShape): number {
  const session = device.session(attentionProbeGraph(shape));
  const made = new Made(device);
  try {
    const whole = attend(device, made, session, shape, [PROBED_ROWS]);
    const parts = attend(device, made, session, shape, [PROBED_ROWS / 2, PROBED_ROWS / 2]);
    const isSame = whole.every((x, i) => Math.abs(x - parts[i]!) < TOLERANCE);
    return isSame ? Infinity : MANY_ROWS - 1;
  } finally {
    made.release();
    session.release();
  }
}

/** The same rows, in as many runs as there are counts. @returns (rows, head size) */
function attend(
  device: OrtDevice,
  made: Made,
  session: DeviceSession,
  { config, attention }: DeviceShape,
  counts: readonly number[],
): Float32Array {
  const { headSize } = config;
  const all = new Float32Array(PROBED_ROWS * headSize);
  const cache = [1, 1, PROBED_ROWS, headSize];
  const [keys, values] = [made.allocate(attention, cache), made.allocate(attention, cache)];
  let first = 0;
  for (const count of counts) {
    const rows = [1, count, headSize];
    const operand = (step: number) => {
      const array = new Float32Array(count * headSize);
      for (let i = 0; i < array.length; i += 1) {
        array[i] = Math.sin((first * headSize + i) * step);
      }
      return made.upload(array, rows);
    };
    const [q, k, v] = [operand(0.7), operand(1.3), operand(2.9)] as const;
    const lastPositions = made.upload(Int32Array.of(first + count - 1), [1]);
    const totalLength = made.hostInput(Int32Array.of(first + count), [1]);
    const attended: DeviceTensor = made.allocate(float32, rows);
    const run = made.bind(
      session,
      new Map<string, Bound>([
        ...([
          ['q', q],
          ['k', k],
          ['v', v],
        ] as [string, Bound][]),
        ...([
          ['keys', keys],
          ['values', values],
        ] as [string, Bound][]),
        ...([
          ['newKeys', keys],
          ['newValues', values],
        ] as [string, Bound][]),
        ['lastPositions', lastPositions],
        ['totalLength', totalLength.tensor],
        ['attended', attended],
      ]),
    );
    run.run();
    const part = all.subarray(first * headSize, (first + count) * headSize);
    made.copy(device.copyOut(attended, part)).run();
    first += count;
  }
  return all;
}
