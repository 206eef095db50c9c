/**
 * An hour of a trace on a simulated cluster, under several ways of scaling: a table on stdout, a plot as SVG.
 *
 *   node dist/test/bench/cluster-hour.js TRACE.csv [PLOT.svg]
 */
import fs from 'node:fs';
import {
  DAY_S,
  DAYS,
  engine,
  playHour,
  readArrivals,
  TTFT_LIMIT_S,
  type Policy,
} from '../cluster-hour.js';
import type { Outcome } from '../simulated-cluster.js';

const maxEngines = 8;
const policies: readonly (readonly [name: string, policy: Policy])[] = [
  ['static, 8 engines', { kind: 'static', engines: 8 }],
  ['static, 7 engines', { kind: 'static', engines: 7 }],
  ['work, 2 s an engine', { kind: 'work', targetSeconds: 2, maxEngines }],
  ['work, 3 s an engine', { kind: 'work', targetSeconds: 3, maxEngines }],
  ['queue, 5 waiting jobs an engine', { kind: 'queue', jobs: 5, counts: 'waiting', maxEngines }],
  ['queue, 16 waiting jobs an engine', { kind: 'queue', jobs: 16, counts: 'waiting', maxEngines }],
  [
    'queue, 12 jobs an engine, active ones too',
    { kind: 'queue', jobs: 12, counts: 'all', maxEngines },
  ],
  [
    'queue, 16 jobs an engine, active ones too',
    { kind: 'queue', jobs: 16, counts: 'all', maxEngines },
  ],
  [
    'queue, 24 jobs an engine, active ones too',
    { kind: 'queue', jobs: 24, counts: 'all', maxEngines },
  ],
];

const [tracePath, plotPath] = process.argv.slice(2);
if (tracePath === undefined) {
  process.stderr.write('cluster-hour: name a trace file\n');
  process.exit(2);
}
const arrivals = readArrivals(tracePath);
const outcomes = new Map<string, Outcome>();
process.stdout.write(
  `${arrivals.length} requests; an engine loads for ${engine.loadS} s\n\n` +
    `| scaling | first token within ${TTFT_LIMIT_S} s | p50, p99 | engine-seconds | of static | 0 → N → 0 | 0 → 1 | most |\n` +
    '| --- | --- | --- | --- | --- | --- | --- | --- |\n',
);
for (const [name, policy] of policies) {
  const outcome = await playHour(arrivals, policy);
  outcomes.set(name, outcome);
  if (outcome.completed !== arrivals.length) {
    throw new Error(`${name}: ${outcome.completed} of ${arrivals.length} jobs ended`);
  }
  const staticSeconds = outcomes.get(policies[0]![0])!.engineSeconds;
  const { attainment, ttftS, engineSeconds, roundTrips, coldStartS, mostEngines } = outcome;
  const cells = [
    name,
    `${(100 * attainment).toFixed(2)} %`,
    `${ttftS.p50.toFixed(2)}, ${ttftS.p99.toFixed(1)} s`,
    engineSeconds.toFixed(0),
    `${((100 * engineSeconds) / staticSeconds).toFixed(0)} %`,
    policy.kind === 'static' ? '–' : String(roundTrips),
    policy.kind === 'static' ? '–' : `${coldStartS.toFixed(1)} s`,
    String(mostEngines),
  ];
  process.stdout.write(`| ${cells.join(' | ')} |\n`);
}
if (plotPath !== undefined) fs.writeFileSync(plotPath, plot(outcomes.get('work, 2 s an engine')!));

/** Arrivals, waiting jobs and engines over the hour. */
function plot({ samples }: Outcome): string {
  const [width, height, left, top] = [860, 130, 70, 30];
  const endS = DAYS * DAY_S;
  const panel = (
    index: number,
    title: string,
    series: readonly {
      readonly values: readonly number[];
      readonly color: string;
      readonly isArea: boolean;
    }[],
  ): string => {
    const most = Math.max(1, ...series.flatMap(({ values }) => values));
    const y0 = top + index * (height + 45) + height;
    const x = (i: number): string => (left + (samples[i]![0] / endS) * width).toFixed(1);
    const y = (value: number): string => (y0 - (value / most) * height).toFixed(1);
    const lines = series.map(({ values, color, isArea }) => {
      // Steps: a value holds until the next one.
      const points = values.map((value, i) =>
        i === 0 ? `${x(0)},${y(value)}` : `${x(i)},${y(values[i - 1]!)} ${x(i)},${y(value)}`,
      );
      const path = points.join(' ');
      return isArea
        ? `<polygon points="${left},${y0} ${path} ${left + width},${y0}" fill="${color}"/>`
        : `<polyline points="${path}" fill="none" stroke="${color}" stroke-width="1.5"/>`;
    });
    return (
      `<text x="${left}" y="${y0 - height - 8}" font-weight="600">${title}</text>` +
      `<text x="${left - 8}" y="${y0 - height + 5}" text-anchor="end">${most.toFixed(0)}</text>` +
      `<text x="${left - 8}" y="${y0}" text-anchor="end">0</text>` +
      `${lines.join('')}<line x1="${left}" y1="${y0}" x2="${left + width}" y2="${y0}" stroke="#6b5a48"/>`
    );
  };
  const column = (at: 1 | 2 | 3 | 4): number[] => samples.map((sample) => sample[at]);
  const minutes = Array.from({ length: 7 }, (_, i) => i * 10);
  const bottom = top + 3 * (height + 45) - 25;
  const ticks = minutes.map((minute) => {
    const at = (left + ((minute * 60) / endS) * width).toFixed(1);
    return `<text x="${at}" y="${bottom}" text-anchor="middle">${minute} min</text>`;
  });
  return (
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${left + width + 30} ${bottom + 15}" ` +
    'font-family="system-ui, sans-serif" font-size="13" fill="#2b2118">' +
    `<rect width="100%" height="100%" fill="#fbf7f0"/>` +
    panel(0, 'requests a second', [{ values: column(1), color: '#b5651d', isArea: false }]) +
    panel(1, 'jobs that wait', [{ values: column(2), color: '#b5651d', isArea: false }]) +
    panel(2, 'engines: there, and serving', [
      { values: column(3), color: '#e8cfa9', isArea: true },
      { values: column(4), color: '#7a3e0f', isArea: false },
    ]) +
    `${ticks.join('')}</svg>\n`
  );
}
