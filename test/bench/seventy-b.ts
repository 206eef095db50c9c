/**
 * How fast Llama 2 70B would decode one sequence on 1 to 8 devices: a calculation from measured parts, not a measurement.
 *
 *   node dist/test/bench/seventy-b.js [FILE…]
 *
 * The files are those of `gpu.sh`: 7B on one device and on two, and 70B on two. A step is
 *
 *   bytes of weights a rank / bandwidth that its products reach + all-reduces · what one costs
 *
 * where an all-reduce costs what a step of 7B on two devices takes beyond half of one on one device, all losses of
 * narrower matrices included. The bandwidth is what is left of 70B's step on two devices with the same weights.
 */
import fs from 'node:fs';
import path from 'node:path';
import { packageRoot } from '../../coordinator/package-root.js';
import { planRanks } from '../../model/plan.js';
import { weightBytes, weightForms, type WeightsMode } from '../../model/weights.js';
import { llama2Shapes } from './shape-checkpoint.js';

interface Measured {
  readonly model: string;
  readonly tp: number;
  readonly weights: string;
  readonly transport: string;
  readonly allReduces: number;
  readonly weightBytesPerRank: number;
  readonly decode: readonly { readonly batch: number; readonly stepMs: number }[];
}

const results = path.join(packageRoot, 'test/bench/results');
const defaults = ['h200x2-gpu-7b', 'h200x2-gpu-70b'].map((name) =>
  path.join(results, `2026-11-26-${name}.json`),
);
const files = process.argv.length > 2 ? process.argv.slice(2) : defaults;
const all = files.flatMap(
  (file) => (JSON.parse(fs.readFileSync(file, 'utf8')) as { results: Measured[] }).results,
);

const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};
function measured(model: string, tp: number, weights: string): Measured {
  const found = all.find((r) => r.model === model && r.tp === tp && r.weights === weights);
  if (found === undefined) throw new Error(`${model} at tp ${tp} in ${weights} was not measured`);
  return found;
}
const alone = ({ decode }: Measured): number => decode.find(({ batch }) => batch === 1)!.stepMs;

print('70B, one sequence: a calculation from measured parts');
for (const mode of ['fp16', 'int8', 'int4'] as const satisfies WeightsMode[]) {
  const [one, two] = [measured('7b', 1, mode), measured('7b', 2, mode)];
  const allReduceMs = (alone(two) - alone(one) / 2) / two.allReduces;
  const large = measured('70b', 2, mode);
  const bytesPerMs = large.weightBytesPerRank / (alone(large) - large.allReduces * allReduceMs);
  print(
    `${mode}: products at ${(bytesPerMs / 1e9).toFixed(2)} TB/s, an all-reduce ${(1000 * allReduceMs).toFixed(0)} µs`,
  );
  for (const tp of [2, 4, 8]) {
    const config = llama2Shapes['70b'];
    const forms = weightForms(config, tp, mode, false, 'cuda');
    const bytes = Math.max(
      ...planRanks(config, tp, forms.ffnGrid).map((plan) => weightBytes(config, plan, forms)),
    );
    const computeMs = bytes / bytesPerMs;
    const exchangeMs = (2 * config.layerCount + 1) * allReduceMs;
    const stepMs = computeMs + exchangeMs;
    const seen = all.find((r) => r.model === '70b' && r.tp === tp && r.weights === mode);
    print(
      `  tp ${tp}: ${(bytes / 1e9).toFixed(1)} GB a rank, products ${computeMs.toFixed(1)} ms, all-reduces ` +
        `${exchangeMs.toFixed(1)} ms: ${stepMs.toFixed(1)} ms, ${(1000 / stepMs).toFixed(0)} tokens/s` +
        (seen === undefined ? '' : ` (measured ${alone(seen).toFixed(1)} ms)`),
    );
  }
}
