/**
 * Small arrays that cross between host and device at every step. They cross together, in one copy, where a tensor may
 * begin within another one's memory: each copy costs as much as a kernel.
 */
import type { Made } from './device-runs.js';
import { elementType } from './ort.js';
import { elementCount, tensorBytes, type Copy, type DeviceTensor } from './device-tensor.js';
import type { OrtDevice } from './ort-device.js';

interface ArrayOf {
  readonly 1: Float32Array;
  readonly 6: Int32Array;
  readonly 7: BigInt64Array;
}
type SmallType = keyof ArrayOf;

export interface SmallPart<T extends SmallType = SmallType> {
  readonly type: T;
  readonly shape: readonly number[];
}

/** An array with its tensor on the device. */
export interface Small<T extends ArrayOf[SmallType] = ArrayOf[SmallType]> {
  readonly array: T;
  readonly tensor: DeviceTensor;
}

type SmallOf<P> = P extends SmallPart<infer T> ? Small<ArrayOf[T]> : never;
type SmallsOf<P extends readonly SmallPart[]> = { readonly [I in keyof P]: SmallOf<P[I]> };

/**
 * Makes arrays and tensors, and the copies between them.
 *
 * @param parts those of 64 bits first: no number may lie across the boundary of its own size.
 */
export function smallArrays<const P extends readonly SmallPart[]>(
  made: Made,
  device: OrtDevice,
  direction: 'in' | 'out',
  parts: P,
): { readonly parts: SmallsOf<P>; readonly copies: readonly Copy[] } {
  const sizes = parts.map(({ type, shape }) => tensorBytes(type, shape));
  const copyOf = (array: ArrayOf[SmallType], tensor: DeviceTensor): Copy =>
    made.copy(direction === 'in' ? device.copyIn(array, tensor) : device.copyOut(tensor, array));
  if (!device.provider.hasOffsets) {
    const smalls = parts.map(({ type, shape }, i) => ({
      array: arrayOver(type, new ArrayBuffer(sizes[i]!), 0, shape),
      tensor: made.allocate(type, shape),
    }));
    const copies = smalls.map(({ array, tensor }) => copyOf(array, tensor));
    return { parts: smalls as unknown as SmallsOf<P>, copies };
  }
  const byteCount = sizes.reduce((sum, size) => sum + size, 0);
  const buffer = new ArrayBuffer(byteCount);
  const whole = made.allocate(elementType.int32, [byteCount / 4]);
  let at = 0;
  const smalls = parts.map(({ type, shape }, i) => {
    const array = arrayOver(type, buffer, at, shape);
    const tensor = made.view(whole, shape, type, at);
    at += sizes[i]!;
    return { array, tensor };
  });
  return {
    parts: smalls as unknown as SmallsOf<P>,
    copies: [copyOf(new Int32Array(buffer), whole)],
  };
}

function arrayOver(
  type: SmallType,
  buffer: ArrayBuffer,
  byteOffset: number,
  shape: readonly number[],
): ArrayOf[SmallType] {
  const count = elementCount(shape);
  if (type === elementType.float32) return new Float32Array(buffer, byteOffset, count);
  if (type === elementType.int32) return new Int32Array(buffer, byteOffset, count);
  return new BigInt64Array(buffer, byteOffset, count);
}
