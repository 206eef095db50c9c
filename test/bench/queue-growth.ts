/**
 * What taking and submitting cost when 1,000 and when 100,000 jobs wait: nothing may grow with the queue.
 *
 * node dist/test/bench/queue-growth.js
 */
import { JobQueue } from '../../coordinator/queue.js';
import { JobTaker } from '../../coordinator/queue-taker.js';
import type { JobTerms } from '../../coordinator/request.js';
import { startRedis } from '../redis-server.js';

const SIZES = [1_000, 100_000];
const ROUNDS = 200;
const AT_ONCE = 128;
const TENANTS = 20;
const size = { tokens: 300, outputTokens: 100 };

/** Half of the jobs are promised; classes and tenants are mixed. */
function termsOf(i: number): JobTerms {
  const tenant = `tenant-${i % TENANTS}`;
  const priority = [10, 100, 1000][i % 3]!;
  if (i % 2 === 0) return { tenant, priority, deadlineMs: null };
  const latestStartMs = Date.now() + 60_000 + (i % 80_000) * 1000;
  return { tenant, priority, deadlineMs: latestStartMs + 60_000, latestStartMs };
}

const median = (times: readonly number[]): number =>
  [...times].sort((a, b) => a - b)[times.length >> 1]!;

async function timed(act: (i: number) => Promise<unknown>): Promise<number> {
  const times: number[] = [];
  for (let i = 0; i < ROUNDS; i += 1) {
    const startMs = performance.now();
    await act(i);
    times.push(performance.now() - startMs);
  }
  return median(times);
}

const redis = await startRedis();
const rows: Record<string, number[]> = { submit: [], stand: [], choose: [], take: [] };
try {
  for (const waiting of SIZES) {
    const model = `m${waiting}`;
    const queue = new JobQueue(redis.url, model);
    let next = 0;
    const fill = async (): Promise<void> => {
      while (next < waiting) {
        const i = next++;
        await queue.submit(`job-${i}`, termsOf(i), size);
      }
    };
    const fillMs = performance.now();
    await Promise.all(Array.from({ length: AT_ONCE }, fill));
    const perSecond = (1000 * waiting) / (performance.now() - fillMs);
    const taker = new JobTaker(redis.url, model, console.error, { agedAfterMs: 600_000 });
    await taker.choose();
    rows['submit']!.push(await timed((i) => queue.submit(`more-${i}`, termsOf(i), size)));
    rows['stand']!.push(await timed(() => queue.stand()));
    rows['choose']!.push(await timed(() => taker.choose()));
    const held: { finish(isFailed: boolean): Promise<void> }[] = [];
    rows['take']!.push(
      await timed(async () => held.push((await taker.take(AbortSignal.timeout(60_000)))!)),
    );
    console.log(`${waiting} waiting, filled at ${perSecond.toFixed(0)} jobs/s`);
    await taker.close();
    await queue.close();
  }
  for (const [name, [few, many]] of Object.entries(rows)) {
    console.log(
      `${name}: ${few!.toFixed(2)} ms at ${SIZES[0]}, ${many!.toFixed(2)} ms at ${SIZES[1]}: ` +
        `${(many! / few!).toFixed(2)} times`,
    );
  }
} finally {
  await redis.stop();
}
