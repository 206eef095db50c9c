import assert from 'node:assert/strict';
import { test } from 'node:test';
import { percentiles, report, type BenchReport } from '../coordinator/bench.js';
import type { TimedAnswer } from '../coordinator/bench-stream.js';
import { freePort } from '../coordinator/state-folder.js';
import { runCli, runCliJson } from './cli.js';

void test('bench starts a Caravan of its own and puts each load on it', async () => {
  const bench = (...args: string[]) =>
    runCliJson([
      'bench',
      '--tp',
      '1',
      '--duration',
      '0',
      '--no-warm-up',
      ...args,
    ]) as Promise<BenchReport>;
  const load = ['--concurrency', '3', '--prompt-tokens', '9', '--max-tokens', '12'];
  const decode = await bench(...load);
  const { requests, errors, promptTokens, outputTokens } = decode;
  assert.deepEqual(
    { requests, errors, promptTokens, outputTokens },
    {
      ...{ requests: 3, errors: 0, promptTokens: 27, outputTokens: 36 },
    },
  );
  for (const rate of [decode.outputTokensPerSecond, decode.decodeTokensPerSecond]) {
    assert.ok(rate !== null && rate > 0 && Number.isFinite(rate));
  }
  assert.ok(decode.ttftMs!.p50 > 0 && decode.ttftMs!.p99 >= decode.ttftMs!.p50);
  assert.ok(decode.itlMs!.p50 > 0 && decode.itlMs!.p99 >= decode.itlMs!.p50);

  const prefill = await bench('--scenario', 'prefill', '--prompt-tokens', '50');
  assert.equal(prefill.outputTokens, 1);
  assert.ok(prefill.prefillTokensPerSecond! > 0);
  assert.equal(prefill.itlMs, null);
});

void test('bench says in one line what it cannot do', async () => {
  const nobody = `http://127.0.0.1:${await freePort()}`;
  const cases: [args: string[], code: number, words: RegExp][] = [
    [['--url', nobody, '--duration', '0'], 1, /127\.0\.0\.1:\d+: .*ECONNREFUSED/],
    [['--url', 'somewhere'], 2, /--url must be an http:\/\/ or https:\/\/ URL, got somewhere/],
    [['--url', nobody, '--tp', '2'], 2, /--tp is for a Caravan of its own/],
    [['--scenario', 'fly'], 2, /one of decode, prefill, serve/],
    [
      ['--prefix-tokens', '600', '--scenario', 'prefill'],
      2,
      /600 is more than --prompt-tokens 512/,
    ],
    [['--model', '/nowhere/at/all', '--duration', '0'], 1, /it did not start/],
  ];
  for (const [args, code, words] of cases) {
    const run = await runCli(['bench', ...args]);
    assert.equal(run.code, code, `${args.join(' ')}: ${run.stderr}`);
    assert.match(run.stderr, words);
    assert.equal(run.stdout, '');
  }
});

void test('a report counts only what came while all streams decoded', () => {
  const answer = (startMs: number, atMs: number[], cachedTokens = 0): TimedAnswer => ({
    startMs,
    events: atMs.map((at, i) => ({ atMs: at, tokens: i + 1 })),
    promptTokens: 10,
    cachedTokens,
    outputTokens: atMs.length,
  });
  // The second stream begins 100 ms after the first: by then the first has two tokens.
  const round = [answer(0, [100, 200, 300, 400]), answer(0, [200, 300, 400, 500], 4)];
  const load = { scenario: 'decode', concurrency: 2 } as const;
  const { decodeTokensPerSecond, prefillTokensPerSecond, outputTokensPerSecond, ttftMs, itlMs } =
    report(load, 2, [], [round], 1000);
  assert.equal(decodeTokensPerSecond, (2 + 3) / 0.3);
  assert.equal(prefillTokensPerSecond, 16 / 0.2);
  assert.equal(outputTokensPerSecond, 8);
  assert.deepEqual(ttftMs, { p50: 100, p90: 200, p99: 200 });
  assert.deepEqual(itlMs, { p50: 100, p90: 100, p99: 100 });
});

void test('percentiles are values that were there', () => {
  assert.equal(percentiles([]), null);
  assert.deepEqual(percentiles([7]), { p50: 7, p90: 7, p99: 7 });
  const hundred = Array.from({ length: 100 }, (_, i) => 100 - i);
  assert.deepEqual(percentiles(hundred), { p50: 50, p90: 90, p99: 99 });
});
