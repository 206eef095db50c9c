/**
 * What a cut of the model costs, rank by rank: each rank of a group computes alone, one after the other, so that groups
 * of more ranks than this machine has cores can be judged. The slowest rank's time is that of the group, if each had a
 * core and a memory of its own and all-reduces cost nothing: a calculation, not a measurement of a group. The fastest of
 * several runs counts: what others do on this machine only adds.
 *
 *   node dist/test/bench/splits.js MODEL [--weights int8] [--tp 1,2,3,4] [--runs 9]
 */
import os from 'node:os';
import { parseArgs } from 'node:util';
import { openCheckpoint } from '../../model/checkpoint.js';
import { planRanks, type RankPlan } from '../../model/plan.js';
import { weightBytes, weightForms, type WeightsMode } from '../../model/weights.js';
import { SampledRows, type Step } from '../../proto/gen/cluster.js';
import type { AllReduce } from '../../worker/all-reduce.js';
import { Forward } from '../../worker/forward.js';
import { HostDevice } from '../../worker/host-device.js';
import { allocate } from '../../worker/memory.js';
import { Ort } from '../../worker/ort.js';
import { Pacer } from '../../worker/pacer.js';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    weights: { type: 'string', default: 'int8' },
    tp: { type: 'string', default: '1,2,3,4' },
    runs: { type: 'string', default: '9' },
  },
});
const [model] = positionals;
if (model === undefined) throw new Error('usage: splits MODEL [--weights MODE] [--tp 1,2,3,4]');
const mode = values.weights as WeightsMode;
const [SLOTS, MAX_SEQ_LEN, CHUNK] = [16, 512, 128];

const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};

/** The other ranks' partials are zeros that are always there. */
function aloneAmong(tp: number, capacity: number): AllReduce {
  const turn = () => Array.from({ length: tp }, () => allocate(capacity));
  return {
    partials: [turn(), turn()],
    direct: null,
    attach: () => null,
    exchange: () => null,
    abort: () => undefined,
    close: () => undefined,
  };
}

interface Times {
  readonly share: number;
  /** Milliseconds of one decoding row, of SLOTS of them, and of a chunk. */
  readonly one: number;
  readonly many: number;
  readonly chunk: number;
}

const ort = new Ort(1);
const checkpoint = openCheckpoint(model);
const { config } = checkpoint;

async function timesOf(plan: RankPlan, tp: number): Promise<Times> {
  const forms = weightForms(config, tp, mode, false);
  const limits = { maxSeqLen: MAX_SEQ_LEN, maxBatchSize: SLOTS, maxStepRows: CHUNK };
  const origin = { checkpoint, plan, mode, forms };
  const { signal } = new AbortController();
  const shard = await new HostDevice(ort).load(origin, limits, () => undefined, signal);
  const allReduce = aloneAmong(tp, CHUNK * config.hiddenSize);
  const open = await shard.openPass(limits, allReduce);
  const forward = new Forward(open.pass, new Pacer());
  const slots = Array.from({ length: SLOTS }, (_, slot) => slot);
  let number = 0;
  // All over the vocabulary: the rows of a rank that has none of a step's tokens are zeros at first.
  const tokenAt = (i: number): number => (i * 7919) % config.vocabSize;
  const step = async (decodeSlots: number[], chunks: Step['chunks'], joins: number[]) => {
    number += 1;
    const startMs = performance.now();
    await forward.run({
      ...{ number, decodeSlots, decodeTokens: decodeSlots.map(tokenAt), chunks },
      ...{ joins: joins.map((slot) => ({ slot, temperature: 0 })), topK: 1 },
    });
    return performance.now() - startMs;
  };
  const chunkOf = (slot: number, count: number): Step['chunks'][number] => ({
    ...{ slot, sampledRows: SampledRows.SAMPLED_ROWS_NONE, targets: [] },
    tokens: Array.from({ length: count }, (_, i) => tokenAt(i + 7 * slot)),
  });
  const repeat = async (run: () => Promise<number>): Promise<number> => {
    const times: number[] = [];
    for (let i = 0; i < Number(values.runs); i += 1) times.push(await run());
    return Math.min(...times);
  };
  for (const slot of slots) await step([], [chunkOf(slot, 8)], [slot]);
  const one = await repeat(() => step([0], [], []));
  const many = await repeat(() => step(slots, [], []));
  const chunk = await repeat(() => step([], [chunkOf(0, CHUNK)], [0]));
  open.release();
  shard.release();
  const whole = planRanks(config, 1, forms.ffnGrid)[0]!;
  const share = weightBytes(config, plan, forms) / weightBytes(config, whole, forms);
  return { share, one, many, chunk };
}

print(`${os.cpus()[0]?.model ?? '?'}, load ${os.loadavg()[0]!.toFixed(1)}, weights ${mode}`);
print(`ms, the fastest of ${values.runs}; one rank at a time: of groups, a calculation`);
print(`tp  rank  share of weights   one row   ${SLOTS} rows   ${CHUNK} of a prompt`);
let whole: Times | null = null;
for (const tp of values.tp.split(',').map(Number)) {
  const { ffnGrid } = weightForms(config, tp, mode, false);
  const ranks: Times[] = [];
  for (const [rank, plan] of planRanks(config, tp, ffnGrid).entries()) {
    const times = await timesOf(plan, tp);
    ranks.push(times);
    const figures = [times.one, times.many, times.chunk].map((ms) => ms.toFixed(1).padStart(10));
    print(
      `${String(tp).padEnd(4)}${String(rank).padEnd(6)}${times.share.toFixed(3)}         ${figures.join('')}`,
    );
  }
  whole ??= ranks[0]!;
  const slowest = (figure: (times: Times) => number): number => Math.max(...ranks.map(figure));
  const gain = (figure: (times: Times) => number): string =>
    (figure(whole!) / slowest(figure)).toFixed(2);
  const figures = [gain(({ one }) => one), gain(({ many }) => many), gain(({ chunk }) => chunk)];
  print(
    `${tp}   slowest: ${figures.join(', ')} times as fast as tp 1, by its share of weights ${(1 / slowest(({ share }) => share)).toFixed(2)}`,
  );
}
