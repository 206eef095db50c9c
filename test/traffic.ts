/** Requests as they arrived: an hour of Azure's language models in 2023, or arrivals of the same kind, made up. */
import fs from 'node:fs';
import { Random } from './random.js';
import type { Arrival } from './traffic-simulator.js';

export interface TrafficMix {
  /** Share of jobs that have a deadline. */
  readonly deadlineShare: number;
  readonly seed: number;
  /** Requests are taken this many times (or, below 1, that share of them). */
  readonly load: number;
}

interface Requested {
  readonly atMs: number;
  readonly promptTokens: number;
  readonly outputTokens: number;
}

/** Weights of the tenants; each asks for as much as its share. */
const tenants = [
  { tenant: 'one', weight: 1 },
  { tenant: 'two', weight: 2 },
  { tenant: 'three', weight: 3 },
];

/** Reads the trace's files. @param hourMs how much of it. */
export function traceRequests(files: readonly string[], hourMs: number): Requested[] {
  const requests = files.flatMap((file) =>
    fs
      .readFileSync(file, 'utf8')
      .trim()
      .split('\n')
      .slice(1)
      .map((line) => {
        const [time, prompt, output] = line.split(',');
        const atMs = Date.parse(`${time!.slice(0, 23).replace(' ', 'T')}Z`);
        return { atMs, promptTokens: Number(prompt), outputTokens: Math.max(1, Number(output)) };
      }),
  );
  requests.sort((a, b) => a.atMs - b.atMs);
  const startMs = requests[0]!.atMs;
  return requests
    .map((request) => ({ ...request, atMs: request.atMs - startMs }))
    .filter(({ atMs }) => atMs < hourMs);
}

/** Made-up arrivals: bursts, long prompts with short answers and the other way. @param perSecond on average. */
export function madeUpRequests(durationMs: number, perSecond: number, seed: number): Requested[] {
  const random = new Random(seed);
  const requests: Requested[] = [];
  for (let atMs = 0; atMs < durationMs;) {
    // The rate swings over minutes.
    const rate = perSecond * (1 + 0.6 * Math.sin((2 * Math.PI * atMs) / 180_000));
    atMs += (-1000 * Math.log(1 - random.next())) / rate;
    const isCode = random.next() < 0.3;
    const size = (median: number): number => Math.ceil(median * Math.exp(random.normal()));
    requests.push({
      atMs,
      promptTokens: Math.min(7000, size(isCode ? 1500 : 700)),
      outputTokens: Math.min(1000, size(isCode ? 12 : 130)),
    });
  }
  return requests;
}

/** Gives requests tenants, classes and deadlines. */
export function trafficOf(
  requests: readonly Requested[],
  { deadlineShare, seed, load }: TrafficMix,
): Arrival[] {
  const random = new Random(seed);
  const arrivals: Arrival[] = [];
  for (const request of requests) {
    const whole = Math.floor(load);
    const copies = whole + (random.next() < load - whole ? 1 : 0);
    for (let copy = 0; copy < copies; copy += 1) {
      const place = random.below(6);
      const owner = tenants[place < 1 ? 0 : place < 3 ? 1 : 2]!;
      const hasDeadline = random.next() < deadlineShare;
      // From 5 seconds and 30 ms a token to ten times that.
      const usualMs = 5_000 + 30 * request.outputTokens + 2 * request.promptTokens;
      arrivals.push({
        ...request,
        ...owner,
        priority: random.next() < 0.1 ? 10 : 100,
        deadlineAfterMs: hasDeadline ? usualMs * (1 + 9 * random.next()) : null,
      });
    }
  }
  return arrivals;
}
