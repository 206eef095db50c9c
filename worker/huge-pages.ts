/**
 * Weights in huge pages. A step of few rows reads all of them and does little else, and with pages of 4 KiB a core waits for
 * addresses, too: one of a virtual machine read 9.1 GB/s of them, and 10.3 GB/s of pages of 2 MiB (test/bench/NOTES.md).
 *
 * The runtime asks the C library for memory as it likes, so pages are gathered after loading, wherever they lie: the kernel
 * copies what is in use of a mapping into huge pages and frees the small ones (madvise(2), MADV_COLLAPSE, Linux 6.1).
 */
import { readFileSync } from 'node:fs';
import { setImmediate as breathe } from 'node:timers/promises';
import { advise, canMapFiles, residentPages } from './mapped-file.js';

const MADV_HUGEPAGE = 14;
const MADV_COLLAPSE = 25;
const HUGE_BYTES = 2 << 20;
const HUGE = BigInt(HUGE_BYTES);
/** Bytes that are gathered between two looks at the network: some 30 ms. */
const STRETCH_BYTES = 16 << 20;
/** A huge page holds memory for all of its small ones, in use or not: where fewer than this are, they stay as they are. */
const LEAST_USED = 0.9;

interface Mapping {
  readonly start: bigint;
  readonly end: bigint;
}

/**
 * Does so for this process's private memory, until the signal aborts. A gigabyte takes seconds.
 *
 * @param onMoved hears of every stretch, so that whoever waits knows that it goes on.
 * @returns bytes that lie in huge pages now because of it: 0 where the system has none.
 */
export async function gatherHugePages(signal: AbortSignal, onMoved: () => void): Promise<number> {
  if (!canMapFiles()) return 0;
  let gathered = 0;
  for (const mapping of privateMappings(readFileSync('/proc/self/maps', 'utf8'))) {
    for (const { start, end } of fullStretches(mapping)) {
      const byteCount = Number(end - start);
      if (advise(start, byteCount, MADV_COLLAPSE)) gathered += byteCount;
      // Older kernels do it by and by. Where it is a lack of memory, nothing is lost.
      else advise(start, byteCount, MADV_HUGEPAGE);
      onMoved();
      await breathe();
      if (signal.aborted) return gathered;
    }
  }
  return gathered;
}

/** What of a mapping can become huge pages without more memory than now, in parts of at most STRETCH_BYTES. */
function* fullStretches({ start, end }: Mapping): Generator<Mapping> {
  const first = ((start + HUGE - 1n) / HUGE) * HUGE;
  const hugeCount = Number((end - first) / HUGE);
  if (hugeCount < 1) return;
  const pages = residentPages(first, hugeCount * HUGE_BYTES);
  const pagesOfHuge = pages.length / hugeCount;
  const isFull = (huge: number): boolean => {
    const own = pages.subarray(huge * pagesOfHuge, (huge + 1) * pagesOfHuge);
    return own.reduce((sum, page) => sum + (page & 1), 0) >= LEAST_USED * pagesOfHuge;
  };
  let from: number | null = null;
  for (let huge = 0; huge <= hugeCount; huge += 1) {
    const goesOn = huge < hugeCount && isFull(huge);
    if (from !== null) {
      if (goesOn && (huge - from) * HUGE_BYTES < STRETCH_BYTES) continue;
      yield { start: first + BigInt(from) * HUGE, end: first + BigInt(huge) * HUGE };
    }
    from = goesOn ? huge : null;
  }
}

/** The mappings of /proc/PID/maps that are private, writable, of no file, and have room for a huge page. */
export function privateMappings(maps: string): Mapping[] {
  const heads = maps.matchAll(/^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ \S+ 0\s*$/gm);
  return Array.from(heads, ([, start, end]) => ({
    start: BigInt(`0x${start!}`),
    end: BigInt(`0x${end!}`),
  })).filter(({ start, end }) => end - start >= HUGE_BYTES);
}
