/** The examples run as a user runs them, against the embedded model. */
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import path from 'node:path';
import { after, test } from 'node:test';
import { promisify } from 'node:util';
import { packageRoot } from '../coordinator/package-root.js';
import { serveModel } from './served-model.js';

const served = await serveModel(4);
after(() => served.stop());

async function run(name: string): Promise<string> {
  const file = path.join(packageRoot, 'dist/examples', `${name}.js`);
  const { stdout } = await promisify(execFile)(process.execPath, [file, served.url], {
    timeout: 60_000,
  });
  return stdout;
}

void test('the customer-service assistant looks something up and answers', async () => {
  const [call, ...answer] = (await run('customer-service')).split('\n');
  assert.match(
    call!,
    /^(order\(\{ ?"item": ?"(lamp|rug)" ?\}\) = (lamp: on its way|rug: not paid)|call_back\(.*\d+ ?\}\) = we call at (9|1\d) o'clock)$/,
  );
  assert.match(answer.join('\n'), /^assistant: [^]{10,}/);
});

void test('the decision form is filled in', async () => {
  const decision = JSON.parse(await run('decision-form')) as Record<string, unknown>;
  const names = ['advice', 'confidencePercent', 'reasons', 'costEuro', 'askAgainOn'];
  assert.deepEqual(Object.keys(decision), names);
  assert.ok(['yes', 'no', 'later'].includes(decision['advice'] as string));
  assert.ok((decision['reasons'] as string[]).length >= 1);
});

void test('the content generator writes a text for each product, through a batch', async () => {
  const [state, ...texts] = (await run('content-generator')).trim().split('\n');
  assert.equal(state, 'completed: 3 of 3');
  assert.deepEqual(texts.map((line) => /^(a [a-z ]+): ".+", ".+"$/.exec(line)?.[1]).sort(), [
    'a camel saddle',
    'a copper lamp',
    'a woven rug',
  ]);
});
