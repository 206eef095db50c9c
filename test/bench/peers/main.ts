/**
 * Caravan beside llama.cpp on the same GGUF file, in turns within one run: ratios, which say more than figures of a
 * machine that others use too.
 *
 *   node dist/test/bench/peers/main.js [--runs 5] [--model FILE.gguf] [--weights MODE] [--peer FOLDER] [--only NAME]
 *
 * Ours goes through the whole stack, from HTTP to two ranks of one thread; llama.cpp runs in its process with two
 * threads. node-llama-cpp is installed into FOLDER on the first run, and a file of TinyLlama-1.1B's shape is written.
 */
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { BenchPrompts, report, type BenchReport } from '../../../coordinator/bench.js';
import { streamOnce, type TimedAnswer } from '../../../coordinator/bench-stream.js';
import { withCaravan } from '../../../coordinator/own-caravan.js';
import { writeRandomGguf } from '../../random-gguf.js';
import { installPeer, LlamaCpp, PEER_VERSION } from './llama-cpp.js';

const folder = path.join(os.tmpdir(), 'caravan-peers');
const { values } = parseArgs({
  options: {
    runs: { type: 'string', default: '5' },
    model: { type: 'string', default: path.join(folder, 'tinyllama-shape.gguf') },
    weights: { type: 'string', default: 'int4+int8' },
    peer: { type: 'string', default: folder },
    only: { type: 'string' },
  },
});

interface Trial {
  readonly name: string;
  readonly sequences: number;
  readonly promptTokens: number;
  readonly maxTokens: number;
  readonly figure: (figures: BenchReport) => number | null;
}

const decoded = (figures: BenchReport) => figures.decodeTokensPerSecond;
const trials: Trial[] = [
  { name: 'decode-1', sequences: 1, promptTokens: 16, maxTokens: 48, figure: decoded },
  { name: 'decode-16', sequences: 16, promptTokens: 16, maxTokens: 24, figure: decoded },
  {
    ...{ name: 'prefill-512', sequences: 1, promptTokens: 512, maxTokens: 1 },
    figure: (figures: BenchReport) => figures.prefillTokensPerSecond,
  },
].filter(({ name }) => values.only === undefined || name === values.only);

const median = (numbers: readonly number[]): number =>
  numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;
const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

fs.mkdirSync(folder, { recursive: true });
installPeer(values.peer);
if (!fs.existsSync(values.model)) writeRandomGguf(values.model);
const signal = new AbortController().signal;
const llamaCpp = await LlamaCpp.start({
  ...{ modules: path.resolve(values.peer), file: values.model, threads: 2 },
  ...{ contextSize: 1024, sequences: 16 },
});
const args = ['--model', values.model, '--tp', '2', '--weights', values.weights];
// Random weights repeat themselves, and guessing would be paid for nothing that users have.
args.push('--speculation', 'off', '--weight-cache', 'off');
try {
  await withCaravan(
    [...args, '--max-seq-len', '1024', '--port', '0', '--log-level', 'error'],
    signal,
    async (url) => {
      const target = { url, apiKey: undefined, model: undefined, temperature: 0 };
      const ours = (prompts: readonly number[][], maxTokens: number): Promise<TimedAnswer[]> =>
        Promise.all(prompts.map((tokenIds) => streamOnce(target, { tokenIds, maxTokens }, signal)));
      print(
        `${os.cpus()[0]?.model ?? '?'}, load ${os.loadavg()[0]!.toFixed(1)}; weights ${values.weights}; ` +
          `node-llama-cpp ${PEER_VERSION}; tokens/s, medians of ${values.runs} runs in turns`,
      );
      print('trial           ours  llama.cpp   ratio (of medians)   ratios of the runs');
      for (const { name, sequences, promptTokens, maxTokens, figure } of trials) {
        const drawn = new BenchPrompts({ promptTokens, prefixTokens: 0, seed: promptTokens });
        const draw = (): number[][] => Array.from({ length: sequences }, () => drawn.next());
        const load = { scenario: 'decode', concurrency: sequences } as const;
        const measured = (answers: TimedAnswer[]): number =>
          figure(report(load, answers.length, [], [answers], 0)) ?? NaN;
        const pairs: [ours: number, peer: number][] = [];
        // One run that does not count.
        for (let run = 0; run <= Number(values.runs); run += 1) {
          const prompts = draw();
          const peer = measured(await llamaCpp.run(prompts, maxTokens));
          const own = measured(await ours(prompts, maxTokens));
          if (run > 0) pairs.push([own, peer]);
        }
        const own = median(pairs.map(([rate]) => rate));
        const peer = median(pairs.map(([, rate]) => rate));
        const ratios = pairs.map(([a, b]) => (a / b).toFixed(2)).join(' ');
        print(
          `${name.padEnd(12)} ${own.toFixed(1).padStart(7)} ${peer.toFixed(1).padStart(10)} ${(own / peer).toFixed(2).padStart(7)}               ${ratios}`,
        );
      }
    },
  );
} finally {
  await llamaCpp.stop();
}
