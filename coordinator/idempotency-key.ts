/**
 * A client that does not know whether its request arrived asks again with the same `Idempotency-Key`: the key names the
 * job, so that there is only one.
 */
import { createHash } from 'node:crypto';
import { CaravanError } from '../proto/errors.js';

export interface IdempotencyKey {
  readonly jobId: string;
  /** Of the request that the key stands for: another one with the same key is a mistake. */
  readonly fingerprint: string;
}

const MAX_CHARACTERS = 255;

const digestOf = (...parts: readonly string[]): Buffer =>
  createHash('sha256').update(parts.join('\n')).digest();

/**
 * @param client what tells keys of different clients apart.
 * @returns null where the request has none.
 * @throws CaravanError `invalid_request`.
 */
export function idempotencyKeyOf(
  header: string | string[] | undefined,
  client: readonly string[],
  route: string,
  body: unknown,
): IdempotencyKey | null {
  if (header === undefined || header === '') return null;
  const key = String(header);
  if (key.length > MAX_CHARACTERS) {
    throw new CaravanError(
      'invalid_request',
      `idempotency-key: has ${key.length} characters; at most ${MAX_CHARACTERS} are taken`,
      { param: 'idempotency-key' },
    );
  }
  return {
    jobId: `job_${digestOf(...client, key)
      .subarray(0, 16)
      .toString('base64url')}`,
    fingerprint: digestOf(route, JSON.stringify(body)).subarray(0, 16).toString('base64url'),
  };
}
