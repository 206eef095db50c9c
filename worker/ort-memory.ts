/**
 * When a rank's memory is given back. What loading needed and running does not: a shard is built of blocks as large as
 * its matrices, which would otherwise stay with the process, half as much again as the weights.
 */
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import koffi from 'koffi';

const M_TRIM_THRESHOLD = -1;
const M_MMAP_THRESHOLD = -3;

/**
 * How the C library holds large blocks. While loading, each is mapped by itself and unmapped when it is
 * freed; glibc alone would raise that limit to 32 MB as blocks come and go, and keep what lies below.
 * While running, blocks stay on the heap, to be used again by the next step's messages.
 * Other C libraries are left as they are.
 */
export function holdLargeBlocks(phase: 'loading' | 'running'): void {
  if (process.platform !== 'linux') return;
  try {
    const libc = koffi.load('libc.so.6');
    const mallopt = libc.func('int mallopt(int option, int value)') as (
      option: number,
      value: number,
    ) => number;
    mallopt(M_MMAP_THRESHOLD, phase === 'loading' ? 1 << 20 : 32 << 20);
    mallopt(M_TRIM_THRESHOLD, phase === 'loading' ? 1 << 17 : 64 << 20);
  } catch {
    // Not glibc (musl, say): nothing to set.
  }
}

/** Frees the buffers of what was loaded now: an idle rank allocates too little to ever collect them. */
export function collectGarbage(): void {
  setFlagsFromString('--expose-gc');
  (runInNewContext('gc') as () => void)();
}

/** By how much the heap may grow until all of it is looked through again, in percent. */
const HEAP_GROWTH = 300;

/**
 * To be called by a rank whose partials are messages. They lie outside the heap, but count like what lies on it: beside a
 * heap as small as a rank's, 10 MB of them would have all of it looked through, which is once a step.
 */
export function expectMessages(): void {
  setFlagsFromString(`--heap-growing-percent=${HEAP_GROWTH}`);
}
