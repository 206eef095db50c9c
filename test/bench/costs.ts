/**
 * What a step costs as work grows: by position, batch and tp. Prints a table, and draws it.
 *
 *   node dist/test/bench/costs.js MODEL [--weights MODE] [--tp 1,2] [--svg FILE] [--positions N] [--json FILE]
 *
 * Ranks have one thread each. With more ranks than cores the time of a step is no measure: they are left out.
 */
import fs from 'node:fs';
import os from 'node:os';
import { parseArgs } from 'node:util';
import type { Config } from '../../coordinator/config.js';
import type { Ranks } from '../../coordinator/ranks.js';
import { SampledRows, type Chunk } from '../../proto/gen/cluster.js';
import { RankPool } from '../rank-pool.js';
import { linesSvg, type Line } from './lines-svg.js';

const { positionals, values } = parseArgs({
  allowPositionals: true,
  options: {
    weights: { type: 'string', default: 'int4+int8' },
    tp: { type: 'string', default: '1,2' },
    svg: { type: 'string' },
    json: { type: 'string' },
    positions: { type: 'string', default: '4096' },
    transport: { type: 'string', default: 'auto' },
  },
});
const [model] = positionals;
if (model === undefined) throw new Error('usage: costs MODEL [--svg FILE]');
const lastPosition = Number(values.positions);
const MOST_SLOTS = 32;
const CHUNK = 256;
const STEPS = 7;
const WARM_UP_STEPS = 40;

const print = (line: string): void => {
  process.stdout.write(`${line}\n`);
};
const median = (numbers: readonly number[]): number =>
  numbers.toSorted((a, b) => a - b)[numbers.length >> 1]!;

interface Costs {
  readonly tp: number;
  readonly byPosition: (readonly [position: number, ms: number])[];
  readonly byBatch: (readonly [batch: number, ms: number])[];
  /** Tokens a second of a prompt of this many tokens. */
  readonly prefill: (readonly [tokens: number, perSecond: number])[];
}

/** Steps straight to the ranks: what they take is the slowest rank's own figure, and the way there and back. */
class Driver {
  readonly #ranks: Ranks;
  #number = 0;

  constructor(ranks: Ranks) {
    this.#ranks = ranks;
  }

  async step(
    decodes: readonly number[],
    chunks: readonly Chunk[],
    joins: readonly number[] = [],
  ): Promise<number> {
    this.#number += 1;
    const startMs = performance.now();
    await this.#ranks.forward({
      number: this.#number,
      joins: joins.map((slot) => ({ slot, temperature: 0 })),
      decodeSlots: [...decodes],
      decodeTokens: decodes.map((slot) => 300 + ((this.#number * 31 + slot) % 200)),
      chunks: [...chunks],
      topK: 1,
    });
    return performance.now() - startMs;
  }

  async median(decodes: readonly number[]): Promise<number> {
    const times: number[] = [];
    for (let i = 0; i < STEPS; i += 1) times.push(await this.step(decodes, []));
    return median(times);
  }
}

const chunkOf = (slot: number, count: number): Chunk => ({
  slot,
  tokens: Array.from({ length: count }, (_, i) => 300 + ((i * 37 + slot) % 200)),
  sampledRows: SampledRows.SAMPLED_ROWS_NONE,
  targets: [],
});

async function measure(pool: RankPool, tp: number): Promise<Costs> {
  const limits = {
    ...{ tp, maxSeqLen: lastPosition, maxBatchSize: MOST_SLOTS, maxStepRows: 512, exact: false },
    weights: values.weights as Config['weights'],
    transport: values.transport as Config['transport'],
  };
  return pool.withGroup(model!, limits, async ({ ranks }) => {
    const driver = new Driver(ranks);
    const byPosition: [number, number][] = [];
    const byBatch: [number, number][] = [];
    const prefill: [number, number][] = [];
    await driver.step([], [chunkOf(0, 2)], [0]);
    await driver.median([0]);
    // Batches of short sequences.
    const slots = Array.from({ length: MOST_SLOTS }, (_, slot) => slot);
    await driver.step(
      [],
      slots.map((slot) => chunkOf(slot, 8)),
      slots,
    );
    // Ranks that serve have long compiled what they run.
    for (let i = 0; i < WARM_UP_STEPS; i += 1) await driver.step(slots.slice(0, 16), []);
    for (const batch of [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]) {
      byBatch.push([batch, await driver.median(slots.slice(0, batch))]);
    }
    // One sequence that grows.
    await driver.step([], [chunkOf(0, 2)], [0]);
    let position = 2;
    const goals = [2, 64, 256, 512, 1024, 2048, 3072].filter((at) => at < lastPosition - STEPS);
    for (const goal of [...goals, lastPosition - STEPS]) {
      const end = goal;
      while (position < end) {
        const count = Math.min(CHUNK, end - position);
        await driver.step([], [chunkOf(0, count)]);
        position += count;
      }
      byPosition.push([goal, await driver.median([0])]);
      position += STEPS;
    }
    for (const tokens of [64, 256, 512]) {
      await driver.step([], [chunkOf(1, tokens)], [1]);
      const times: number[] = [];
      for (let i = 0; i < 3; i += 1) times.push(await driver.step([], [chunkOf(1, tokens)], [1]));
      prefill.push([tokens, (1000 * tokens) / median(times)]);
    }
    return { tp, byPosition, byBatch, prefill };
  });
}

const pool = new RankPool();
const all: Costs[] = [];
try {
  print(
    `${os.cpus()[0]?.model ?? '?'}, load ${os.loadavg()[0]!.toFixed(1)}, weights ${values.weights}, medians of ${STEPS} steps`,
  );
  for (const tp of values.tp.split(',').map(Number)) {
    const costs = await measure(pool, tp);
    all.push(costs);
    const row = (pairs: readonly (readonly [number, number])[]): string =>
      pairs.map(([at, figure]) => `${at}: ${figure.toFixed(1)}`).join('  ');
    print(`tp ${tp}`);
    print(`  decode ms by position   ${row(costs.byPosition)}`);
    print(`  decode ms by batch      ${row(costs.byBatch)}`);
    print(`  prompt tokens/s by size ${row(costs.prefill)}`);
  }
} finally {
  await pool.stop();
}
if (values.json !== undefined) fs.writeFileSync(values.json, `${JSON.stringify(all)}\n`);
if (values.svg !== undefined) {
  const lines = (of: (costs: Costs) => Line['points']): Line[] =>
    all.map((costs) => ({ name: `tp ${costs.tp}`, points: of(costs) }));
  fs.writeFileSync(
    values.svg,
    linesSvg([
      {
        title: 'One sequence, by position',
        x: 'position',
        y: 'ms a step',
        lines: lines((c) => c.byPosition),
      },
      {
        title: 'Short sequences, by batch',
        x: 'sequences',
        y: 'ms a step',
        lines: lines((c) => c.byBatch),
      },
    ]),
  );
}
