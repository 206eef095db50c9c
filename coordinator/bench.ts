/**
 * Loads that are put on a gateway, and what came of them.
 *
 *   decode    all requests begin together with short prompts: how fast many tokens come
 *   prefill   long prompts of one token each: how fast prompts are read
 *   serve     every client asks again as soon as it is answered: what users would feel
 */
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { streamOnce, type BenchTarget, type TimedAnswer } from './bench-stream.js';

export const scenarios = ['decode', 'prefill', 'serve'] as const;
export type Scenario = (typeof scenarios)[number];

export interface BenchLoad {
  readonly scenario: Scenario;
  /** Requests at once. */
  readonly concurrency: number;
  readonly promptTokens: number;
  /** Of the prompt, those that all requests have in common from the start. */
  readonly prefixTokens: number;
  readonly maxTokens: number;
  /** Rounds of requests begin until then; one at least. */
  readonly durationMs: number;
  /** Draws the prompts. */
  readonly seed: number;
}

export interface Percentiles {
  readonly p50: number;
  readonly p90: number;
  readonly p99: number;
}

export interface BenchReport {
  readonly scenario: Scenario;
  readonly concurrency: number;
  readonly requests: number;
  readonly errors: number;
  /** Of the first request that failed. */
  readonly firstError: string | null;
  readonly durationS: number;
  readonly promptTokens: number;
  /** Of the prompt tokens, those that the server did not compute again. */
  readonly cachedTokens: number;
  readonly outputTokens: number;
  /** All output tokens, over the whole time. */
  readonly outputTokensPerSecond: number | null;
  /** While all streams of a round were past their first token; null where answers have one token. */
  readonly decodeTokensPerSecond: number | null;
  /** Prompt tokens that were computed, over the time until every stream of a round had its first token. */
  readonly prefillTokensPerSecond: number | null;
  readonly ttftMs: Percentiles | null;
  /** Between events of a stream; an event can bring several tokens. */
  readonly itlMs: Percentiles | null;
}

/**
 * Puts the load on the target.
 *
 * @throws CaravanError the first request's, when every request failed; the signal's reason when it aborts.
 */
export async function runBench(
  target: BenchTarget,
  load: BenchLoad,
  signal: AbortSignal,
): Promise<BenchReport> {
  const prompts = new BenchPrompts(load);
  const outcomes: (TimedAnswer | CaravanError)[] = [];
  const ask = async (): Promise<TimedAnswer | null> => {
    const prompt = { tokenIds: prompts.next(), maxTokens: load.maxTokens };
    const outcome = await streamOnce(target, prompt, signal).catch((thrown: unknown) => {
      signal.throwIfAborted();
      return toCaravanError(thrown);
    });
    outcomes.push(outcome);
    return outcome instanceof CaravanError ? null : outcome;
  };
  const startMs = performance.now();
  const isTime = (): boolean => performance.now() - startMs < load.durationMs;
  const clients = Array.from({ length: load.concurrency }, (_, i) => i);
  const rounds: TimedAnswer[][] = [];
  if (load.scenario === 'serve') {
    await Promise.all(
      clients.map(async () => {
        // Refused at once, a client would do nothing but ask.
        for (let isAnswered = true; isAnswered;) isAnswered = (await ask()) !== null && isTime();
      }),
    );
    rounds.push(...answered(outcomes).map((answer) => [answer]));
  } else {
    do {
      const round = await Promise.all(clients.map(ask));
      rounds.push(round.filter((answer) => answer !== null));
    } while (rounds.at(-1)!.length > 0 && isTime());
  }
  const failures = outcomes.filter((outcome) => outcome instanceof CaravanError);
  if (failures.length === outcomes.length) throw failures[0]!;
  return report(load, outcomes.length, failures, rounds, performance.now() - startMs);
}

const answered = (outcomes: readonly (TimedAnswer | CaravanError)[]): TimedAnswer[] =>
  outcomes.flatMap((outcome) => (outcome instanceof CaravanError ? [] : [outcome]));

/** @param rounds answers that ran at the same time. */
export function report(
  load: Pick<BenchLoad, 'scenario' | 'concurrency'>,
  requests: number,
  failures: readonly CaravanError[],
  rounds: readonly (readonly TimedAnswer[])[],
  wallMs: number,
): BenchReport {
  const answers = rounds.flat();
  const total = (of: (answer: TimedAnswer) => number): number =>
    answers.reduce((sum, answer) => sum + of(answer), 0);
  const perSecond = (count: number, ms: number): number | null =>
    count > 0 && ms > 0 ? (1000 * count) / ms : null;
  let decoded = 0;
  let decodeMs = 0;
  let prefilled = 0;
  let prefillMs = 0;
  for (const round of rounds) {
    const shown = round.filter(({ events }) => events.length > 0);
    if (shown.length === 0) continue;
    const firstMs = Math.max(...shown.map(({ events }) => events[0]!.atMs));
    const lastMs = Math.max(...shown.map(({ events }) => events.at(-1)!.atMs));
    prefillMs += firstMs - Math.min(...shown.map(({ startMs }) => startMs));
    decodeMs += lastMs - firstMs;
    for (const { events, promptTokens, cachedTokens } of shown) {
      prefilled += promptTokens - cachedTokens;
      decoded += events.at(-1)!.tokens - events.findLast(({ atMs }) => atMs <= firstMs)!.tokens;
    }
  }
  const outputTokens = total((answer) => answer.outputTokens);
  const gaps = answers.flatMap(({ events }) =>
    events.slice(1).map(({ atMs }, i) => atMs - events[i]!.atMs),
  );
  const firsts = answers.flatMap(({ startMs, events }) =>
    events.length > 0 ? [events[0]!.atMs - startMs] : [],
  );
  return {
    scenario: load.scenario,
    concurrency: load.concurrency,
    requests,
    errors: failures.length,
    firstError: failures[0]?.message ?? null,
    durationS: wallMs / 1000,
    promptTokens: total((answer) => answer.promptTokens),
    cachedTokens: total((answer) => answer.cachedTokens),
    outputTokens,
    outputTokensPerSecond: perSecond(outputTokens, wallMs),
    decodeTokensPerSecond: perSecond(decoded, decodeMs),
    prefillTokensPerSecond: perSecond(prefilled, prefillMs),
    ttftMs: percentiles(firsts),
    itlMs: percentiles(gaps),
  };
}

/** By nearest rank; null of nothing. */
export function percentiles(values: readonly number[]): Percentiles | null {
  if (values.length === 0) return null;
  const sorted = values.toSorted((a, b) => a - b);
  const at = (share: number): number => sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)]!;
  return { p50: at(0.5), p90: at(0.9), p99: at(0.99) };
}

/** Ids that every vocabulary has, and that are no special tokens: bytes, or first letters. */
const FIRST_ID = 3;
const ID_COUNT = 256;

type PromptLoad = Pick<BenchLoad, 'promptTokens' | 'prefixTokens' | 'seed'>;

/** Prompts of random tokens: no two alike but for the prefix. */
export class BenchPrompts {
  readonly #load: PromptLoad;
  readonly #prefix: readonly number[];
  #state: number;

  constructor(load: PromptLoad) {
    this.#load = load;
    this.#state = load.seed >>> 0;
    this.#prefix = this.#draw(load.prefixTokens);
  }

  next(): number[] {
    return [...this.#prefix, ...this.#draw(this.#load.promptTokens - this.#prefix.length)];
  }

  /** Mulberry32 (T. Ettinger, public domain). */
  #draw(count: number): number[] {
    return Array.from({ length: count }, () => {
      this.#state = (this.#state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return FIRST_ID + (((t ^ (t >>> 14)) >>> 0) % ID_COUNT);
    });
  }
}
