/**
 * kill -9 of the gateway in the middle of a batch, as it holds it: another one goes on, every line is run once and
 * answered once, in memory that does not grow with the file. The long form has 50,000 lines and 200 MB.
 */
import assert from 'node:assert/strict';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { after, test } from 'node:test';
import OpenAI, { toFile } from 'openai';
import { JobQueue } from '../coordinator/queue.js';
import { batchWhen, endedBatch, linesOf, type ErrorLine, type OutputLine } from './batch-world.js';
import { startGatewayProcess, type GatewayProcess } from './gateway-process.js';
import { startEngine } from './real-engine.js';
import { startRedis } from './redis-server.js';

const isLong = process.env['CARAVAN_LONG'] === '1';
const LINES = isLong ? 50_000 : 300;
/** Of a line: with it the long form's file is 200 MB. */
const LINE_BYTES = isLong ? 4_150 : 400;
const KILLS = isLong ? 3 : 1;
const TOKENS = isLong ? 1 : 80;
/** Every so many lines, one that is refused. */
const BAD_EVERY = 97;
/** Far more than it takes, about 300 s on two quiet cores: a guard against a hang, no measure. */
const TIMEOUT_MS = 1_800_000;
/** What a gateway may have for its objects, whatever the file has; it dies of more. */
const HEAP_MEGABYTES = 96;
/** With that: Node's own code, and the buffers of what is being read and written. */
const MOST_RESIDENT_BYTES = 260e6;

const scratch = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-killed-gateway-'));
after(() => {
  fs.rmSync(scratch, { recursive: true, force: true });
});
const redis = await startRedis();
after(() => redis.stop());
const engine = await startEngine(redis.url, { tp: 1, maxBatchSize: 64 });
after(() => engine.stop());
const queue = new JobQueue(redis.url, engine.model);
after(() => queue.close());

const isBad = (i: number): boolean => i % BAD_EVERY === 5;
const promptLength = (i: number): number => 1 + (i % 7);

function requestLine(i: number): string {
  const prompt = Array.from({ length: promptLength(i) }, () => 300 + (i % 50));
  const body = {
    model: engine.model,
    prompt,
    temperature: isBad(i) ? 9 : 0,
    max_tokens: TOKENS,
    ignore_eos: true,
  };
  const head = { custom_id: `line ${i}`, method: 'POST', url: '/v1/completions' };
  const bare = JSON.stringify({ ...head, body: { ...body, user: '' } });
  const user = 'u'.repeat(Math.max(0, LINE_BYTES - bare.length - 1));
  return JSON.stringify({ ...head, body: { ...body, user } });
}

async function writeInput(file: string): Promise<void> {
  const stream = fs.createWriteStream(file);
  for (let i = 0; i < LINES; i += 1) {
    if (!stream.write(`${requestLine(i)}\n`)) await once(stream, 'drain');
  }
  stream.end();
  await once(stream, 'finish');
}

const clientOf = ({ url }: GatewayProcess): OpenAI =>
  new OpenAI({ baseURL: `${url}/v1`, apiKey: 'none', maxRetries: 0, timeout: TIMEOUT_MS });

void test('a batch outlives the gateways that run it', { timeout: TIMEOUT_MS }, async (t) => {
  const start = (): Promise<GatewayProcess> =>
    startGatewayProcess(redis.url, ['--files', path.join(scratch, 'files')], HEAP_MEGABYTES);
  let gateway = await start();
  const resident: number[] = [];
  const sampling = setInterval(() => resident.push(gateway.residentBytes()), 250);
  try {
    const input = path.join(scratch, 'input.jsonl');
    await writeInput(input);
    const file = await clientOf(gateway).files.create({
      file: fs.createReadStream(input),
      purpose: 'batch',
    });
    assert.equal(file.bytes, fs.statSync(input).size);
    const afterUpload = Math.max(...resident, gateway.residentBytes());
    const { id } = await clientOf(gateway).batches.create({
      input_file_id: file.id,
      endpoint: '/v1/completions',
      completion_window: '24h',
    });
    const startMs = performance.now();
    for (let kill = 1; kill <= KILLS; kill += 1) {
      // The next one comes by while this one holds the batch, and takes it when this one is gone.
      const next = await start();
      const share = (LINES * kill) / (KILLS + 2);
      const done = (batch: OpenAI.Batch): boolean =>
        batch.request_counts!.completed + batch.request_counts!.failed >= share;
      await batchWhen(clientOf(gateway), id, done, TIMEOUT_MS);
      const dying = gateway;
      gateway = next;
      await dying.kill();
      const { status } = await clientOf(gateway).batches.retrieve(id);
      assert.equal(status, 'in_progress', 'killed in the middle');
    }
    const batch = await endedBatch(clientOf(gateway), id, TIMEOUT_MS);
    const seconds = (performance.now() - startMs) / 1000;
    assert.equal(batch.status, 'completed');

    const bad = Array.from({ length: LINES }, (_, i) => i).filter(isBad);
    const output = await linesOf<OutputLine>(clientOf(gateway), batch.output_file_id!);
    const errors = await linesOf<ErrorLine>(clientOf(gateway), batch.error_file_id!);
    assert.deepEqual(batch.request_counts, {
      total: LINES,
      completed: LINES - bad.length,
      failed: bad.length,
    });
    assert.equal(output.length, LINES - bad.length);
    const numbers = output.map(({ custom_id }) => Number(custom_id.slice('line '.length)));
    assert.equal(new Set(numbers).size, output.length, 'every line once');
    for (const [at, { response }] of output.entries()) {
      assert.equal(response.status_code, 200);
      assert.equal(
        response.body.usage!.prompt_tokens,
        promptLength(numbers[at]!),
        'its own answer',
      );
      assert.equal(response.body.usage!.completion_tokens, TOKENS);
    }
    assert.deepEqual(
      errors.map(({ custom_id }) => custom_id).sort(),
      bad.map((i) => `line ${i}`).sort(),
    );
    for (const { response } of errors) {
      assert.equal(response!.status_code, 400);
      assert.equal(response!.body.error.param, 'temperature');
    }
    const { active, waiting, completed } = await queue.counts();
    assert.equal(active + waiting, 0);
    // BullMQ lists only the latest 10,000.
    if (!isLong) assert.equal(completed, output.length, 'every line was run once');

    if (isLong) t.diagnostic(await cancelInTheMiddle(clientOf(gateway), file.id));
    const peak = Math.max(...resident);
    const mb = (bytes: number): string => (bytes / 1e6).toFixed(0);
    t.diagnostic(
      `${LINES} lines, ${mb(file.bytes)} MB, ${KILLS} kills: ${seconds.toFixed(0)} s, ` +
        `${(LINES / seconds).toFixed(0)} lines/s; gateway ${mb(resident[0] ?? 0)} MB at start, ` +
        `${mb(afterUpload)} MB after the upload, ${mb(peak)} MB at most`,
    );
    assert.ok(peak < MOST_RESIDENT_BYTES, `${mb(peak)} MB`);
  } finally {
    clearInterval(sampling);
    await gateway.kill('SIGTERM');
  }
});

/** The same file again, cancelled after a third of it. @returns what became of it. */
async function cancelInTheMiddle(client: OpenAI, fileId: string): Promise<string> {
  const { id } = await client.batches.create({
    ...{ input_file_id: fileId, endpoint: '/v1/completions', completion_window: '24h' },
  });
  const isThere = (batch: OpenAI.Batch): boolean => batch.request_counts!.completed > LINES / 3;
  await batchWhen(client, id, isThere, TIMEOUT_MS);
  const startMs = performance.now();
  await client.batches.cancel(id);
  const batch = await endedBatch(client, id, TIMEOUT_MS);
  const seconds = ((performance.now() - startMs) / 1000).toFixed(1);
  assert.equal(batch.status, 'cancelled');
  const output = await linesOf<OutputLine>(client, batch.output_file_id!);
  const errors = await linesOf<ErrorLine>(client, batch.error_file_id!);
  const { total, completed, failed } = batch.request_counts!;
  assert.deepEqual([total, completed, failed], [LINES, output.length, errors.length]);
  assert.ok(completed > LINES / 3 && failed > LINES / 3, 'in the middle');
  const ids = [...output, ...errors].map(({ custom_id }) => custom_id);
  assert.equal(ids.length, LINES);
  assert.equal(new Set(ids).size, LINES, 'every line once');
  const withdrawn = errors.filter(({ error }) => error?.code === 'batch_cancelled').length;
  return `cancelled in ${seconds} s: ${completed} answered, ${withdrawn} of ${failed} withdrawn`;
}

const inLongForm = { timeout: TIMEOUT_MS, skip: isLong ? false : 'in the long form' };

void test('a batch outlives its engine and Redis', inLongForm, async () => {
  const COUNT = 200;
  const gateway = await startGatewayProcess(
    redis.url,
    ['--files', path.join(scratch, 'files')],
    HEAP_MEGABYTES,
  );
  try {
    const lines = Array.from({ length: COUNT }, (_, i) =>
      JSON.stringify({
        ...{ custom_id: `r${i}`, method: 'POST', url: '/v1/completions' },
        body: { model: engine.model, prompt: [300], max_tokens: 120, ignore_eos: true, seed: i },
      }),
    );
    const client = clientOf(gateway);
    const file = await toFile(Buffer.from(lines.join('\n')), 'requests.jsonl');
    const { id: fileId } = await client.files.create({ file, purpose: 'batch' });
    const { id } = await client.batches.create({
      ...{ input_file_id: fileId, endpoint: '/v1/completions', completion_window: '24h' },
    });
    await batchWhen(client, id, ({ request_counts }) => request_counts!.completed > 0, TIMEOUT_MS);
    await engine.kill();
    await redis.kill();
    await redis.restart();
    await engine.restart();
    const patient = new OpenAI({ baseURL: `${gateway.url}/v1`, apiKey: 'none', maxRetries: 10 });
    const killedAt = await patient.batches.retrieve(id);
    assert.equal(killedAt.status, 'in_progress', 'killed in the middle');
    const batch = await endedBatch(patient, id, TIMEOUT_MS);
    assert.deepEqual(batch.request_counts, { total: COUNT, completed: COUNT, failed: 0 });
    const output = await linesOf<OutputLine>(patient, batch.output_file_id!);
    assert.equal(output.length, COUNT);
    assert.equal(new Set(output.map(({ custom_id }) => custom_id)).size, COUNT);
    for (const { response } of output) assert.equal(response.body.usage!.completion_tokens, 120);
  } finally {
    await gateway.kill('SIGTERM');
  }
});
