/** Posts one event, signed as Standard Webhooks (standardwebhooks.com) and OpenAI's webhooks are. */
import { createHmac } from 'node:crypto';
import http from 'node:http';
import https from 'node:https';
import { packageVersion } from './package-root.js';
import type { WebhookPolicy } from './webhook-target.js';

/** From the first byte sent to the last one read. */
const POST_TIMEOUT_MS = 10_000;
/** Of an answer: nobody reads it. */
const MAX_ANSWER_BYTES = 65_536;

/** `whsec_` and base64, or any other text. */
const secretBytes = (secret: string): Buffer =>
  secret.startsWith('whsec_')
    ? Buffer.from(secret.slice('whsec_'.length), 'base64')
    : Buffer.from(secret);

export function signatureOf(secret: string, id: string, timestampS: number, body: string): string {
  const hmac = createHmac('sha256', secretBytes(secret));
  return `v1,${hmac.update(`${id}.${timestampS}.${body}`).digest('base64')}`;
}

/**
 * Sends one event; a redirect is not followed.
 *
 * @param id of the event: the same for every attempt, so that the receiver can tell.
 * @returns the status of the answer.
 * @throws Error when none came in time, or the address may not be called.
 */
export function postWebhook(
  { url: text, id, body, secret }: Readonly<Record<'url' | 'id' | 'body' | 'secret', string>>,
  policy: WebhookPolicy,
  signal: AbortSignal,
): Promise<number> {
  const url = policy.check(text);
  const timestampS = Math.floor(Date.now() / 1000);
  const { request } = url.protocol === 'https:' ? https : http;
  return new Promise((resolve, reject) => {
    const call = request(url, {
      method: 'POST',
      agent: false,
      lookup: policy.lookup(url),
      signal: AbortSignal.any([signal, AbortSignal.timeout(POST_TIMEOUT_MS)]),
      headers: {
        'content-type': 'application/json',
        'content-length': Buffer.byteLength(body),
        'user-agent': `caravan/${packageVersion()}`,
        'webhook-id': id,
        'webhook-timestamp': timestampS,
        'webhook-signature': signatureOf(secret, id, timestampS, body),
      },
    });
    call.once('error', reject);
    call.once('response', (answer) => {
      let byteCount = 0;
      answer.on('data', (piece: Buffer) => {
        byteCount += piece.length;
        if (byteCount > MAX_ANSWER_BYTES) answer.destroy();
      });
      // Whether the rest of the answer comes is of no interest.
      answer.once('error', () => undefined);
      answer.once('close', () => {
        resolve(answer.statusCode!);
      });
    });
    call.end(body);
  });
}
