import assert from 'node:assert/strict';
import { test } from 'node:test';
import { adaptBudget, planStep, type Schedulable } from '../coordinator/scheduler.js';
import { Random } from './random.js';

class Fake implements Schedulable {
  readonly slot: number;
  readonly promptLength: number;
  prefillLeft: number;
  decoded = 0;
  draft: readonly number[] = [];

  constructor(slot: number, promptLength: number) {
    this.slot = slot;
    this.promptLength = promptLength;
    this.prefillLeft = promptLength;
  }
}

const MIN_PREFILL = 16;

/** Runs steps over random sequences, some of which come later, until every prompt has been fed. */
function* randomSteps(random: Random, maxChunkTokens: number) {
  const count = 1 + random.below(20);
  const slots = Array.from({ length: count }, (_, slot) => slot).sort(() => random.next() - 0.5);
  const waiting = slots.map((slot) => new Fake(slot, 1 + random.below(random.pick([3, 40, 600]))));
  const sequences: Fake[] = [];
  const tokenBudget = random.pick([16, 17, 32, 64, 512]);
  for (let step = 0; ; step += 1) {
    assert.ok(step < 10_000, 'prompts are never done');
    if (waiting.length > 0 && (sequences.length === 0 || random.below(3) === 0)) {
      sequences.push(waiting.pop()!);
    }
    const plan = planStep(sequences, { tokenBudget, maxChunkTokens });
    yield { plan, sequences, tokenBudget };
    for (const { sequence, count: fed } of plan.chunks) sequence.prefillLeft -= fed;
    for (const sequence of plan.decodes) sequence.decoded += 1;
    if (waiting.length === 0 && sequences.every(({ prefillLeft }) => prefillLeft === 0)) return;
  }
}

function forEachStep(
  seed: number,
  maxChunks: readonly number[],
  check: (
    step: ReturnType<typeof randomSteps> extends Generator<infer S> ? S : never,
    maxChunkTokens: number,
  ) => void,
): void {
  const random = new Random(seed);
  for (let run = 0; run < 300; run += 1) {
    const maxChunkTokens = random.pick(maxChunks);
    for (const step of randomSteps(random, maxChunkTokens)) check(step, maxChunkTokens);
  }
}

void test('a chunk has two tokens or more, and never leaves one behind', () => {
  forEachStep(1, [3, 4, 7, 16, 512], ({ plan }) => {
    for (const { sequence, count } of plan.chunks) {
      // A prompt of one token has no other choice.
      if (sequence.promptLength > 1) {
        assert.ok(count >= 2, `${count} of ${sequence.prefillLeft}`);
        assert.notEqual(sequence.prefillLeft - count, 1);
      }
    }
  });
});

void test('a step keeps to its budget, but for decodes and the least share of prompts', () => {
  forEachStep(2, [1, 2, 5, 512], ({ plan, tokenBudget }, maxChunkTokens) => {
    const prefill = plan.chunks.reduce((sum, { count }) => sum + count, 0);
    assert.ok(prefill <= Math.max(MIN_PREFILL, tokenBudget - plan.decodes.length));
    for (const { sequence, count } of plan.chunks) {
      assert.ok(count >= 1 && count <= maxChunkTokens && count <= sequence.prefillLeft);
    }
  });
});

void test('every decoding sequence is in every step, by rising slot, and nobody twice', () => {
  forEachStep(3, [1, 3, 512], ({ plan, sequences }) => {
    const decoding = sequences.filter(({ prefillLeft }) => prefillLeft === 0);
    assert.deepEqual(
      plan.decodes.map(({ slot }) => slot),
      decoding.map(({ slot }) => slot).sort((a, b) => a - b),
    );
    const all = [...plan.decodes, ...plan.chunks.map(({ sequence }) => sequence)];
    assert.equal(new Set(all).size, all.length);
  });
});

void test('the oldest prompt gets on in every step, and younger ones do not overtake', () => {
  forEachStep(4, [1, 3, 512], ({ plan, sequences }) => {
    const prefilling = sequences.filter(({ prefillLeft }) => prefillLeft > 0);
    assert.equal(plan.chunks[0]?.sequence, prefilling[0]);
    const order = plan.chunks.map(({ sequence }) => prefilling.indexOf(sequence));
    assert.deepEqual(
      order,
      [...order].sort((a, b) => a - b),
    );
  });
});

void test('planning changes nothing', () => {
  forEachStep(5, [7], ({ plan, sequences, tokenBudget }, maxChunkTokens) => {
    assert.deepEqual(planStep(sequences, { tokenBudget, maxChunkTokens }), plan);
  });
});

void test('the budget shrinks while ranks are deaf for long, and grows back within its limits', () => {
  let budget = 512;
  for (let i = 0; i < 20; i += 1) budget = adaptBudget(budget, 512, budget, 100_000);
  assert.equal(budget, 16);
  for (let i = 0; i < 20; i += 1) budget = adaptBudget(budget, 512, budget, 1_000);
  assert.equal(budget, 512);
  // A step that did not use its budget says nothing about a larger one.
  assert.equal(adaptBudget(64, 512, 3, 1_000), 64);
  const random = new Random(6);
  for (let i = 0; i < 1000; i += 1) {
    budget = adaptBudget(budget, 512, 1 + random.below(budget), random.below(100_000));
    assert.ok(budget >= 16 && budget <= 512 && Number.isInteger(budget));
  }
});
