/** Processor time: unlike the clock, it does not depend on what else runs on the machine. */
import fs from 'node:fs';

/** Milliseconds that this process has computed. */
export function processorMs(): number {
  const { user, system } = process.cpuUsage();
  return (user + system) / 1_000;
}

/** Linux counts processor time of other processes in steps of 10 ms. */
const TICK_MS = 10;

/** Milliseconds that processes computed which this one has started and which have ended; needs /proc. */
export function endedChildrenMs(): number {
  const stat = fs.readFileSync('/proc/self/stat', 'utf8');
  // The name, in brackets, may hold spaces; the state is field 3, cutime and cstime are 16 and 17.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return TICK_MS * (Number(fields[16 - 3]) + Number(fields[17 - 3]));
}
