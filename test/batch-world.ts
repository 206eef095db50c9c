/** What tests of batches need: a gateway and an engine over one Redis, the official client, and OpenAI's description. */
import assert from 'node:assert/strict';
import OpenAI from 'openai';
import type { FileStorage } from '../coordinator/file-storage.js';
import { startGateway } from './gateway.js';
import { checkOpenaiBody } from './openai-description.js';
import { startEngine } from './real-engine.js';

export interface OutputLine {
  readonly id: string;
  readonly custom_id: string;
  readonly response: {
    readonly status_code: number;
    readonly request_id: string;
    readonly body: OpenAI.ChatCompletion;
  };
  readonly error: null;
}

export interface ErrorLine {
  readonly id: string;
  readonly custom_id: string;
  readonly response: {
    readonly status_code: number;
    readonly body: { readonly error: { readonly code: string; readonly param: string | null } };
  } | null;
  readonly error: { readonly code: string; readonly message: string } | null;
}

const TIMEOUT_MS = 60_000;
const LOOK_EVERY_MS = 50;

export interface BatchWorld {
  readonly url: string;
  readonly client: OpenAI;
  /** Holds a body to OpenAI's own description, where that is at hand. */
  checkBody(schema: string, body: unknown): void;
  /** Looks at a batch until it is so. */
  until(id: string, isSo: (batch: OpenAI.Batch) => boolean): Promise<OpenAI.Batch>;
  /** Jobs that wait or run. */
  jobsInQueue(): Promise<number>;
  stop(): Promise<void>;
}

/** @param storage of files; a folder of its own unless told otherwise. */
export async function startBatchWorld(storage?: FileStorage): Promise<BatchWorld> {
  const gateway = await startGateway(storage);
  const engine = await startEngine(gateway.redis.url, { tp: 1, maxBatchSize: 8 });
  const client = new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey: 'none', maxRetries: 0 });
  return {
    url: gateway.url,
    client,
    checkBody: checkOpenaiBody,
    until: (id, isSo) => batchWhen(client, id, isSo),
    jobsInQueue: async () => {
      const ids = await gateway.jobIds();
      const jobs = await Promise.all(ids.map((id) => gateway.journal.job(id)));
      return jobs.filter((job) => job !== null && job.ending === null).length;
    },
    stop: async () => {
      await engine.stop();
      await gateway.stop();
    },
  };
}

/** A client has no other way than to ask again: so does this. */
export async function batchWhen(
  client: OpenAI,
  id: string,
  isSo: (batch: OpenAI.Batch) => boolean,
  timeoutMs = TIMEOUT_MS,
): Promise<OpenAI.Batch> {
  const giveUpMs = performance.now() + timeoutMs;
  for (;;) {
    const batch = await client.batches.retrieve(id);
    if (isSo(batch)) return batch;
    assert.ok(performance.now() < giveUpMs, `still ${JSON.stringify(batch)}`);
    await new Promise((resolve) => setTimeout(resolve, LOOK_EVERY_MS));
  }
}

const ended: readonly string[] = ['completed', 'failed', 'expired', 'cancelled'];

export const endedBatch = (client: OpenAI, id: string, timeoutMs?: number): Promise<OpenAI.Batch> =>
  batchWhen(client, id, ({ status }) => ended.includes(status), timeoutMs);

/** The lines of a file of results. */
export async function linesOf<T>(client: OpenAI, fileId: string): Promise<T[]> {
  const text = await (await client.files.content(fileId)).text();
  assert.ok(text.endsWith('\n'));
  return text
    .slice(0, -1)
    .split('\n')
    .map((line) => JSON.parse(line) as T);
}
