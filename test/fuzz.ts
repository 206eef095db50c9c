/**
 * Feeds a reader with damaged copies of good files, from a seed. Whatever they say, a reader must take them or refuse
 * them with a CaravanError of one line, soon (by processor time), and without taking memory that they have no bytes for.
 */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { test } from 'node:test';
import { CaravanError } from '../proto/errors.js';
import { FuzzWatchdog } from './fuzz-watchdog.js';
import { processorMs } from './processor-time.js';
import { Random } from './random.js';

export interface FuzzTarget {
  /** Good inputs: small, so that a damage hits something. */
  readonly seeds: readonly Uint8Array[];
  /** Bytes that mean something to the reader. */
  readonly words: readonly (string | Uint8Array)[];
  /** Reads one input, and checks what it took. `file` holds it too. */
  readonly read: (input: Buffer, file: string) => void;
  /** Whether `read` looks at the file. */
  readonly isFile: boolean;
  /** Processor time that one input may take, where it is not 2 s. */
  readonly mostMs?: number;
  /** Kinds of refusal that must be met, where it is not 8. */
  readonly leastRefusals?: number;
}

interface FuzzReport {
  readonly accepted: number;
  /** By the kind of refusal: its message without numbers and quoted texts. */
  readonly refusals: ReadonlyMap<string, number>;
  readonly slowestMs: number;
  readonly memoryGrowthBytes: number;
}

const COUNT = process.env['CARAVAN_LONG'] === '1' ? 100_000 : 3_000;
const MOST_MS = 2_000;
const MOST_MESSAGE = 1_000;
const MOST_MEMORY_GROWTH = 256 << 20;

/** Words of JSON texts, and numbers at which their readers go wrong. */
export const JSON_WORDS: readonly string[] = [
  ...['"', '{', '}', '[', ']', ',', ':', '-1', '1e400', '9007199254740993', 'null', 'true', '0.5'],
  ...['\\n', '\\u2028', '"__proto__":', '[[[[[[', '""', '1e9', '4294967296'],
];

/** A test for each reader. */
export function fuzzAll(targets: Readonly<Record<string, FuzzTarget>>): void {
  for (const [name, target] of Object.entries(targets)) {
    void test(`${name}: ${COUNT} damaged inputs are taken or refused in one line`, async (t) => {
      const report = await fuzz(name, target, COUNT, 20_231);
      t.diagnostic(spellReport(report));
      // Damages that change nothing of importance, and many that do.
      assert.ok(report.accepted > COUNT / 100, String(report.accepted));
      assert.ok(report.refusals.size > (target.leastRefusals ?? 8), String(report.refusals.size));
    });
  }
}

/** @throws AssertionError with the number of the input that the reader failed at. */
async function fuzz(
  name: string,
  target: FuzzTarget,
  count: number,
  seed: number,
): Promise<FuzzReport> {
  const random = new Random(seed);
  const memory = fs.existsSync('/dev/shm') ? '/dev/shm' : os.tmpdir();
  const folder = fs.mkdtempSync(path.join(memory, 'caravan-fuzz-'));
  const file = path.join(folder, 'input');
  const refusals = new Map<string, number>();
  let accepted = 0;
  let slowestMs = 0;
  const { mostMs = MOST_MS } = target;
  const startMemory = peakBytes();
  const watchdog = new FuzzWatchdog(`${name}, seed ${seed}`);
  try {
    for (let i = 0; i < count; i += 1) {
      const input = damage(target, random);
      if (target.isFile) fs.writeFileSync(file, input);
      watchdog.begin(i);
      const startMs = processorMs();
      try {
        target.read(input, file);
        accepted += 1;
      } catch (error) {
        const where = `input ${i} of seed ${seed}`;
        if (!(error instanceof CaravanError)) {
          throw new Error(`${where}: ${String(error)}`, { cause: error });
        }
        const { message } = error;
        assert.ok(message.length < MOST_MESSAGE, `${where}: a message of ${message.length}`);
        assert.doesNotMatch(message, /[\p{Cc}\u2028\u2029]/u, `${where}: not one plain line`);
        const kind = message.replace(/"(\\.|[^"\\])*"/g, '""').replace(/-?\d+/g, '0');
        refusals.set(kind, (refusals.get(kind) ?? 0) + 1);
      }
      slowestMs = Math.max(slowestMs, processorMs() - startMs);
      assert.ok(slowestMs < mostMs, `input ${i} of seed ${seed}: ${slowestMs} ms`);
    }
  } finally {
    await watchdog.stop();
    fs.rmSync(folder, { recursive: true });
  }
  const memoryGrowthBytes = peakBytes() - startMemory;
  assert.ok(memoryGrowthBytes < MOST_MEMORY_GROWTH, `memory grew by ${memoryGrowthBytes} bytes`);
  return { accepted, refusals, slowestMs, memoryGrowthBytes };
}

/** The most memory that this process has held: also what was taken and given back between two looks counts. */
const peakBytes = (): number => 1024 * process.resourceUsage().maxRSS;

/** For a test's diagnostics. */
function spellReport({ accepted, refusals, slowestMs, memoryGrowthBytes }: FuzzReport): string {
  return (
    `${accepted} taken, ${refusals.size} kinds of refusal, slowest ${slowestMs.toFixed(0)} ms, ` +
    `memory grew by ${Math.round(memoryGrowthBytes / 1e6)} MB`
  );
}

/** Numbers at which readers go wrong, as little-endian 32 or 64 bits. */
const EXTREMES = [
  0n,
  1n,
  0x7fn,
  0xffn,
  0xffffn,
  0x7fffffffn,
  0x80000000n,
  0xffffffffn,
  1_000_000_000n,
  0x1_0000_0000n,
  0x001f_ffff_ffff_ffffn,
  0x7fff_ffff_ffff_ffffn,
  0xffff_ffff_ffff_ffffn,
];

/** One to four changes of a good input. */
function damage({ seeds, words }: FuzzTarget, random: Random): Buffer {
  let bytes: Buffer = Buffer.from(random.pick(seeds));
  for (let left = 1 + random.below(4); left > 0; left -= 1) {
    const at = random.below(bytes.length + 1);
    const change = random.pick(CHANGES);
    bytes = change(bytes, at, random, words, seeds);
  }
  return bytes;
}

type Change = (
  bytes: Buffer,
  at: number,
  random: Random,
  words: FuzzTarget['words'],
  seeds: FuzzTarget['seeds'],
) => Buffer;

const without = (bytes: Buffer, at: number, count: number): Buffer =>
  Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + count)]);

const inserted = (bytes: Buffer, at: number, more: Uint8Array): Buffer =>
  Buffer.concat([bytes.subarray(0, at), more, bytes.subarray(at)]);

const written = (bytes: Buffer, at: number, more: Uint8Array): Buffer => {
  const copy = Buffer.from(bytes);
  copy.set(more.subarray(0, Math.max(0, copy.length - at)), Math.min(at, copy.length));
  return copy;
};

const CHANGES: readonly Change[] = [
  (bytes, at, random) => written(bytes, at, Uint8Array.of(random.below(256))),
  (bytes, at, random) =>
    written(bytes, at, Uint8Array.of((bytes[at] ?? 0) ^ (1 << random.below(8)))),
  (bytes, at, random) => {
    const number = Buffer.alloc(8);
    number.writeBigUInt64LE(random.pick(EXTREMES));
    return written(bytes, at, number.subarray(0, random.pick([1, 2, 4, 8])));
  },
  (bytes, at) => bytes.subarray(0, at),
  (bytes, at, random) => without(bytes, at, 1 + random.below(16)),
  (bytes, at, random) => inserted(bytes, at, bytes.subarray(at, at + 1 + random.below(64))),
  (bytes, at, random, words) => inserted(bytes, at, Buffer.from(random.pick(words))),
  (bytes, at, random, words) => written(bytes, at, Buffer.from(random.pick(words))),
  (bytes, at, random, _words, seeds) => {
    const other = random.pick(seeds);
    return Buffer.concat([bytes.subarray(0, at), other.subarray(random.below(other.length))]);
  },
];
