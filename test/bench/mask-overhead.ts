/**
 * What keeping an answer's shape costs: the same model decodes freely and under a schema, in turns.
 *
 *   node dist/test/bench/mask-overhead.js MODEL [int4|fp32] [tokens]
 *
 * Prints milliseconds a step of each, and what of it compiling and telling masks took.
 */
import { RankEngine } from '../../coordinator/engine.js';
import type { StepFigures } from '../../coordinator/step-figures.js';
import { GrammarCache, type GrammarSpec } from '../../coordinator/grammar.js';
import { withLocalGroup } from '../../coordinator/local-group.js';
import { openModelChat } from '../../coordinator/model-tokenizer.js';

const [, , model, weights = 'fp32', count = '96'] = process.argv;
const maxTokens = Number(count);

const text = (maxLength: number) => ({ type: 'string', maxLength });
const person = {
  type: 'object',
  properties: {
    name: text(40),
    age: { type: 'integer', minimum: 0, maximum: 130 },
    tags: { type: 'array', items: text(20), maxItems: 4 },
    note: { type: 'string' },
    address: {
      type: 'object',
      properties: { street: text(60), number: { type: 'number' } },
      required: ['street', 'number'],
    },
  },
  required: ['name', 'age', 'tags', 'address', 'note'],
};
const grammar: GrammarSpec = {
  kind: 'schema',
  schema: { type: 'array', items: person, minItems: 100 },
};

const median = (values: readonly number[]): number =>
  [...values].sort((a, b) => a - b)[values.length >> 1]!;

const { tokenizer } = openModelChat(model);
const limits = { maxSeqLen: maxTokens + 32, maxBatchSize: 4, maxStepRows: 64 };
const tp = 2;

await withLocalGroup(
  {
    ...limits,
    model,
    tp,
    device: 'cpu',
    weights: weights as 'int4',
    exact: false,
    transport: 'auto',
  },
  async ({ ranks, spec }) => {
    let steps: StepFigures[] = [];
    const onStep = (figures: StepFigures): void => {
      steps.push(figures);
    };
    const engine = new RankEngine(ranks, tokenizer, { ...spec, isExact: false, onStep });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const run = async (isShaped: boolean, seed: number): Promise<number[]> => {
      steps = [];
      await new Promise<void>((resolve, reject) => {
        engine.add(
          {
            ...{ id: 'bench', index: 0, resumeTokenIds: [] },
            request: {
              ...{ version: 1, model: 'bench', promptTokenIds: [1, 300, 17], maxTokens, stop: [] },
              ...{ ignoreEos: !isShaped, isTextStart: true, ...(isShaped ? { grammar } : {}) },
              sampling: { temperature: 1, topP: 1, topK: 50, seed },
            },
          },
          {
            token: () => undefined,
            end: () => {
              resolve();
            },
            fail: reject,
          },
        );
      });
      return steps.slice(1).map(({ totalMs }) => totalMs);
    };
    await run(false, 0);
    const startMs = performance.now();
    const cache = new GrammarCache(tokenizer);
    cache.get(grammar);
    process.stdout.write(
      `compiling, the token tree included: ${(performance.now() - startMs).toFixed(1)} ms\n`,
    );
    const ratios: number[] = [];
    for (let turn = 1; turn <= 5; turn += 1) {
      const free = await run(false, turn);
      const shaped = await run(true, turn);
      const mean = (values: readonly number[]): number =>
        values.reduce((a, b) => a + b, 0) / values.length;
      ratios.push(mean(shaped) / mean(free));
      process.stdout.write(
        `turn ${turn}: free ${mean(free).toFixed(2)} (p50 ${median(free).toFixed(2)}), ` +
          `shaped ${mean(shaped).toFixed(2)} (p50 ${median(shaped).toFixed(2)}) ms a step, ` +
          `${((ratios.at(-1)! - 1) * 100).toFixed(1)} % more\n`,
      );
    }
    process.stdout.write(`median: ${((median(ratios) - 1) * 100).toFixed(1)} % more\n`);
    stop.abort();
    await running.catch(() => undefined);
  },
);
