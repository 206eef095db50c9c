// llama.cpp beside us, through node-llama-cpp's prebuilt library: a child that loads a GGUF file and times what it is told.
//   started with FILE THREADS CONTEXT SEQUENCES; a message {prompts: [[ids]…], maxTokens} is answered by
//   {startMs, events: [[ms of every token]…]}
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const [file, threads, contextSize, sequenceCount, modules] = process.argv.slice(2);
const require = createRequire(`${modules}/`);
const { getLlama } = await import(pathToFileURL(require.resolve('node-llama-cpp')).href);
const llama = await getLlama({
  gpu: false,
  build: 'never',
  logLevel: 'error',
  maxThreads: Number(threads),
});
const model = await llama.loadModel({ modelPath: file });
const context = await model.createContext({
  contextSize: Number(contextSize),
  threads: Number(threads),
  batchSize: 512,
  sequences: Number(sequenceCount),
});
const sequences = Array.from({ length: Number(sequenceCount) }, () => context.getSequence());
process.on('message', async ({ prompts, maxTokens }) => {
  for (const sequence of sequences) await sequence.clearHistory();
  const startMs = performance.now();
  const events = await Promise.all(
    prompts.map(async (prompt, i) => {
      const times = [];
      const tokens = sequences[i].evaluate(prompt, { temperature: 0, yieldEogToken: true });
      while (times.length < maxTokens && !(await tokens.next()).done) times.push(performance.now());
      await tokens.return();
      return times;
    }),
  );
  process.send({ startMs, events });
});
process.send('ready');
