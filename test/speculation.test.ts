import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { RankEngine, type EngineOptions, type SequenceSink } from '../coordinator/engine.js';
import type { StepFigures } from '../coordinator/step-figures.js';
import { PromptLookup } from '../coordinator/prompt-lookup.js';
import type { LogitAdjustment, Request } from '../coordinator/request.js';
import { chooseDrafts, MAX_DRAFT, StepCosts, type Guesser } from '../coordinator/speculation.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { tinyTokenizer } from './real-engine.js';
import { Random } from './random.js';
import { RankPool } from './rank-pool.js';

const LIMITS = { maxSeqLen: 256, maxBatchSize: 4, maxStepRows: 64 };
const pool = new RankPool();
const tokenizer = tinyTokenizer();

after(() => pool.stop());

/** Runs the requests at once, and returns what each sink heard, in order. */
async function run(
  requests: readonly Request[],
  options: Pick<EngineOptions, 'isExact' | 'draftTokens'>,
  resumeTokenIds: readonly number[] = [],
): Promise<{ heard: unknown[][]; steps: StepFigures[] }> {
  return pool.withGroup(embeddedModelPath(), { tp: 1, ...LIMITS }, async ({ ranks }) => {
    const steps: StepFigures[] = [];
    const onStep = (figures: StepFigures): void => {
      steps.push(figures);
    };
    const engine = new RankEngine(ranks, tokenizer, { ...LIMITS, ...options, onStep });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const heard = await Promise.all(
      requests.map(
        (request) =>
          new Promise<unknown[]>((resolve, reject) => {
            const events: unknown[] = [];
            const sink: SequenceSink = {
              token: (id, text, logprobs) => events.push([id, text, logprobs?.top]),
              end: (reason, text) => {
                resolve([...events, reason, text]);
              },
              fail: reject,
            };
            const spec = { id: 's', request, index: 0, resumeTokenIds, reportsLogprobs: true };
            engine.add(spec, sink);
          }),
      ),
    );
    stop.abort();
    await running;
    return { heard, steps };
  });
}

const story = tokenizer.encode(
  'Once upon a time there was a fox. The fox had a box. The fox had a',
);
/** Three tokens that are likelier than all others: answers repeat themselves, but not for ever. */
const biases: LogitAdjustment['biases'] = [400, 401, 402].map((id) => [id, 40]);
const adjustment: LogitAdjustment = {
  ...{ repetitionPenalty: 1.2, presencePenalty: 0.3, frequencyPenalty: 0.2, biases },
};
const unpenalized = { repetitionPenalty: 1, presencePenalty: 0, frequencyPenalty: 0, biases };
const request = (
  temperature: number,
  more: Partial<Request> = {},
  sampling: Partial<Request['sampling']> = {},
): Request => ({
  ...{ version: 1, model: 'tiny', promptTokenIds: [1, ...story, ...story], maxTokens: 40 },
  ...{ stop: [], ignoreEos: true, isTextStart: false, logprobs: 2, ...more },
  sampling: { temperature, topP: 0.9, topK: 0, seed: 5, adjustment: unpenalized, ...sampling },
});

const schema = {
  type: 'object',
  properties: {
    names: { type: 'array', items: { enum: ['fox', 'box'] }, minItems: 6, maxItems: 6 },
  },
  required: ['names'],
};
/** What a request can ask for that guessing must not change. */
const cases: [name: string, requests: Request[]][] = [
  ['greedy', [request(0)]],
  ['sampled', [request(0.7)]],
  ['hot', [request(1.5, {}, { topP: 1 })]],
  ['penalties', [request(0.7, {}, { adjustment }), request(0, {}, { adjustment })]],
  ['a stop text', [request(0.9, { stop: [tokenizer.decode([400, 401])] })]],
  ['few tokens left', [request(0, { maxTokens: 2 }), request(0, { maxTokens: 1 })]],
  ['the end of the slot', [request(0, { maxTokens: 1000 })]],
  [
    'a shape',
    [request(0.9, { grammar: { kind: 'schema', schema }, ignoreEos: false }, { topK: 50 })],
  ],
  [
    'several at once',
    [request(0), request(0.6), request(1, {}, { seed: 8 }), request(0.6, {}, { adjustment })],
  ],
];
for (const [name, requests] of cases) {
  void test(`guessed tokens change nothing: ${name}`, async () => {
    const plain = await run(requests, { isExact: false, draftTokens: 0 });
    const guessed = await run(requests, { isExact: false, draftTokens: 5 });
    assert.ok(plain.steps.every(({ draftTokens }) => draftTokens === 0));
    assert.deepEqual(rounded(guessed.heard), rounded(plain.heard));
    const sum = (of: (step: StepFigures) => number): number =>
      guessed.steps.reduce((total, step) => total + of(step), 0);
    if (requests[0]!.maxTokens < 10) return;
    assert.ok(sum((step) => step.draftTokens) > 0, 'nothing was guessed');
    assert.ok(sum((step) => step.acceptedTokens) > 0, 'nothing came true');
    assert.ok(guessed.steps.length < plain.steps.length);
  });
}

/** Rows beside others have other last bits. */
const rounded = (heard: unknown): unknown =>
  JSON.parse(JSON.stringify(heard), (_, value: unknown) =>
    typeof value === 'number' && !Number.isInteger(value) ? Math.round(value * 1e3) / 1e3 : value,
  );

void test('a sequence that was taken over guesses on, with the same tokens', async () => {
  const asked = request(0.7, {}, { adjustment });
  const whole = (await run([asked], { isExact: false, draftTokens: 0 })).heard[0]!;
  const resumed = whole.slice(0, 15).map((event) => (event as [number])[0]);
  const rest = (await run([asked], { isExact: false, draftTokens: 4 }, resumed)).heard[0]!;
  const ids = (events: unknown[]): unknown[] =>
    events.slice(0, -2).map((event) => (event as [number])[0]);
  assert.deepEqual(ids(rest), ids(whole).slice(15));
});

void test('what a sequence guessed last is not taken from the one that begins in its slot', async () => {
  const limits = { ...LIMITS, maxBatchSize: 1 };
  await pool.withGroup(embeddedModelPath(), { tp: 1, ...limits }, async ({ ranks }) => {
    let last: StepFigures | null = null;
    const onStep = (figures: StepFigures): void => {
      last = figures;
    };
    const options = { ...limits, isExact: false, draftTokens: 5, onStep };
    const engine = new RankEngine(ranks, tokenizer, options);
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    /** Adds the next one as soon as the slot is free, before the next step. */
    const ask = (asked: Request, leaves: 'ends' | 'is cancelled'): Promise<number[]> =>
      new Promise((resolve, reject) => {
        const ids: number[] = [];
        const sink: SequenceSink = {
          token: (id) => {
            ids.push(id);
            if (leaves === 'ends' || ids.length < 12) return;
            handle.cancel();
            resolve(ids);
          },
          end: () => {
            resolve(ids);
          },
          fail: reject,
        };
        const handle = engine.add({ id: 's', request: asked, index: 0, resumeTokenIds: [] }, sink);
      });
    const slotFree = async (): Promise<void> => {
      while (engine.freeSlotCount === 0) await new Promise(setImmediate);
    };
    // Shorter than what is given up, and without a beginning that could be kept.
    const short = request(0, { promptTokenIds: [1, 450, 451, 452], maxTokens: 6 });
    const alone = await ask(short, 'ends');
    let missed = 0;
    for (let seed = 0; seed < 12; seed += 1) {
      const stopText = tokenizer.decode([400, 402]);
      const first = request(0.9, { stop: [stopText], maxTokens: 60 }, { seed });
      await slotFree();
      await ask(first, seed % 3 === 0 ? 'is cancelled' : 'ends');
      await slotFree();
      const { draftTokens, acceptedTokens } = last!;
      if (draftTokens > acceptedTokens) missed += 1;
      assert.deepEqual(await ask(short, 'ends'), alone);
    }
    assert.ok(missed > 0, 'no guess was wrong in a last step');
    stop.abort();
    await running;
  });
});

void test('nothing is guessed in exact mode', async () => {
  const { steps } = await run([request(0)], { isExact: true });
  assert.ok(steps.every(({ draftTokens }) => draftTokens === 0));
});

void test('a lookup proposes what followed the same tokens, the latest time', () => {
  const tokens = [7, 1, 2, 3, 50, 51, 1, 2, 3, 60, 61, 1, 2];
  const lookup = new PromptLookup(tokens, tokens.length, 100);
  assert.deepEqual(lookup.propose(3), [3, 60, 61]);
  tokens.push(3);
  assert.deepEqual(lookup.propose(3), [60, 61, 1]);
  tokens.push(99);
  assert.deepEqual(lookup.propose(3), []);
  assert.equal(lookup.chance(0), 0);
  // One token is enough; two are looked up first.
  tokens.push(50);
  assert.deepEqual(lookup.propose(2), [51, 1]);
  tokens.push(7, 1, 2);
  assert.deepEqual(lookup.propose(2), [3, 50]);
  const loop = [1, 2, 3, 1, 2, 3];
  assert.deepEqual(new PromptLookup(loop, 6, 100).propose(7), [1, 2, 3, 1, 2, 3, 1]);
});

void test('chances follow what came true, and proposals are what the text has', () => {
  const random = new Random(3);
  const tokens = Array.from({ length: 200 }, () => random.below(50));
  const lookup = new PromptLookup(tokens, 200, 50);
  // A copy of the prompt, token by token.
  for (let at = 0; at < 150; at += 1) {
    tokens.push(tokens[at]!);
    if (at > 20) assert.deepEqual(lookup.propose(4), tokens.slice(at + 1, at + 5));
  }
  assert.ok(lookup.chance(0) > 0.95);
  assert.ok(lookup.chance(5) > 0.95);
  const other = Array.from({ length: 200 }, () => random.below(50));
  const poor = new PromptLookup(other, 200, 50);
  let sum = 0;
  for (let i = 0; i < 400; i += 1) {
    other.push(random.below(50));
    const chance = poor.chance(0);
    if (i >= 200) sum += chance;
  }
  // What has four equal tokens by accident is believed a few times; most have one.
  assert.ok(sum / 200 < 0.1, String(sum / 200));
});

void test('a guess is likelier the more tokens before it are the same', () => {
  const tokens = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 1, 2];
  const chances: number[] = [];
  const lookup = new PromptLookup(tokens, tokens.length, 100);
  // Nothing was seen to come true yet, nor not to.
  for (const next of [5, 6, 7, 8, 9, 10, 11, 12]) {
    chances.push(lookup.chance(0));
    tokens.push(next);
  }
  assert.equal(chances[0], 0);
  assert.ok(chances[1]! < chances[2]! && chances[2]! < chances[3]! && chances[3]! < chances[4]!);
  // And so are the later tokens of a draft.
  const fresh = new PromptLookup([1, 2, 3, 4, 9, 2], 6, 100);
  assert.ok(fresh.chance(0) < fresh.chance(1) && fresh.chance(1) < fresh.chance(2));
});

const guesser = (chance: number, draftLimit = 100): Guesser => ({
  chance: () => chance,
  draftLimit,
});
const costs = (...steps: [rows: number, ms: number][]): StepCosts => {
  const known = new StepCosts();
  for (const [rows, ms] of steps) known.add(rows, ms);
  return known;
};

void test('as many tokens are guessed as pay, by what steps take', () => {
  const cheap = costs([1, 10], [2, 10.1], [16, 11]);
  const dear = costs([1, 10], [2, 20], [16, 160]);
  assert.deepEqual(chooseDrafts([guesser(0.9)], 1, 50, cheap), [MAX_DRAFT]);
  assert.deepEqual(chooseDrafts([guesser(0.9)], 1, 50, dear), [0]);
  assert.deepEqual(chooseDrafts([guesser(0)], 1, 50, cheap), [0]);
  assert.deepEqual(chooseDrafts([guesser(0.9, 3)], 1, 50, cheap), [3]);
  assert.deepEqual(chooseDrafts([guesser(0.9)], 1, 2, cheap), [2]);
  assert.deepEqual(chooseDrafts([guesser(0.9)], 1, 0, cheap), [0]);
  // Without any measure nothing is known to pay; an unlikely guess does not where a row costs something.
  assert.deepEqual(chooseDrafts([guesser(0.9)], 1, 50, new StepCosts()), [0]);
  assert.deepEqual(chooseDrafts([guesser(0.05)], 1, 50, costs([1, 10], [2, 11])), [0]);
  // The likelier sequence guesses more.
  const [likely, unlikely] = chooseDrafts([guesser(0.9), guesser(0.3)], 2, 8, cheap);
  assert.ok(likely! > unlikely! && likely! + unlikely! <= 8);
});

void test('costs of steps are measured, or lie between what was', () => {
  const known = costs([2, 20], [6, 60]);
  assert.equal(known.of(4), 40);
  assert.equal(known.of(1), 20);
  assert.ok(known.of(8)! > 60 && known.of(8)! < 70);
  // One step that was disturbed does not decide.
  known.add(2, 10_000);
  assert.ok(known.of(2)! <= 24);
});
