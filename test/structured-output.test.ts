/**
 * Answers that keep their shape, from a model of random weights, which wants to say nonsense: through the real ranks, every
 * answer that ends by itself is what its schema says, also one that another engine took over.
 *
 * CARAVAN_LONG=1 runs all 200 schemas instead of 40.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { Ajv2020 } from 'ajv/dist/2020.js';
import formats from 'ajv-formats';
import { RankEngine } from '../coordinator/engine.js';
import type { GrammarSpec } from '../coordinator/grammar.js';
import type { FinishReason, Sampling } from '../coordinator/request.js';
import { RankPool } from './rank-pool.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';
import { tinyTokenizer } from './real-engine.js';
import { schemas } from './schemas.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const MAX_TOKENS = 512;
const LIMITS = { maxSeqLen: MAX_TOKENS + 8, maxBatchSize: 16, maxStepRows: 64 };
const tokenizer = tinyTokenizer();
const ajv = new Ajv2020({ strict: false, multipleOfPrecision: 9 });
formats.default(ajv);

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-shapes-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});
writeRandomCheckpoint(scratch, {
  config: {
    ...{ hiddenSize: 64, ffnSize: 96, layerCount: 2, headCount: 4, kvHeadCount: 2, headSize: 16 },
    ...{ vocabSize: tokenizer.vocabSize, maxPositions: 1024, normEps: 1e-5, ropeTheta: 10_000 },
    isHeadTied: false,
  },
  ...{ seed: 5, format: 'F32', shardCount: 1 },
});

interface Answer {
  readonly text: string;
  readonly tokenIds: readonly number[];
  readonly reason: FinishReason;
}

interface Asked {
  readonly grammar: GrammarSpec;
  readonly sampling?: Partial<Sampling>;
  readonly maxTokens?: number;
  readonly resumeTokenIds?: readonly number[];
  readonly isTextStart?: boolean;
}

function ask(engine: RankEngine, { grammar, ...asked }: Asked): Promise<Answer> {
  const tokenIds: number[] = [...(asked.resumeTokenIds ?? [])];
  let text = '';
  return new Promise((resolve, reject) => {
    engine.add(
      {
        ...{ id: 'sequence', index: 0, resumeTokenIds: asked.resumeTokenIds ?? [] },
        request: {
          ...{ version: 1, model: 'random', promptTokenIds: [1, 300, 17], grammar },
          sampling: { temperature: 1, topP: 1, topK: 0, seed: 7, ...asked.sampling },
          ...{ maxTokens: asked.maxTokens ?? MAX_TOKENS, stop: [], ignoreEos: false },
          isTextStart: asked.isTextStart ?? true,
        },
      },
      {
        token: (tokenId, released) => {
          tokenIds.push(tokenId);
          text += released;
        },
        end: (reason, held) => {
          resolve({ text: text + held, tokenIds, reason });
        },
        fail: reject,
      },
    );
  });
}

async function withEngine(tp: number, use: (engine: RankEngine) => Promise<void>): Promise<void> {
  await pool.withGroup(scratch, { tp, ...LIMITS }, async ({ ranks }) => {
    const engine = new RankEngine(ranks, tokenizer, { ...LIMITS, isExact: true });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    try {
      await use(engine);
    } finally {
      stop.abort();
      await running;
    }
  });
}

/** As many at once as there are slots. */
async function askAll(engine: RankEngine, asked: readonly Asked[]): Promise<Answer[]> {
  const answers: Answer[] = [];
  const waiting = [...asked.entries()];
  await Promise.all(
    Array.from({ length: LIMITS.maxBatchSize }, async () => {
      for (let next = waiting.shift(); next !== undefined; next = waiting.shift()) {
        answers[next[0]] = await ask(engine, next[1]);
      }
    }),
  );
  return answers;
}

void test('a model of random weights answers within 512 tokens, and as each schema says', async (t) => {
  const chosen = schemas.filter((_, i) => isLong || i % 5 === 0);
  await withEngine(2, async (engine) => {
    const answers = await askAll(
      engine,
      chosen.map((schema, seed) => ({ grammar: { kind: 'schema', schema }, sampling: { seed } })),
    );
    let stopped = 0;
    answers.forEach(({ text, reason, tokenIds }, i) => {
      if (reason === 'length') {
        assert.equal(tokenIds.length, MAX_TOKENS);
        return;
      }
      stopped += 1;
      const isValid = ajv.compile(chosen[i]!);
      const name = `${JSON.stringify(chosen[i])}: ${text}`;
      assert.ok(isValid(JSON.parse(text)), `${name}: ${ajv.errorsText(isValid.errors)}`);
    });
    const tokens = answers.reduce((sum, { tokenIds }) => sum + tokenIds.length, 0);
    t.diagnostic(`${stopped} of ${answers.length} ended by themselves; ${tokens} tokens`);
    assert.ok(stopped >= 0.95 * answers.length, `only ${stopped} of ${answers.length} ended`);
  });
});

void test('greedy, hot and cut distributions keep the shape, at tp 1 and 4, with and without a first space', async () => {
  const schema = schemas.find((each) => JSON.stringify(each).includes('"street"'))!;
  const isValid = ajv.compile(schema);
  const samplings: Partial<Sampling>[] = [
    ...[{ temperature: 0 }, { temperature: 2 }, { topP: 0.3 }, { topK: 5 }, { minP: 0.5 }],
    {
      adjustment: {
        ...{ repetitionPenalty: 1.3, presencePenalty: 1, frequencyPenalty: 1 },
        biases: [[tokenizer.eosTokenIds[0]!, 100]],
      },
    },
  ];
  for (const tp of [1, 4]) {
    await withEngine(tp, async (engine) => {
      const asked = samplings.flatMap((sampling) =>
        [true, false].map((isTextStart): Asked => {
          return { grammar: { kind: 'schema', schema }, sampling, isTextStart };
        }),
      );
      for (const { text, reason } of await askAll(engine, asked)) {
        assert.equal(reason, 'stop');
        assert.ok(isValid(JSON.parse(text)), text);
      }
    });
  }
});

void test('patterns, choices and grammars are answered in full, and nothing else', async () => {
  const grammars: [GrammarSpec, RegExp][] = [
    [{ kind: 'regex', pattern: '(漢字|💡){2,3}-\\d{4}' }, /^(漢字|💡){2,3}-\d{4}$/u],
    [{ kind: 'choice', choices: ['yes', 'no', 'yesterday'] }, /^(yes|no|yesterday)$/],
    [
      {
        kind: 'gbnf',
        source:
          'root ::= sum\nsum ::= term ("+" term)? # at most two\nterm ::= [0-9]{1,3} | "(" [a-c] ")"',
      },
      /^(\d{1,3}|\([a-c]\))(\+(\d{1,3}|\([a-c]\)))?$/,
    ],
  ];
  await withEngine(2, async (engine) => {
    for (const [grammar, expected] of grammars) {
      const asked = [1, 2, 3, 4, 5].map((seed): Asked => ({ grammar, sampling: { seed } }));
      for (const { text, reason } of await askAll(engine, asked)) {
        assert.equal(reason, 'stop');
        assert.match(text, expected);
      }
    }
  });
});

void test('too few tokens end with length, and another engine goes on exactly where it was', async () => {
  const schema = schemas.find((each) => JSON.stringify(each).includes('"street"'))!;
  const grammar: GrammarSpec = { kind: 'schema', schema };
  await withEngine(2, async (engine) => {
    const whole = await ask(engine, { grammar });
    assert.equal(whole.reason, 'stop');
    const short = await ask(engine, { grammar, maxTokens: 5 });
    assert.equal(short.reason, 'length');
    assert.deepEqual(short.tokenIds, whole.tokenIds.slice(0, 5));
    const cuts = [1, 2, 7, whole.tokenIds.length - 1];
    const resumed = await askAll(
      engine,
      cuts.map((at) => ({ grammar, resumeTokenIds: whole.tokenIds.slice(0, at) })),
    );
    for (const answer of resumed) assert.deepEqual(answer.tokenIds, whole.tokenIds);
  });
});

void test('a grammar that costs too much fails its own request, before it begins', async () => {
  await withEngine(1, async (engine) => {
    const evil: GrammarSpec = { kind: 'regex', pattern: '(a?){3000}a{3000}' };
    await assert.rejects(ask(engine, { grammar: evil }), /too ambiguous/);
    const good = await ask(engine, { grammar: { kind: 'choice', choices: ['fine'] } });
    assert.equal(good.text, 'fine');
    assert.equal(engine.freeSlotCount, LIMITS.maxBatchSize);
  });
});
