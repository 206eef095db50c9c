/**
 * What guessing tokens gives: the same answers with and without, in turns.
 *
 *   node dist/test/bench/speculation.js MODEL [QUESTIONS.jsonl [COUNT]] [--weights MODE] [--runs N]
 *
 * Three tasks that repeat their prompt (copy, summarise, edit), and the first turns of questions in MT-Bench's format,
 * {"turns": ["…"]}, which do not.
 */
import fs from 'node:fs';
import { parseArgs } from 'node:util';
import { RankEngine } from '../../coordinator/engine.js';
import type { StepFigures } from '../../coordinator/step-figures.js';
import { openModelChat } from '../../coordinator/model-tokenizer.js';
import type { Config } from '../../coordinator/config.js';
import { RankPool } from '../rank-pool.js';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    weights: { type: 'string', default: 'int4+int8' },
    runs: { type: 'string', default: '3' },
    tokens: { type: 'string', default: '96' },
  },
});
const [model, questionFile, questionCount = '16'] = positionals;
if (model === undefined) throw new Error('usage: speculation MODEL [QUESTIONS.jsonl [COUNT]]');
const maxTokens = Number(values.tokens);

const text =
  'The caravan left the town of Merv at dawn with forty llamas, nine drivers and a cook named Osman. ' +
  'Each llama carried two sacks of salt, and the strongest carried three. At the river Tedzhen the drivers ' +
  'counted the sacks, found eighty-one, and wrote the number into a small red book. Two days later a storm ' +
  'covered the road with sand, and the caravan waited at a well until the stars came out again.';
const tasks: [name: string, prompts: string[]][] = [
  ['copy', [`Repeat this text word for word, and nothing else:\n\n${text}`]],
  ['summarise', [`Summarise this text in two sentences, with its own words:\n\n${text}`]],
  [
    'edit',
    [`Write this text again, with "camels" in place of "llamas", and nothing else:\n\n${text}`],
  ],
];
if (questionFile !== undefined) {
  const lines = fs.readFileSync(questionFile, 'utf8').trim().split('\n');
  const turns = lines.map((line) => (JSON.parse(line) as { turns: [string] }).turns[0]);
  tasks.push([`MT-Bench × ${questionCount}`, turns.slice(0, Number(questionCount))]);
}

const { tokenizer, chat } = openModelChat(model);
const limits = { tp: 2, maxSeqLen: 1024, maxBatchSize: 1, maxStepRows: 256 };
const pool = new RankPool();

interface Outcome {
  readonly decodeMs: number;
  readonly tokenIds: readonly number[];
  readonly draft: number;
  readonly accepted: number;
}

/** All prompts one after the other in a fresh engine. */
async function run(prompts: readonly string[], draftTokens: 'adaptive' | 0): Promise<Outcome> {
  const group = { ...limits, weights: values.weights as Config['weights'], exact: false };
  return pool.withGroup(model!, group, async ({ ranks }) => {
    let steps: StepFigures[] = [];
    const onStep = (figures: StepFigures): void => {
      steps.push(figures);
    };
    const engine = new RankEngine(ranks, tokenizer, {
      ...limits,
      isExact: false,
      draftTokens,
      onStep,
    });
    const stop = new AbortController();
    const running = engine.run(stop.signal);
    const ask = (promptTokenIds: readonly number[], count: number): Promise<number[]> =>
      new Promise((resolve, reject) => {
        const ids: number[] = [];
        const request = {
          ...{ version: 1 as const, model: 'bench', promptTokenIds, maxTokens: count, stop: [] },
          ...{ ignoreEos: false, isTextStart: true },
          sampling: { temperature: 0, topP: 1, topK: 0, seed: 0 },
        } as const;
        engine.add(
          { id: 'bench', request, index: 0, resumeTokenIds: [] },
          {
            token: (id) => ids.push(id),
            end: () => {
              resolve(ids);
            },
            fail: reject,
          },
        );
      });
    await ask(chat.render([{ role: 'user', content: 'Hello' }]), 8);
    let decodeMs = 0;
    let draft = 0;
    let accepted = 0;
    const tokenIds: number[] = [];
    for (const prompt of prompts) {
      steps = [];
      tokenIds.push(...(await ask(chat.render([{ role: 'user', content: prompt }]), maxTokens)));
      // Steps of decodes have few rows; those of the prompt come first.
      const first = steps.findIndex(({ rows }, i) => i > 0 && rows <= 16);
      for (const step of first === -1 ? [] : steps.slice(first)) {
        decodeMs += step.totalMs;
        draft += step.draftTokens;
        accepted += step.acceptedTokens;
      }
    }
    stop.abort();
    await running;
    return { decodeMs, tokenIds, draft, accepted };
  });
}

const median = (numbers: readonly number[]): number =>
  numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

try {
  print(
    'task              tokens  guessing   same    plain   guessing    ratio  guessed  accepted   (ms a token)',
  );
  for (const [name, prompts] of tasks) {
    const outcomes: [plain: Outcome, guessing: Outcome][] = [];
    for (let i = 0; i < Number(values.runs); i += 1) {
      outcomes.push([await run(prompts, 0), await run(prompts, 'adaptive')]);
    }
    const [plain, guessing] = outcomes.at(-1)!;
    const same = plain.tokenIds.filter((id, i) => id === guessing.tokenIds[i]).length;
    // Texts may part where two tokens are as likely, and end elsewhere: what a token takes can be compared.
    const perToken = ({ decodeMs, tokenIds }: Outcome): number => decodeMs / tokenIds.length;
    const plainMs = median(outcomes.map(([one]) => perToken(one)));
    const guessingMs = median(outcomes.map(([, one]) => perToken(one)));
    const share =
      guessing.draft === 0 ? '-' : `${((100 * guessing.accepted) / guessing.draft).toFixed(0)} %`;
    print(
      [
        name.padEnd(16),
        String(plain.tokenIds.length).padStart(7),
        String(guessing.tokenIds.length).padStart(9),
        String(same).padStart(6),
        plainMs.toFixed(1).padStart(8),
        guessingMs.toFixed(1).padStart(10),
        (plainMs / guessingMs).toFixed(2).padStart(8),
        String(guessing.draft).padStart(9),
        share.padStart(9),
      ].join(' '),
    );
  }
} finally {
  await pool.stop();
}
