import assert from 'node:assert/strict';
import { test } from 'node:test';
import { LEAST_PREFIX, Slots, commonLength, type PrefixRequest } from '../coordinator/slots.js';
import { Random } from './random.js';

/** A sequence of the simulation: what it fed stays in the model's own copy of the cache. */
interface Running {
  readonly slot: number;
  readonly request: PrefixRequest;
  readonly tokens: number[];
  fed: number;
  hasBegun: boolean;
}

/** What a rank would have in its slots: tenant and token of every position. */
type Cache = string[][];

/** Sequences come, begin, grow and leave at random; conversations go on from each other. */
function simulate(seed: number, check: (cached: number, longest: number, isOwn: boolean) => void) {
  const random = new Random(seed);
  const count = 1 + random.below(6);
  const slots = new Slots(count);
  const cache: Cache = Array.from({ length: count }, () => []);
  const running: Running[] = [];
  const past: number[][] = [[]];
  for (let turn = 0; turn < 120; turn += 1) {
    const action = random.below(4);
    if (action === 0 && slots.freeCount > 0) {
      const start = random.pick(past);
      const tokens = [...start.slice(0, random.below(start.length + 1))];
      for (let i = 2 + random.below(30); i > 0; i -= 1) tokens.push(random.below(3));
      const request = { tenant: random.pick(['a', 'b']), tokens, limit: tokens.length - 2 };
      const slot = slots.take(request)!;
      assert.ok(
        running.every((other) => other.slot !== slot),
        'nobody loses a slot',
      );
      running.push({ slot, request, tokens, fed: 0, hasBegun: false });
    } else if (action === 1 && running.length > 0) {
      const one = random.pick(running);
      if (!one.hasBegun) {
        const { tenant, tokens, limit } = one.request;
        const named = tokens.map((token) => `${tenant}${token}`);
        const common = (row: readonly string[]): number => {
          let length = 0;
          while (length < limit && row[length] === named[length]) length += 1;
          return length;
        };
        const prefix = slots.find(one.slot, one.request);
        const source = cache[prefix.copiedFrom ?? one.slot]!;
        assert.ok(common(source) >= prefix.length, 'what is given is there, and of the tenant');
        check(prefix.length, Math.max(...cache.map(common)), prefix.copiedFrom === null);
        cache[one.slot] = source.slice(0, prefix.length);
        slots.begin(one.slot, one.request, prefix);
        one.fed = prefix.length;
        one.hasBegun = true;
      } else {
        const end = one.fed + 1 + random.below(20);
        while (one.tokens.length < end) one.tokens.push(random.below(3));
        for (; one.fed < end; one.fed += 1) {
          cache[one.slot]!.push(`${one.request.tenant}${one.tokens[one.fed]!}`);
        }
        slots.hold(one.slot, one.tokens, one.fed);
      }
    } else if (action === 2 && running.length > 0) {
      const [one] = running.splice(random.below(running.length), 1);
      past.push(one!.tokens);
      slots.release(one!.slot);
      // It hears of its last step when it has left.
      if (one!.hasBegun) slots.hold(one!.slot, one!.tokens, one!.fed);
    }
    assert.equal(slots.freeCount, count - running.length);
  }
}

void test('a sequence is given the longest beginning that its tenant has, and no more than its limit', () => {
  let given = 0;
  let copied = 0;
  for (let seed = 0; seed < 300; seed += 1) {
    simulate(seed, (cached, longest, isOwn) => {
      assert.equal(cached, longest < LEAST_PREFIX ? 0 : longest);
      if (cached > 0) given += 1;
      if (!isOwn) copied += 1;
    });
  }
  // The simulation shows both.
  assert.ok(given > 150 && copied > 50, `${given} given, ${copied} copied`);
});

const tokens = (length: number, first: number): number[] =>
  Array.from({ length }, (_, i) => first + i);
const asked = (own: readonly number[]): PrefixRequest => ({
  tenant: '',
  tokens: own,
  limit: own.length - 2,
});

function run(slots: Slots, own: readonly number[]): number {
  const request = asked(own);
  const slot = slots.take(request)!;
  slots.begin(slot, request, slots.find(slot, request));
  slots.hold(slot, own, own.length);
  slots.release(slot);
  return slot;
}

void test('empty slots come first, lowest first, then that which was used longest ago', () => {
  const slots = new Slots(3);
  const prompts = [0, 100, 200, 300, 400].map((first) => tokens(20, first));
  assert.deepEqual(
    prompts.slice(0, 3).map((own) => run(slots, own)),
    [0, 1, 2],
  );
  // The first is used again, so the second is the oldest.
  assert.equal(run(slots, prompts[0]!), 0);
  assert.equal(run(slots, prompts[3]!), 1);
  assert.equal(run(slots, prompts[4]!), 2);
});

void test('a conversation that goes on takes its slot over; a shared beginning alone is copied', () => {
  const slots = new Slots(3);
  const system = tokens(40, 0);
  const first = [...system, ...tokens(100, 1000)];
  assert.equal(run(slots, first), 0);
  assert.equal(run(slots, [...first, ...tokens(20, 2000)]), 0);
  const other = asked([...system, ...tokens(50, 3000)]);
  const slot = slots.take(other)!;
  assert.equal(slot, 1);
  assert.deepEqual(slots.find(slot, other), { length: 40, copiedFrom: 0 });
  // Where there is no other slot, it is better to lose the rest than to compute the beginning.
  const only = new Slots(1);
  run(only, first);
  assert.equal(only.take(other), 0);
  assert.deepEqual(only.find(0, other), { length: 40, copiedFrom: null });
});

void test('where nothing can be copied, a slot that begins alike is taken over', () => {
  const slots = new Slots(3, false);
  const first = tokens(140, 0);
  assert.equal(run(slots, first), 0);
  const other = asked([...first.slice(0, 40), ...tokens(50, 3000)]);
  const slot = slots.take(other)!;
  assert.equal(slot, 0);
  assert.deepEqual(slots.find(slot, other), { length: 40, copiedFrom: null });
  const second = slots.take(other)!;
  assert.deepEqual(slots.find(second, other), { length: 0, copiedFrom: null });
});

void test('no slot is given twice, and none when all are taken', () => {
  const slots = new Slots(2);
  const request = asked(tokens(20, 0));
  assert.deepEqual([slots.take(request), slots.take(request), slots.take(request)], [0, 1, null]);
  slots.release(1);
  slots.release(1);
  assert.equal(slots.freeCount, 1);
});

void test('the common length stops at the first difference, at the end, and at the limit', () => {
  assert.equal(commonLength([1, 2, 3], [1, 2, 4], 9), 2);
  assert.equal(commonLength([1, 2], [1, 2, 4], 9), 2);
  assert.equal(commonLength([1, 2, 3], [1, 2, 3], 1), 1);
  assert.equal(commonLength([], [1], 9), 0);
});
