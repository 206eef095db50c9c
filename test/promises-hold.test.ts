/**
 * An hour of requests through the production order, admission and step planning, in simulated time: what was promised
 * holds, though the speeds that admission reckons with are wrong by up to 30 %; little less is promised than a clairvoyant
 * would; tenants get their shares, and nothing starves. The long form takes the trace's full hour.
 */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { sharedPath, skipWithout } from './shared.js';
import { madeUpRequests, traceRequests, trafficOf, type TrafficMix } from './traffic.js';
import { simulate, type Outcome, type World } from './traffic-simulator.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const TRACES = ['code', 'conv'].map((kind) => `data/traces/AzureLLMInferenceTrace_${kind}.csv`);
const HOUR_MS = 3_600_000;
const MADE_UP_MS = 400_000;
/** Turns make up for promises, which go by time, only later: shares are looked at over this long. */
const SHARED_MS = 1_600_000;
const MOST_SHARE_ERROR = 0.05;

/** One engine that the hour's requests need a fifth more of than there is. */
const engine: World = {
  ...{ pace: { stepMs: 20, rowMs: 0.04, recentStepMs: 0 }, slots: 32, maxStepRows: 512 },
  ...{ readingError: 0.3, bias: 0, jobError: 0, agedAfterMs: 600_000, seed: 1 },
};

interface Setting {
  readonly name: string;
  readonly deadlineShare: number;
  readonly world?: Partial<World>;
  readonly seed?: number;
}

const settings: readonly Setting[] = [
  { name: 'every reading off by up to 30 %', deadlineShare: 0.5 },
  { name: 'the same, other draws', deadlineShare: 0.5, seed: 2 },
  { name: 'every job off by up to 30 %', deadlineShare: 0.5, world: { jobError: 0.3 } },
  { name: 'speeds taken for 30 % faster', deadlineShare: 0.5, world: { bias: -0.3 } },
  { name: 'speeds taken for 30 % slower', deadlineShare: 0.5, world: { bias: 0.3 } },
  { name: 'all with deadlines', deadlineShare: 1 },
  { name: 'all with deadlines, other draws', deadlineShare: 1, seed: 2 },
  { name: 'all, every job off', deadlineShare: 1, world: { jobError: 0.3 } },
  { name: 'all, taken for faster', deadlineShare: 1, world: { bias: -0.3 } },
  { name: 'all, taken for slower', deadlineShare: 1, world: { bias: 0.3 } },
  { name: 'a slower engine: 1.5 times too much', deadlineShare: 0.5, world: slower(0.06) },
];

function slower(rowMs: number): Partial<World> {
  return { pace: { ...engine.pace, rowMs } };
}

function assertSound(name: string, outcome: Outcome): void {
  const { missed, worstLatenessMs, acceptedTokens, clairvoyantTokens, fairShareError } = outcome;
  assert.equal(missed, 0, `${name}: ${missed} late, by up to ${worstLatenessMs} ms`);
  const share = acceptedTokens / clairvoyantTokens;
  assert.ok(share >= 0.9, `${name}: ${share} of what a clairvoyant accepts`);
  assert.equal(outcome.starved, 0, `${name}: jobs never ended`);
  assert.ok(fairShareError !== null, `${name}: tenants never shared`);
}

function assertFair(name: string, { fairShareError }: Outcome): void {
  const error = fairShareError ?? Infinity;
  assert.ok(error <= MOST_SHARE_ERROR, `${name}: a tenant's share is off by ${error}`);
}

const percent = (share: number): string => `${(100 * share).toFixed(1)} %`;

function rowOf(name: string, outcome: Outcome): string {
  const { accepted, jobs, missed, acceptedTokens, clairvoyantTokens, fairShareError } = outcome;
  return [
    ...[name, `${accepted} of ${jobs} accepted`, `${missed} missed`],
    `${percent(acceptedTokens / clairvoyantTokens)} of a clairvoyant's work`,
    `shares off by ${percent(fairShareError ?? 0)}`,
    `${outcome.starved} starved, longest wait ${(outcome.longestWaitMs / 1000).toFixed(0)} s`,
    `${outcome.preemptions} made room`,
  ].join('; ');
}

function play(requests: Parameters<typeof trafficOf>[0], setting: Setting): Outcome {
  const { deadlineShare, world, seed = 1 } = setting;
  const mix: TrafficMix = { deadlineShare, seed, load: 1 };
  return simulate(trafficOf(requests, mix), { ...engine, ...world, seed });
}

for (const setting of settings) {
  const { name, seed = 1 } = setting;
  const isOther = seed !== 1;
  if (!isLong && !isOther) {
    void test(`made-up minutes: ${name}`, () => {
      assertSound(name, play(madeUpRequests(MADE_UP_MS, 7.5, seed), setting));
    });
  }
  const skip = isLong ? skipWithout(TRACES[0]!) : 'the full hour is in the long form';
  void test(`the hour of the trace: ${name}`, { skip }, (context) => {
    const outcome = play(traceRequests(TRACES.map(sharedPath), HOUR_MS), setting);
    context.diagnostic(rowOf(name, outcome));
    assertSound(name, outcome);
    assertFair(name, outcome);
  });
}

for (const [name, deadlineShare] of [
  ['half of them with deadlines', 0.5],
  ['all with deadlines', 1],
] as const) {
  const skip = isLong ? 'the long form looks at hours' : false;
  void test(`tenants get their shares of what is made up, ${name}`, { skip }, () => {
    const outcome = play(madeUpRequests(SHARED_MS, 7.5, 1), { name, deadlineShare });
    assertSound(name, outcome);
    assertFair(name, outcome);
  });
}
