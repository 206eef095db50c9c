/** Which job comes next: nothing starves, deadlines come in order, tenants get their shares, whatever arrives. */
import assert from 'node:assert/strict';
import { test } from 'node:test';
import {
  AGED_TURN,
  chooseJob,
  chooseVictim,
  compareJobs,
  laneOf,
  MAX_PREEMPTIONS,
  type HeldJob,
  type QueuedJob,
} from '../coordinator/order.js';
import { OrderBook } from './order-book.js';
import { Random } from './random.js';

const rules = { agedAfterMs: 60_000 };

function jobOf(id: string, job: Partial<QueuedJob> = {}): QueuedJob {
  return {
    ...{ id, tenant: 'default', weight: 1, priority: 100, deadlineMs: null, queuedMs: 0 },
    ...{ tokens: 100, outputTokens: 50, latestStartMs: null, preemptions: 0 },
    ...job,
  };
}

function randomJob(draw: Random, number: number, tenants: readonly string[]): QueuedJob {
  const queuedMs = 1_700_000_000_000 + draw.below(1e6);
  const deadlineMs = draw.next() < 0.5 ? null : queuedMs + draw.below(1e6);
  const isPromised = deadlineMs !== null && draw.next() < 0.5;
  return jobOf(`job-${number}`, {
    tenant: draw.pick(tenants),
    priority: draw.pick([1, 10, 100, 1000]),
    ...{ queuedMs, deadlineMs },
    latestStartMs: isPromised ? deadlineMs - draw.below(1e5) : null,
    tokens: 1 + draw.below(1000),
  });
}

void test("the order of a tenant's jobs is total, and its texts say the same", () => {
  const draw = new Random(1);
  const jobs = Array.from({ length: 300 }, (_, i) => randomJob(draw, i, ['one']));
  const sorted = [...jobs].sort(compareJobs);
  for (let i = 1; i < sorted.length; i += 1) {
    const [a, b] = [sorted[i - 1]!, sorted[i]!];
    assert.ok(compareJobs(a, b) < 0 && compareJobs(b, a) > 0);
    assert.ok(laneOf(a) < laneOf(b));
    assert.ok(a.priority <= b.priority);
    if (a.priority < b.priority) continue;
    // Deadlines before none, early ones first; then the oldest.
    assert.ok((a.deadlineMs ?? Infinity) <= (b.deadlineMs ?? Infinity));
    if (a.deadlineMs === null) assert.ok(a.queuedMs <= b.queuedMs);
  }
});

void test('a lower class is never chosen before a higher one, unless it is due or aged', () => {
  for (let seed = 0; seed < 200; seed += 1) {
    const draw = new Random(seed);
    const book = new OrderBook();
    const nowMs = 1_700_000_000_000 + draw.next() * 1.2e6;
    const jobs = Array.from({ length: 1 + draw.below(40) }, (_, i) =>
      randomJob(draw, i, ['one', 'two', 'three']),
    );
    for (const job of jobs) book.add(job);
    const left = new Set(jobs);
    while (left.size > 0) {
      const choice = chooseJob(book.view(nowMs), nowMs, rules)!;
      const { job, reason } = choice;
      assert.ok(left.has(job), `seed ${seed}: chosen twice, or never added`);
      const isDue = (other: QueuedJob): boolean =>
        other.latestStartMs !== null && other.latestStartMs <= nowMs;
      const dues = [...left].filter(isDue);
      const earliest = (others: readonly QueuedJob[]): number =>
        Math.min(...others.map(({ deadlineMs }) => deadlineMs ?? Infinity));
      if (reason === 'promised') assert.equal(job.deadlineMs, earliest(dues), `seed ${seed}`);
      if (reason === 'class') {
        assert.equal(dues.length, 0, `seed ${seed}`);
        assert.equal(job.priority, Math.min(...[...left].map(({ priority }) => priority)));
        const equals = [...left].filter(({ priority }) => priority === job.priority);
        const own = equals.filter(({ tenant }) => tenant === job.tenant);
        assert.equal(job.deadlineMs ?? Infinity, earliest(own), `seed ${seed}: EDF in a class`);
      }
      book.take(choice);
      left.delete(job);
    }
    assert.equal(chooseJob(book.view(nowMs), nowMs, rules), null);
  }
});

void test('promised jobs of one class come by deadline, whoever their tenants are', () => {
  const book = new OrderBook();
  const deadlines = [50, 10, 40, 20, 30].map((s) => 1e6 + s * 1000);
  for (const [i, deadlineMs] of deadlines.entries()) {
    book.add(jobOf(`p${i}`, { tenant: `t${i}`, deadlineMs, latestStartMs: deadlineMs - 5000 }));
  }
  book.add(jobOf('unpromised', { tenant: 't9' }));
  const order: number[] = [];
  for (;;) {
    const choice = chooseJob(book.view(0), 0, rules);
    if (choice === null) break;
    order.push(choice.job.deadlineMs ?? Infinity);
    book.take(choice);
  }
  assert.deepEqual(order, [...deadlines.sort((a, b) => a - b), Infinity]);
});

void test('tenants that always want more get tokens by their weights', () => {
  for (let seed = 0; seed < 8; seed += 1) {
    const draw = new Random(seed);
    const book = new OrderBook();
    const weights = new Map([1, 2, 3, 0.5].map((weight, i) => [`t${i}`, weight]));
    const served = new Map<string, number>();
    let number = 0;
    const refill = (tenant: string): void => {
      const tokens = 1 + draw.below(2000);
      const weight = weights.get(tenant)!;
      book.add(jobOf(`j${(number += 1)}`, { tenant, weight, tokens, queuedMs: number }));
    };
    for (const tenant of weights.keys()) for (let i = 0; i < 3; i += 1) refill(tenant);
    let total = 0;
    for (let i = 0; i < 5000; i += 1) {
      const choice = chooseJob(book.view(i), i, { agedAfterMs: Infinity })!;
      book.take(choice);
      total += choice.job.tokens;
      served.set(choice.job.tenant, (served.get(choice.job.tenant) ?? 0) + choice.job.tokens);
      refill(choice.job.tenant);
    }
    const sum = [...weights.values()].reduce((a, b) => a + b);
    for (const [tenant, weight] of weights) {
      const error = Math.abs(served.get(tenant)! / total / (weight / sum) - 1);
      assert.ok(error < 0.02, `seed ${seed}, ${tenant}: off by ${error}`);
    }
  }
});

void test('a tenant that was away has no claim to what it missed', () => {
  const book = new OrderBook();
  for (let i = 0; i < 100; i += 1) book.add(jobOf(`a${i}`, { tenant: 'busy', queuedMs: i }));
  for (let i = 0; i < 50; i += 1) book.take(chooseJob(book.view(0), 0, rules)!);
  for (let i = 0; i < 50; i += 1) book.add(jobOf(`b${i}`, { tenant: 'late', queuedMs: i }));
  const next = Array.from({ length: 20 }, () => {
    const choice = chooseJob(book.view(0), 0, rules)!;
    book.take(choice);
    return choice.job.tenant;
  });
  const late = next.filter((tenant) => tenant === 'late').length;
  assert.ok(late >= 10 && late <= 11, `the late one got ${late} of 20`);
});

void test('nothing starves: an old job is chosen within one round of turns, whatever comes in', () => {
  for (let seed = 0; seed < 20; seed += 1) {
    const draw = new Random(seed);
    const book = new OrderBook();
    book.add(jobOf('patient', { priority: 1000, tenant: 'poor', weight: 0.01 }));
    let nowMs = 0;
    let choicesSinceAged = 0;
    for (let i = 0; ; i += 1) {
      // More arrives than is taken: urgent ones, promised ones that are due, of many tenants.
      for (let k = 0; k < 2; k += 1) {
        const isPromised = draw.next() < 0.5;
        const deadlineMs = nowMs + 1;
        book.add(
          jobOf(`${i}-${k}`, {
            ...{ priority: 1, tenant: `t${draw.below(5)}`, queuedMs: nowMs },
            ...(isPromised ? { deadlineMs, latestStartMs: nowMs - 1 } : {}),
          }),
        );
      }
      const choice = chooseJob(book.view(nowMs), nowMs, rules)!;
      book.take(choice);
      if (nowMs >= rules.agedAfterMs) choicesSinceAged += 1;
      if (choice.job.id === 'patient') break;
      assert.ok(choicesSinceAged <= AGED_TURN, `seed ${seed}: it waits for ever`);
      nowMs += 500 * draw.next();
    }
  }
});

const heldOf = (id: string, job: Partial<HeldJob> = {}): HeldJob => ({
  ...jobOf(id, job),
  sinceMs: job.sinceMs ?? 0,
});

void test('the least urgent job makes room, and only for a much more urgent one', () => {
  const nowMs = 100_000;
  const held = [
    heldOf('usual'),
    heldOf('batch, earlier', { priority: 1000, sinceMs: 1000 }),
    heldOf('batch, later', { priority: 1000, sinceMs: 2000 }),
    heldOf('batch, just taken', { priority: 1000, sinceMs: nowMs - 10 }),
    heldOf('batch, often moved', { priority: 1000, sinceMs: 3000, preemptions: MAX_PREEMPTIONS }),
    heldOf('batch, promised', {
      ...{ priority: 1000, sinceMs: 3000 },
      ...{ deadlineMs: nowMs + 5000, latestStartMs: nowMs + 100 },
    }),
  ];
  const victim = (job: QueuedJob, reason: 'aged' | 'promised' | 'class' = 'class') =>
    chooseVictim({ job, reason }, held, nowMs)?.id ?? null;
  assert.equal(victim(jobOf('new')), 'batch, later');
  assert.equal(victim(jobOf('batch', { priority: 1000 })), null);
  assert.equal(victim(jobOf('batch', { priority: 999 })), null);
  assert.equal(victim(jobOf('old', { priority: 1 }), 'aged'), null);
  const due = jobOf('due', { priority: 1000, deadlineMs: nowMs + 4000, latestStartMs: nowMs });
  assert.equal(victim(due, 'promised'), 'batch, later');
  assert.equal(chooseVictim({ job: jobOf('new'), reason: 'class' }, held.slice(3), nowMs), null);
  assert.equal(chooseVictim({ job: due, reason: 'promised' }, [held[0]!], nowMs)?.id, 'usual');
});

void test('however urgent the others, a job makes room a bounded number of times', () => {
  const draw = new Random(7);
  let victim = heldOf('victim', { priority: 1000 });
  let moves = 0;
  for (let nowMs = 0; nowMs < 1e6; nowMs += 1000 * draw.next()) {
    const urgent = jobOf(`u${nowMs}`, { priority: 1 });
    if (chooseVictim({ job: urgent, reason: 'class' }, [victim], nowMs) === null) continue;
    moves += 1;
    victim = { ...victim, preemptions: victim.preemptions + 1, sinceMs: nowMs };
  }
  assert.equal(moves, MAX_PREEMPTIONS);
});
