import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { RankEngine } from '../coordinator/engine.js';
import type { StepFigures } from '../coordinator/step-figures.js';
import type { Request } from '../coordinator/request.js';
import { planStep, type Schedulable } from '../coordinator/scheduler.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { fakeTokenizer } from './fake-tokenizer.js';
import { RankPool } from './rank-pool.js';

const pool = new RankPool();
after(() => pool.stop());

void test('a prompt of 2,000 tokens takes part in steps of one chunk, and every stream goes on in each', () => {
  const decoding = Array.from({ length: 8 }, (_, slot) => ({ slot, prefillLeft: 0, draft: [] }));
  const late = { slot: 8, prefillLeft: 2000, draft: [] };
  const tokenBudget = 64;
  let steps = 0;
  for (; late.prefillLeft > 0; steps += 1) {
    const sequences: Schedulable[] = [...decoding, late];
    const { decodes, chunks } = planStep(sequences, { tokenBudget, maxChunkTokens: 512 });
    assert.equal(decodes.length, decoding.length);
    const chunkRows = chunks.reduce((sum, { count }) => sum + count, 0);
    assert.ok(decodes.length + chunkRows <= tokenBudget, 'a step is never more than one chunk');
    late.prefillLeft -= chunkRows;
  }
  assert.equal(steps, Math.ceil(2000 / (tokenBudget - decoding.length)));
});

void test('real streams get a token in every step while a long prompt is read beside them', async () => {
  const limits = { maxSeqLen: 512, maxBatchSize: 4, maxStepRows: 32 };
  await pool.withGroup(embeddedModelPath(), { tp: 2, ...limits }, async ({ ranks, checkpoint }) => {
    const { vocabSize } = checkpoint.config;
    const steps: (StepFigures & { streamed: number })[] = [];
    let streamed = 0;
    const onStep = (figures: StepFigures): void => {
      steps.push({ ...figures, streamed });
      streamed = 0;
    };
    const options = { ...limits, isExact: false, draftTokens: 0, onStep };
    const engine = new RankEngine(ranks, fakeTokenizer(vocabSize), options);
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const ask = (promptLength: number, maxTokens: number, onToken: (count: number) => void) =>
      new Promise<void>((resolve, reject) => {
        const request: Request = {
          ...{
            version: 1,
            model: 'tiny',
            maxTokens,
            stop: [],
            ignoreEos: true,
            isTextStart: false,
          },
          promptTokenIds: Array.from(
            { length: promptLength },
            (_, i) => (promptLength + i * 7) % 256,
          ),
          sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
        };
        let count = 0;
        const end = (): void => {
          resolve();
        };
        const token = (): void => {
          onToken((count += 1));
        };
        engine.add(
          { id: 's', request, index: 0, resumeTokenIds: [] },
          { token, end, fail: reject },
        );
      });
    let first = -1;
    const late: Promise<void>[] = [];
    const streams = [3, 5, 9].map((length) =>
      ask(length, 120, (count) => {
        streamed += 1;
        if (length === 3 && count === 5) {
          first = steps.length + 1;
          late.push(ask(450, 1, () => undefined));
        }
      }),
    );
    await Promise.all(streams);
    await Promise.all(late);
    stop.abort();
    await running;
    const reading = steps.slice(first).filter(({ rows }) => rows > 4);
    assert.ok(reading.length >= 450 / 32 - 1, `${reading.length} steps read the prompt`);
    for (const { rows, streamed: tokens } of reading) {
      assert.equal(tokens, 3);
      assert.ok(rows <= 32);
    }
  });
});
