/**
 * Must hold for every Llama: the engine generates the tokens of the oracle, however the model is cut, the prompt is
 * chunked and the batch is filled.
 *
 * The oracle is fed the engine's own tokens, so that every position counts, also after a tie: where the two
 * largest logits are closer than float32 arithmetic can tell, either token is right, and it is reported.
 *
 * CARAVAN_LONG=1 runs 56 models instead of 8, with 17 sequences of 64 tokens instead of 9 of 24.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import { RankEngine, type SequenceSpec } from '../coordinator/engine.js';
import type { FinishReason } from '../coordinator/request.js';
import type { LlamaConfig } from '../model/config.js';
import { argmax, margin, Oracle, prefill } from './oracle.js';
import { Random } from './random.js';
import { writeRandomCheckpoint, type RandomCheckpoint } from './random-checkpoint.js';
import { RankPool } from './rank-pool.js';
import { fakeTokenizer } from './fake-tokenizer.js';

const TIE = 1e-4;
const MAX_SEQ_LEN = 112;
/** Rows of a step: small, so that long prompts are still in prefill while others decode. */
const MAX_STEP_ROWS = 64;

const isLong = process.env['CARAVAN_LONG'] === '1';
const modelCount = isLong ? 56 : 8;
const TOKENS = isLong ? 64 : 24;
const SLOTS = isLong ? 16 : 8;

const headSizes = [8, 16, 64, 128];
const ratios = [1, 2, 4, 8];

interface Case {
  readonly checkpoint: RandomCheckpoint;
  readonly tp: number;
  /** Undefined: as much as a step takes. */
  readonly maxChunkTokens: number | undefined;
  readonly random: Random;
}

/** Every head size, ratio and tp comes up in each eight cases, in other combinations each time. */
function makeCase(index: number): Case {
  const random = new Random(1000 + index);
  const round = Math.floor(index / 8);
  const tp = (index % 8) + 1;
  const ratio = ratios[(index + round) % 4]!;
  const headSize = headSizes[(Math.floor(index / 2) + 3 * round) % 4]!;
  // Enough query heads for the tp; KV heads need not divide it.
  const kvHeadCount = Math.ceil(tp / ratio) + random.below(2);
  const config: LlamaConfig = {
    hiddenSize: random.pick([48, 64, 80, 96]),
    ffnSize: random.pick([61, 89, 101, 131]),
    layerCount: 2 + random.below(2),
    headCount: kvHeadCount * ratio,
    kvHeadCount,
    headSize,
    vocabSize: random.pick([97, 131, 199, 251]),
    maxPositions: 128,
    normEps: random.pick([1e-5, 1e-6]),
    ropeTheta: random.pick([10_000, 500_000]),
    isHeadTied: random.below(3) === 0,
  };
  return {
    checkpoint: {
      config,
      seed: index,
      format: (['F32', 'BF16', 'F16'] as const)[index % 3]!,
      shardCount: 1 + (index % 2) * 2,
    },
    tp,
    maxChunkTokens: [undefined, 1, 5, 2, 16, 3, undefined, 7][(index + round) % 8],
    random,
  };
}

const describe = ({ checkpoint: { config, format }, tp, maxChunkTokens }: Case): string =>
  `tp ${tp}, head size ${config.headSize}, ${config.headCount}/${config.kvHeadCount} heads, ` +
  `hidden ${config.hiddenSize}, FFN ${config.ffnSize}, ${config.layerCount} layers, vocabulary ` +
  `${config.vocabSize}, ${config.isHeadTied ? 'tied, ' : ''}${format}, chunks of ${maxChunkTokens ?? 'any size'}`;

/** Ragged: a slot that becomes full, a chunk and one token more, one token, and random lengths. */
function promptLengths({ maxChunkTokens, random }: Case): number[] {
  const chunk = maxChunkTokens ?? 16;
  const special = [MAX_SEQ_LEN - 10, 3 * chunk + 1, 1, chunk, chunk + 1, 2];
  return Array.from({ length: SLOTS }, (_, i) => special[i] ?? 1 + random.below(45));
}

interface Generated {
  readonly prompt: readonly number[];
  readonly tokens: number[];
  reason: FinishReason | null;
}

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-models-'));
const pool = new RankPool();
after(async () => {
  await pool.stop();
  fs.rmSync(scratch, { recursive: true });
});

for (let index = 0; index < modelCount; index += 1) {
  const tried = makeCase(index);
  void test(`model ${index}: ${describe(tried)}`, { timeout: 120_000 }, async (t) => {
    const folder = path.join(scratch, String(index));
    writeRandomCheckpoint(folder, tried.checkpoint);
    const generated = await generateAll(folder, tried);
    assert.equal(generated.length, 1 + SLOTS);
    const oracle = new Oracle(folder);
    let ties = 0;
    let least = Infinity;
    generated.forEach(({ prompt, tokens, reason }, i) => {
      assert.equal(reason, 'length');
      assert.equal(tokens.length, Math.min(TOKENS, MAX_SEQ_LEN - prompt.length));
      const { cache, logits: first } = prefill(oracle, prompt);
      let logits = first;
      tokens.forEach((token, position) => {
        const distance = margin(logits);
        least = Math.min(least, distance);
        if (distance < TIE) {
          ties += 1;
          t.diagnostic(
            `tie: sequence ${i}, token ${position}: margin ${distance.toExponential(1)}`,
          );
          const short = logits[argmax(logits)]! - logits[token]!;
          assert.ok(short < TIE, `sequence ${i}, token ${position}: ${short} below the best`);
        } else {
          assert.equal(token, argmax(logits), `sequence ${i}, token ${position}`);
        }
        if (position + 1 < tokens.length) logits = oracle.next(cache, token);
      });
    });
    const count = generated.reduce((sum, { tokens }) => sum + tokens.length, 0);
    t.diagnostic(`${count} tokens, ${ties} ties, least margin ${least.toExponential(1)}`);
    fs.rmSync(folder, { recursive: true });
  });
}

/** One sequence alone, then as many as there are slots, of which half come while the others are decoding. */
async function generateAll(folder: string, tried: Case): Promise<Generated[]> {
  const { checkpoint, tp, maxChunkTokens, random } = tried;
  const { vocabSize } = checkpoint.config;
  const limits = { maxSeqLen: MAX_SEQ_LEN, maxBatchSize: SLOTS, maxStepRows: MAX_STEP_ROWS };
  return pool.withGroup(folder, { tp, ...limits }, async ({ ranks }) => {
    const engine = new RankEngine(ranks, fakeTokenizer(vocabSize), {
      ...limits,
      // The group's own number of rows, which is at least this.
      ...(maxChunkTokens === undefined ? {} : { maxChunkTokens }),
      isExact: true,
    });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    running.catch(() => undefined);
    const generated: Generated[] = [];
    const start = (length: number, onToken: (count: number) => void = () => undefined) => {
      const prompt = Array.from({ length }, () => random.below(vocabSize));
      const sequence: Generated = { prompt, tokens: [], reason: null };
      const spec = specOf(prompt, generated.length);
      generated.push(sequence);
      return new Promise<void>((resolve, reject) => {
        engine.add(spec, {
          token: (token) => {
            sequence.tokens.push(token);
            onToken(sequence.tokens.length);
          },
          end: (reason) => {
            sequence.reason = reason;
            resolve();
          },
          fail: reject,
        });
      });
    };
    try {
      await start(promptLengths(tried)[1]!);
      const lengths = promptLengths(tried);
      const late: Promise<void>[] = [];
      const early = lengths.slice(0, SLOTS / 2).map((length, i) =>
        start(length, (count) => {
          // Each of the early ones brings one of the late ones, at a token of its own.
          if (count === 1 + i) late.push(start(lengths[SLOTS / 2 + i]!));
        }),
      );
      await Promise.all(early);
      await Promise.all(late);
      assert.equal(engine.freeSlotCount, SLOTS);
    } finally {
      stop.abort();
      await running;
    }
    return generated;
  });
}

const specOf = (promptTokenIds: readonly number[], number: number): SequenceSpec => ({
  id: `sequence-${number}`,
  index: 0,
  resumeTokenIds: [],
  request: {
    version: 1,
    model: 'random',
    promptTokenIds,
    sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
    maxTokens: TOKENS,
    stop: [],
    ignoreEos: true,
    isTextStart: false,
  },
});
