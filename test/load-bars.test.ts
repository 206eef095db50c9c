/** How far ranks have loaded, as a terminal shows it, and as lines. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { planGroup } from '../coordinator/group-spec.js';
import { LoadBars } from '../coordinator/load-bars.js';
import { startLocalRank, stopLocalRank } from '../coordinator/local-ranks.js';
import { Ranks } from '../coordinator/ranks.js';
import { openCheckpoint } from '../model/checkpoint.js';
import type { LoadProgress } from '../proto/gen/cluster.js';
import { largeConfig } from './large-config.js';
import { writeRandomCheckpoint } from './random-checkpoint.js';

/** A sequence that moves the cursor or empties a line, or a character. */
const CONTROL = new RegExp(`${String.fromCharCode(27)}\\[\\d*[AK]|[^]`, 'g');

/** A terminal, as far as bars use one. */
class Terminal {
  readonly isTTY = true;
  readonly columns = 60;
  readonly lines = [''];
  #row = 0;

  write(text: string): void {
    for (const [part] of text.matchAll(CONTROL)) {
      if (part === '\r') continue;
      else if (part === '\n') this.lines[(this.#row += 1)] ??= '';
      else if (part.endsWith('A') && part.length > 1) this.#row -= Number(part.slice(2, -1));
      else if (part.endsWith('K') && part.length > 1) this.lines[this.#row] = '';
      else this.lines[this.#row]! += part;
    }
  }
}

const progress = (bytesRead: number, isCached = false): LoadProgress => ({
  ...{ bytesRead, bytesTotal: 1_000_000, isCached },
});

void test('a terminal shows a bar for each rank, each in its own line', () => {
  const terminal = new Terminal();
  const bars = new LoadBars(3, terminal, 0);
  bars.progress(1, progress(250_000));
  assert.match(terminal.lines[1]!, /^rank 1 █{6}░{18} +25 % {2}250\.0 KB of 1\.0 MB/);
  assert.equal(terminal.lines[0], '');
  bars.progress(2, progress(500_000, true));
  bars.progress(0, progress(750_000));
  for (const rank of [0, 1, 2]) bars.progress(rank, progress(1_000_000));
  bars.end();
  assert.equal(terminal.lines.length, 4);
  for (const rank of [0, 1, 2]) {
    assert.match(terminal.lines[rank]!, new RegExp(`^rank ${rank} █{24} 100 %`));
  }
  assert.equal(terminal.lines[3], '', 'what is printed next begins a line');
  for (const line of terminal.lines) assert.ok(line.length < terminal.columns);
});

void test('a rank that begins anew, from the checkpoint, goes back', () => {
  const terminal = new Terminal();
  const bars = new LoadBars(1, terminal, 0);
  bars.progress(0, progress(900_000, true));
  bars.progress(0, { bytesRead: 100_000, bytesTotal: 2_000_000, isCached: false });
  bars.end();
  assert.match(terminal.lines[0]!, /^rank 0 .* 5 % {2}100\.0 KB of 2\.0 MB/);
});

void test('many ranks share a bar, and quick ones show nothing', () => {
  const terminal = new Terminal();
  const many = new LoadBars(40, terminal, 0);
  for (let rank = 0; rank < 40; rank += 1) many.progress(rank, progress(500_000));
  many.end();
  assert.match(terminal.lines[0]!, /^40 ranks █{12}░{12} +50 % {2}20\.0 MB of 40\.0 MB/);
  const silent = new Terminal();
  const quick = new LoadBars(2, silent, 3_600_000);
  quick.progress(0, progress(1_000_000));
  quick.end();
  assert.deepEqual(silent.lines, ['']);
});

void test('ranks report all that they read, and a file gets plain lines of it', async () => {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-bars-'));
  const ranks = await Promise.all(
    [0, 1].map(() => startLocalRank({ threads: 1, device: 'cpu', logLevel: 'error' })),
  );
  try {
    const config = { ...largeConfig(0.2), layerCount: 2 };
    writeRandomCheckpoint(folder, { config, seed: 1, format: 'F16', shardCount: 1 });
    const limits = { weights: 'int8', exact: false, maxSeqLen: 64, maxBatchSize: 1 } as const;
    const { spec } = planGroup(openCheckpoint(folder), 2, { ...limits, maxStepRows: 64 });
    const lines: string[] = [];
    const bars = new LoadBars(2, { write: (line) => lines.push(line) }, 0);
    const heard: LoadProgress[][] = [[], []];
    const addresses = ranks.map(({ address }) => address);
    const group = await Ranks.connect(addresses, spec, {
      onProgress: (rank, report) => {
        heard[rank]!.push(report);
        bars.progress(rank, report);
      },
    });
    bars.end();
    group.close();
    heard.forEach((reports, rank) => {
      const { bytesRead } = group.loaded[rank]!;
      const { bytesTotal } = reports[0]!;
      assert.ok(reports.length > 2, `${reports.length} reports`);
      assert.ok(reports.every((report, i) => report.bytesRead >= (reports[i - 1]?.bytesRead ?? 0)));
      assert.deepEqual(reports.at(-1), { bytesRead: bytesTotal, bytesTotal, isCached: false });
      assert.equal(bytesRead, bytesTotal);
    });
    assert.ok(lines.length >= 4);
    for (const line of lines) assert.match(line, /^rank [01] [█░]{24} +\d+ % {2}[^\p{Cc}]*\n$/u);
    assert.match(lines.at(-1)!, /100 %/);
  } finally {
    await Promise.all(ranks.map(stopLocalRank));
    fs.rmSync(folder, { recursive: true });
  }
});
