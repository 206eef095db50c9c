/** Memory of a rank that is asked for at once: where there is too little, it is said in one line. */
import { CaravanError } from '../proto/errors.js';

/** Zeroed memory, committed by the operating system when it is first written. @throws `out_of_memory`. */
export function allocateBytes(byteCount: number): ArrayBuffer {
  try {
    return new ArrayBuffer(byteCount);
  } catch (cause) {
    throw new CaravanError('out_of_memory', `cannot reserve ${byteCount} bytes`, { cause });
  }
}

/** Zeroed float32 memory, as `allocateBytes`. */
export const allocate = (elementCount: number): Float32Array<ArrayBuffer> =>
  new Float32Array(allocateBytes(4 * elementCount));
