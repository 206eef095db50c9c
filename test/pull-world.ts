/** What the tests of `caravan pull` share: a repository, a server that has it, and how a pull is made and refused. */
import assert from 'node:assert/strict';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, before, beforeEach } from 'node:test';
import { ProgressBar } from '../coordinator/progress-bar.js';
import type { PullOptions } from '../coordinator/pull.js';
import { Web } from '../coordinator/web.js';
import { CaravanError, type ErrorCode } from '../proto/errors.js';
import { HubServer } from './hub-server.js';
import { Random } from './random.js';

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-pull-'));
export const server = new HubServer();
before(() => server.start());
after(() => {
  server.stop();
  fs.rmSync(scratch, { recursive: true });
});

const random = new Random(21);
export const noise = (byteCount: number): Buffer => {
  const words = Uint32Array.from({ length: byteCount / 4 }, () => random.below(2 ** 32));
  return Buffer.from(words.buffer);
};

export const first = 'model-00001-of-00002.safetensors';
export const second = 'model-00002-of-00002.safetensors';
const index = { weight_map: { a: first, b: second, c: first } };
/** Two layouts, weights of other frameworks, and what else lies in repositories. */
export const files = new Map<string, Buffer>([
  ['README.md', Buffer.from('# A model')],
  ['config.json', Buffer.from('{"model_type": "llama"}')],
  ['generation_config.json', Buffer.from('{}')],
  ['tokenizer.json', noise(20_000)],
  ['tokenizer_config.json', Buffer.from('{"add_bos_token": true}')],
  ['model.safetensors.index.json', Buffer.from(JSON.stringify(index))],
  [first, noise(400_000)],
  [second, noise(123_456)],
  ['pytorch_model-00001-of-00001.bin', noise(5000)],
  ['original/consolidated.00.pth', noise(5000)],
  ['original/params.json', Buffer.from('{}')],
]);
export const wanted = [
  'config.json',
  'generation_config.json',
  'tokenizer.json',
  'tokenizer_config.json',
  'model.safetensors.index.json',
  first,
  second,
].sort();
export const wantedBytes = wanted.reduce((sum, name) => sum + files.get(name)!.length, 0);
export const commit = '0123456789abcdef0123456789abcdef01234567';
export const id = 'org/model-7b';

beforeEach(() => {
  server.repositories.clear();
  server.repositories.set(id, { commit, files });
  server.fault = () => 'as usual';
  server.claimedBytes.clear();
  server.asked.splice(0);
});

let made = 0;
export const newFolder = (): string => path.join(scratch, `pulled-${(made += 1)}`);

/** Whatever proxies the machine has. */
const web = new Web(() => '');
const silent = { write: () => undefined };
export const options = (folder: string): PullOptions => ({
  web,
  folder,
  bar: new ProgressBar('test', silent),
  say: () => undefined,
  signal: new AbortController().signal,
  tuning: { connections: 4, pieceBytes: 50_000, stallMs: 300, retryMs: 1 },
});

export const environment = (extra: NodeJS.ProcessEnv = {}): NodeJS.ProcessEnv => ({
  HF_ENDPOINT: server.url,
  ...extra,
});

export const refusal =
  (code: ErrorCode, ...says: RegExp[]) =>
  (error: unknown): true => {
    assert.ok(error instanceof CaravanError, String(error));
    assert.equal(error.code, code, error.message);
    assert.doesNotMatch(error.message, /\n/);
    for (const words of says) assert.match(error.message, words);
    return true;
  };
