/** What a refusal must be: soon, typed, and one plain line. */
import assert from 'node:assert/strict';
import { CaravanError } from '../proto/errors.js';
import { processorMs } from './processor-time.js';

const WITHIN_CPU_MS = 2_000;
const MOST_LENGTH = 500;

export function assertRefused(open: () => unknown, says: RegExp): void {
  const startMs = processorMs();
  assert.throws(open, (error) => {
    assert.ok(error instanceof CaravanError, String(error));
    assert.match(error.message, says);
    assert.doesNotMatch(error.message, /[\p{Cc}\u2028\u2029]/u);
    assert.ok(error.message.length < MOST_LENGTH, String(error.message.length));
    return true;
  });
  const tookMs = processorMs() - startMs;
  assert.ok(tookMs < WITHIN_CPU_MS, `${tookMs} ms of processor time`);
}
