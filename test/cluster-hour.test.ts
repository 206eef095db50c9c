/** Engines that come and go with the work: KEDA's algorithm over the real scaler's answers, in simulated time. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  BUSY_S,
  DAY_S,
  DAYS,
  engine,
  playHour,
  readArrivals,
  type Policy,
} from './cluster-hour.js';
import { Keda } from './keda.js';
import { Random } from './random.js';
import { sharedPath, skipWithout } from './shared.js';
import type { Arrival, Outcome } from './simulated-cluster.js';

const TRACE = 'data/traces/AzureLLMInferenceTrace_conv.csv';
const isLong = process.env['CARAVAN_LONG'] === '1';

void test("KEDA's algorithm goes up at once, down after a while, and to zero after the cooldown", () => {
  const keda = new Keda({ syncS: 15, stabilizationS: 300, cooldownS: 300, maxPods: 10 });
  assert.equal(keda.activity(0, 0, false), 0);
  assert.equal(keda.sync(0, 0, 500, 10), 0);
  assert.equal(keda.activity(1, 0, true), 1);
  assert.equal(keda.sync(15, 1, 95, 10), 5, 'at most four more, or twice as many');
  assert.equal(keda.sync(30, 5, 120, 10), 10, 'never more than the most');
  assert.equal(keda.sync(45, 10, 105, 10), 10, 'a tenth changes nothing');
  assert.equal(keda.sync(60, 10, 20, 10), 10, 'it waits before it shrinks');
  assert.equal(keda.sync(400, 10, 20, 10), 2);
  assert.equal(keda.activity(300, 2, false), 2);
  assert.equal(keda.activity(401, 2, false), 0);
  assert.equal(keda.activity(402, 0, true), 1);
  assert.equal(keda.activity(500, 1, false), 1);
});

function assertSound(outcome: Outcome, jobs: number): void {
  // That no job ended twice is thrown where it would.
  assert.equal(outcome.completed, jobs, 'every job ended');
  assert.ok(outcome.roundTrips >= DAYS, `0 → N → 0 ${outcome.roundTrips} times`);
  assert.ok(outcome.coldStartS <= engine.loadS + 10, `0 → 1 took ${outcome.coldStartS} s`);
  assert.equal(outcome.lostLoads, 0, 'no group was taken away while it loaded');
}

void test('three short days of random requests: from zero and back each time, nothing lost', async () => {
  const random = new Random(7);
  const arrivals: Arrival[] = Array.from({ length: 1500 }, (_, i) => ({
    atS: Math.floor((DAYS * i) / 1500) * DAY_S + (((DAYS * i) % 1500) / 1500) * BUSY_S,
    promptTokens: 100 + Math.floor(2000 * random.next()),
    outputTokens: 20 + Math.floor(600 * random.next()),
  }));
  const outcome = await playHour(arrivals, { kind: 'work', targetSeconds: 2, maxEngines: 4 });
  assertSound(outcome, arrivals.length);
  assert.ok(outcome.mostEngines > 1);
});

void test(
  'an hour of the trace: as good as a static cluster, for less, and better than by the length of the queue',
  { skip: isLong ? skipWithout(TRACE) : 'the full hour is in the long form' },
  async (context) => {
    const arrivals = readArrivals(sharedPath(TRACE));
    const maxEngines = 8;
    const play = async (policy: Policy): Promise<Outcome> => {
      const outcome = await playHour(arrivals, policy);
      assert.equal(outcome.completed, arrivals.length);
      context.diagnostic(
        `${JSON.stringify(policy)}: ${(100 * outcome.attainment).toFixed(2)} %, ${outcome.engineSeconds.toFixed(0)} engine-seconds`,
      );
      return outcome;
    };
    const fixed = await play({ kind: 'static', engines: maxEngines });
    const work = await play({ kind: 'work', targetSeconds: 2, maxEngines });
    assertSound(work, arrivals.length);
    const isGood = ({ attainment }: Outcome): boolean => attainment >= fixed.attainment - 0.02;
    assert.ok(isGood(work));
    assert.ok(work.engineSeconds <= 0.6 * fixed.engineSeconds);
    // KEDA's own default of 5 among them: whatever length is aimed at, it is worse, or serves worse than the goal is.
    for (const [counts, lengths] of [
      ['waiting', [5, 16]],
      ['all', [12, 16, 24]],
    ] as const) {
      for (const jobs of lengths) {
        const queue = await play({ kind: 'queue', jobs, counts, maxEngines });
        const isWorse =
          work.attainment >= queue.attainment && work.engineSeconds < queue.engineSeconds;
        assert.ok(isWorse || !isGood(queue), `${jobs} ${counts} jobs an engine`);
        if (jobs === 5) assert.ok(isWorse);
      }
    }
  },
);
