/** What a refusal must be: soon, typed, and one plain line. */
import assert from 'node:assert/strict';
import { CaravanError } from '../proto/errors.js';

const WITHIN_CPU_MS = 2_000;
const MOST_LENGTH = 500;

export function assertRefused(open: () => unknown, says: RegExp): void {
  const start = process.cpuUsage();
  assert.throws(open, (error) => {
    assert.ok(error instanceof CaravanError, String(error));
    assert.match(error.message, says);
    assert.doesNotMatch(error.message, /[\p{Cc}\u2028\u2029]/u);
    assert.ok(error.message.length < MOST_LENGTH, String(error.message.length));
    return true;
  });
  // Processor time: what else runs on the machine must not decide it.
  const { user, system } = process.cpuUsage(start);
  assert.ok((user + system) / 1_000 < WITHIN_CPU_MS, `${user + system} µs`);
}
