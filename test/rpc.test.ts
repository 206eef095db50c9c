/** proto/jobs.proto by a real gRPC client, against a gateway and a real engine. */
import assert from 'node:assert/strict';
import { after, test } from 'node:test';
import { credentials, status, type ServiceError } from '@grpc/grpc-js';
import { Tenants } from '../coordinator/tenants.js';
import { JobsClient, type Job, type StreamEvent, type SubmitRequest } from '../proto/gen/jobs.js';
import { openRules, startGateway } from './gateway.js';
import { startEngine } from './real-engine.js';

// Deadlines that cannot be met are to pass, not to be refused.
const intake = { tenants: Tenants.open(), rules: { ...openRules, admission: 'off' as const } };
const gateway = await startGateway(undefined, { intake });
const engine = await startEngine(gateway.redis.url, { tp: 1, maxBatchSize: 2 });
const client = new JobsClient(`127.0.0.1:${gateway.grpcPort}`, credentials.createInsecure());
// The engine first: with a job in it, it waits for a Redis that is gone.
after(async () => {
  client.close();
  await engine.stop();
  await gateway.stop();
});

const answered = <A>(call: (reply: (error: ServiceError | null, answer: A) => void) => unknown) =>
  new Promise<A>((resolve, reject) => {
    call((error, answer) => {
      if (error === null) resolve(answer);
      else reject(error);
    });
  });

type Fields = Partial<SubmitRequest>;
const submit = (fields: Fields): Promise<Job> =>
  answered((reply) => client.submit({ stop: [], ...fields }, reply));
const get = (jobId: string): Promise<Job> => answered((reply) => client.get({ jobId }, reply));
const cancel = (jobId: string): Promise<Job> =>
  answered((reply) => client.cancel({ jobId }, reply));
const text = (given: string): Fields => ({ prompt: { $case: 'text', text: given } });
const endless: Fields = { ...text('The llama'), ignoreEos: true, maxTokens: 480, seed: 1 };

/** Texts, tokens and ends of each sequence, as far as a stream tells. */
interface Told {
  readonly texts: string[];
  readonly tokens: number[][];
  readonly logprobs: number[][];
  readonly reasons: string[];
  readonly events: StreamEvent[];
}

/** @param until stops reading when it says so. */
async function stream(
  jobId: string,
  offsets: number[] = [],
  options: { deadline?: Date; until?: (event: StreamEvent) => boolean } = {},
): Promise<Told> {
  const { deadline, until = () => false } = options;
  const call = client.stream({ jobId, offsets }, deadline === undefined ? {} : { deadline });
  const told: Told = { texts: [], tokens: [], logprobs: [], reasons: [], events: [] };
  for await (const event of call as AsyncIterable<StreamEvent>) {
    told.events.push(event);
    if (event.event?.$case === 'tokens') {
      const { sequence, text: piece, tokenIds, endOffset, logprobs } = event.event.tokens;
      told.texts[sequence] = `${told.texts[sequence] ?? ''}${piece}`;
      (told.tokens[sequence] ??= []).push(...tokenIds);
      (told.logprobs[sequence] ??= []).push(...logprobs);
      assert.equal(endOffset, (offsets[sequence] ?? 0) + told.tokens[sequence].length);
    } else if (event.event?.$case === 'finish') {
      const { sequence, text: held, finishReason } = event.event.finish;
      told.texts[sequence] = `${told.texts[sequence] ?? ''}${held}`;
      told.reasons[sequence] = finishReason;
    }
    if (until(event)) break;
  }
  return told;
}

const isStatus =
  (code: number, caravanCode: string, param: string | null = null) =>
  (thrown: unknown): boolean => {
    const error = thrown as ServiceError;
    assert.equal(error.code, code, error.message);
    assert.equal(error.metadata.get('caravan-code')[0] ?? '', caravanCode, error.message);
    assert.equal(error.metadata.get('caravan-param')[0] ?? null, param);
    return true;
  };

void test('a text, tokens and a chat are answered as over HTTP', async () => {
  const common = { temperature: 0, maxTokens: 24 };
  const over = async (route: string, body: object): Promise<string> => {
    const response = await gateway.post(route, { ...body, temperature: 0, max_tokens: 24 });
    const { choices } = (await response.json()) as {
      choices: { text?: string; message?: { content: string } }[];
    };
    return choices[0]!.text ?? choices[0]!.message!.content;
  };
  const tokens = [gateway.tokenizer.bosTokenId, ...gateway.tokenizer.encode('A fox')];
  const messages = [{ role: 'user', content: 'Tell me a story.' }];
  const tried: readonly (readonly [Fields, string, object])[] = [
    [text('A fox'), '/v1/completions', { prompt: 'A fox' }],
    [
      { prompt: { $case: 'tokens', tokens: { ids: tokens } } },
      '/v1/completions',
      { prompt: 'A fox' },
    ],
    [{ prompt: { $case: 'chat', chat: { messages } } }, '/v1/chat/completions', { messages }],
  ];
  for (const [fields, route, body] of tried) {
    const { id } = await submit({ ...common, ...fields });
    const told = await stream(id);
    assert.equal(told.texts[0], await over(route, body));
    assert.equal(told.events.at(-1)!.event!.$case, 'completed');
    const job = await get(id);
    assert.equal(job.status, 'completed');
    assert.equal(job.finishReason, told.reasons[0]);
    assert.equal(job.usage!.completionTokens, told.tokens[0]!.length);
  }
});

void test('a job is told when it will start and end, once engines were measured', async (context) => {
  const reckoning = await startGateway();
  const other = new JobsClient(`127.0.0.1:${reckoning.grpcPort}`, credentials.createInsecure());
  context.after(async () => {
    other.close();
    await reckoning.stop();
  });
  const { name: model } = reckoning.card;
  const pace = { stepMs: 10, rowMs: 1, recentStepMs: 12 };
  await reckoning.store.beat({ model, engineId: 'e', active: 0, slots: 4, tp: 1, pace });
  const beforeMs = Date.now();
  const job = await answered<Job>((reply) =>
    other.submit({ stop: [], ...text('A fox'), maxTokens: 20 }, reply),
  );
  assert.ok(job.expectedStartMs! >= beforeMs);
  assert.ok(job.expectedEndMs! > job.expectedStartMs!);
  const later = await answered<Job>((reply) => other.get({ jobId: job.id }, reply));
  assert.equal(later.expectedEndMs, undefined);
});

void test('a stream of several sequences goes on at an offset of each', async () => {
  const { id, sequenceCount } = await submit({
    ...{ ...text('The llama'), n: 2, temperature: 1, seed: 5, maxTokens: 30, ignoreEos: true },
    extraJson: '{"logprobs": 1}',
  });
  assert.equal(sequenceCount, 2);
  const whole = await stream(id);
  assert.deepEqual(
    whole.tokens.map(({ length }) => length),
    [30, 30],
  );
  assert.deepEqual(
    whole.logprobs.map(({ length }) => length),
    [30, 30],
  );
  for (const offsets of [[11, 7], [30], [0, 29]]) {
    const rest = await stream(id, offsets);
    whole.tokens.forEach((tokens, sequence) => {
      assert.deepEqual(rest.tokens[sequence] ?? [], tokens.slice(offsets[sequence] ?? 0));
      assert.ok(whole.texts[sequence]!.endsWith(rest.texts[sequence] ?? ''));
    });
    assert.equal(rest.events.at(-1)!.event!.$case, 'completed');
  }
  await assert.rejects(stream(id, [0, 0, 0]), isStatus(3, 'invalid_request', 'offsets'));
});

void test('a caller that leaves leaves the job, and sees the rest when it comes back', async () => {
  const { id } = await submit(endless);
  const first = await stream(id, [], { until: ({ event }) => event?.$case === 'tokens' });
  const rest = await stream(id, [first.tokens[0]!.length]);
  assert.equal(first.tokens[0]!.length + rest.tokens[0]!.length, 480);
  const whole = await stream(id);
  assert.equal(whole.texts[0], `${first.texts[0]!}${rest.texts[0]!}`);
});

void test('a job is cancelled, and its stream says so', async () => {
  const { id } = await submit(endless);
  const reading = stream(id, [], {
    until: () => {
      void cancel(id);
      return false;
    },
  });
  await assert.rejects(reading, isStatus(status.CANCELLED, 'cancelled'));
  assert.equal((await get(id)).status, 'cancelled');
  assert.equal((await cancel(id)).status, 'cancelled');
});

void test("a call's deadline ends the call, a job's deadline the job", async () => {
  const { id } = await submit(endless);
  await assert.rejects(
    stream(id, [], { deadline: new Date(Date.now() + 100) }),
    (error: ServiceError) => error.code === status.DEADLINE_EXCEEDED,
  );
  assert.match((await get(id)).status, /^(waiting|active)$/);
  await cancel(id);
  const short = await submit({ ...endless, deadlineS: 0.05 });
  await assert.rejects(stream(short.id), isStatus(status.DEADLINE_EXCEEDED, 'expired'));
  const { status: stand, deadlineMs, createdMs } = await get(short.id);
  assert.equal(stand, 'expired');
  assert.ok(Math.abs(deadlineMs! - createdMs - 50) < 1000);
});

void test('refusals are statuses of the one table, with the code and the field', async () => {
  const invalid = status.INVALID_ARGUMENT;
  const refused: readonly (readonly [Fields, number, string, string | null])[] = [
    [{}, invalid, 'invalid_request', 'prompt'],
    [{ ...text('a'), temperature: 3 }, invalid, 'invalid_request', 'temperature'],
    [{ ...text('a'), temperature: NaN }, invalid, 'invalid_request', 'temperature'],
    [{ ...text('a'), extraJson: '{' }, invalid, 'invalid_request', 'extra_json'],
    [{ ...text('a'), extraJson: '[]' }, invalid, 'invalid_request', 'extra_json'],
    [{ ...text('a'), extraJson: '{"echo": 1}' }, invalid, 'invalid_request', 'echo'],
    [{ ...text('walked '.repeat(600)) }, invalid, 'context_length_exceeded', 'prompt'],
    [{ ...text('a'), model: 'nobody' }, status.NOT_FOUND, 'model_not_found', 'model'],
  ];
  for (const [fields, code, caravanCode, param] of refused) {
    await assert.rejects(submit(fields), isStatus(code, caravanCode, param));
  }
  await assert.rejects(get('job_nobody'), isStatus(status.NOT_FOUND, 'not_found'));
  await assert.rejects(cancel('job_nobody'), isStatus(status.NOT_FOUND, 'not_found'));
  await assert.rejects(stream('job_nobody'), isStatus(status.NOT_FOUND, 'not_found'));
});

void test('of several requests with one key the first is the job', async () => {
  const keyed = { ...text('A fox'), maxTokens: 2, idempotencyKey: 'once' };
  const jobs = await Promise.all([submit(keyed), submit(keyed)]);
  assert.equal(jobs[0].id, jobs[1].id);
  await assert.rejects(
    submit({ ...keyed, maxTokens: 3 }),
    isStatus(status.INVALID_ARGUMENT, 'invalid_request', 'idempotency-key'),
  );
});

void test('a gateway that stops ends its streams as unavailable, and the job goes on', async () => {
  const { id } = await submit(endless);
  const reading = stream(id, [], {
    until: () => {
      void gateway.drain();
      return false;
    },
  });
  await assert.rejects(reading, (error: ServiceError) => error.code === status.UNAVAILABLE);
  assert.equal((await gateway.journal.job(id))!.status, 'active');
});
