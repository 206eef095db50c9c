/** What a refusal must be: soon, typed, and one plain line. */
import assert from 'node:assert/strict';
import { CaravanError } from '../proto/errors.js';

const WITHIN_MS = 2_000;
const MOST_LENGTH = 500;

export function assertRefused(open: () => unknown, says: RegExp): void {
  const startMs = performance.now();
  assert.throws(open, (error) => {
    assert.ok(error instanceof CaravanError, String(error));
    assert.match(error.message, says);
    assert.doesNotMatch(error.message, /[\p{Cc}\u2028\u2029]/u);
    assert.ok(error.message.length < MOST_LENGTH, String(error.message.length));
    return true;
  });
  assert.ok(performance.now() - startMs < WITHIN_MS);
}
