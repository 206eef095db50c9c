/** `caravan batch`: files of requests in, files of results out, over the gateway. */
import fs from 'node:fs';
import { access, constants, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { createInterface } from 'node:readline';
import { Readable } from 'node:stream';
import { pipeline } from 'node:stream/promises';
import { setTimeout as delay } from 'node:timers/promises';
import type { Command } from 'commander';
import { z } from 'zod';
import { CaravanError } from '../../proto/errors.js';
import { isEnded } from '../batch.js';
import { storageError } from '../file-storage.js';
import { CaravanClient, type Batch } from '../client.js';
import { ProgressBar } from '../progress-bar.js';
import { checked, declareSettings } from './options.js';

const LOOK_EVERY_MS = 1000;
/** A gateway that is being started again is waited for. */
const GIVE_UP_AFTER_MS = 60_000;
/** Counts of an old batch change once a minute. */
const RATE_WINDOW_MS = 180_000;

export function register(program: Command): void {
  const batch = program
    .command('batch')
    .description('Answers files of requests, in the format of OpenAI, when there is room.')
    .helpCommand(false);
  registerSubmit(batch);
  registerStatus(batch);
  registerResults(batch);
  registerCancel(batch);
  registerList(batch);
}

const sharedSettings = ['url', 'apiKey', 'json'] as const;

function registerSubmit(batch: Command): void {
  const command = batch
    .command('submit')
    .description('Uploads a file of requests, starts its batch and prints its id.')
    .argument('<file>', 'JSON lines: {"custom_id", "method": "POST", "url", "body"}')
    .option('--endpoint <path>', 'endpoint of all lines (default: the url of the first)')
    .option('--window <span>', 'time that the batch has: 24h, 90m, 7d (default: 24h)')
    .option('--wait', 'wait for its end, with a bar');
  const settings = declareSettings(command, sharedSettings);
  command.action(async (file: string) => {
    const s = settings();
    const own = command.opts<{ endpoint?: string; window?: string; wait?: true }>();
    await withClient(s, async (client, signal) => {
      const endpoint = own.endpoint ?? (await endpointOf(file));
      const bar = new ProgressBar('upload', process.stderr);
      bar.expect(fs.statSync(file).size);
      const onBytes = (count: number): void => {
        bar.advance(count, true);
      };
      const content = await readable(file);
      const { id: fileId } = await client.upload(content, path.basename(file), { onBytes, signal });
      bar.end();
      const order = { input_file_id: fileId, completion_window: own.window ?? '24h' };
      let view = await client.createBatch({ ...order, endpoint }, { signal });
      if (own.wait === true) view = await untilEnded(client, view.id, signal);
      process.stdout.write(s.json ? `${JSON.stringify(view)}\n` : `${view.id}\n`);
      if (own.wait === true) throwUnlessCompleted(view);
    });
  });
}

function registerStatus(batch: Command): void {
  const command = batch
    .command('status')
    .description('Says how far a batch is, and what is wrong with its file.')
    .argument('<id>', 'the batch')
    .option('--watch', 'until its end, with a bar');
  const settings = declareSettings(command, sharedSettings);
  command.action(async (id: string) => {
    const s = settings();
    const { watch } = command.opts<{ watch?: true }>();
    await withClient(s, async (client, signal) => {
      const view = await (watch === true
        ? untilEnded(client, id, signal)
        : client.batch(id, { signal }));
      process.stdout.write(s.json ? `${JSON.stringify(view)}\n` : told(view));
    });
  });
}

function registerResults(batch: Command): void {
  const command = batch
    .command('results')
    .description('Waits for the end of a batch and prints its results, as JSON lines.')
    .argument('<id>', 'the batch')
    .option('--output <file>', 'file for the results (default: stdout)')
    .option('--errors <file>', 'file for the requests that failed');
  const settings = declareSettings(command, ['url', 'apiKey']);
  command.action(async (id: string) => {
    const { output, errors } = command.opts<{ output?: string; errors?: string }>();
    await withClient(settings(), async (client, signal) => {
      const view = await untilEnded(client, id, signal);
      if (view.output_file_id !== undefined) {
        const content = client.fileContent(view.output_file_id, { signal });
        if (output !== undefined) await save(content, output);
        else for await (const piece of content) await print(piece);
      }
      if (view.error_file_id !== undefined) {
        if (errors !== undefined) {
          await save(client.fileContent(view.error_file_id, { signal }), errors);
        }
        if (errors === undefined)
          say(`${view.request_counts.failed} requests failed; --errors FILE fetches why`);
      }
      throwUnlessCompleted(view);
    });
  });
}

function registerCancel(batch: Command): void {
  const command = batch
    .command('cancel')
    .description('Cancels a batch; what it has answered by then can be fetched.')
    .argument('<id>', 'the batch');
  const settings = declareSettings(command, sharedSettings);
  command.action(async (id: string) => {
    const s = settings();
    await withClient(s, async (client, signal) => {
      const view = await client.cancelBatch(id, { signal });
      process.stdout.write(s.json ? `${JSON.stringify(view)}\n` : told(view));
    });
  });
}

function registerList(batch: Command): void {
  const command = batch
    .command('list')
    .description('Lists batches, the latest first.')
    .option(
      '--limit <n>',
      'most batches (default: 20)',
      checked(z.coerce.number().int().min(1).max(100), 'a whole number from 1 to 100'),
    );
  const settings = declareSettings(command, sharedSettings);
  command.action(async () => {
    const s = settings();
    const { limit = 20 } = command.opts<{ limit?: number }>();
    await withClient(s, async (client, signal) => {
      const { data: views } = await client.batches({ limit }, { signal });
      process.stdout.write(s.json ? `${JSON.stringify(views)}\n` : views.map(told).join(''));
    });
  });
}

const say = (line: string): void => {
  process.stderr.write(`caravan: ${line}\n`);
};

/** Ctrl-C ends the command, not the batch. */
async function withClient(
  { url, apiKey }: { readonly url: string; readonly apiKey: string | undefined },
  use: (client: CaravanClient, signal: AbortSignal) => Promise<void>,
): Promise<void> {
  const interrupted = new AbortController();
  const interrupt = (): void => {
    interrupted.abort(new CaravanError('cancelled', 'interrupted; a batch that runs goes on'));
  };
  process.once('SIGINT', interrupt);
  process.once('SIGTERM', interrupt);
  try {
    await use(new CaravanClient({ url, apiKey }), interrupted.signal);
  } finally {
    process.removeListener('SIGINT', interrupt);
    process.removeListener('SIGTERM', interrupt);
  }
}

/** @throws CaravanError `bad_usage`. */
async function readable(file: string): Promise<Blob> {
  try {
    await access(file, constants.R_OK);
    return await fs.openAsBlob(file);
  } catch (cause) {
    throw new CaravanError('bad_usage', `${file}: cannot be read`, { cause });
  }
}

/** The url of the first line. @throws CaravanError `bad_usage`. */
async function endpointOf(file: string): Promise<string> {
  const input = fs.createReadStream(file);
  try {
    for await (const line of createInterface({ input })) {
      if (line.trim() === '') continue;
      const { url } = JSON.parse(line) as { url?: unknown };
      if (typeof url === 'string') return url;
      break;
    }
  } catch (cause) {
    const reason = cause instanceof SyntaxError ? 'line 1 is not valid JSON' : 'cannot be read';
    throw new CaravanError('bad_usage', `${file}: ${reason}`, { cause });
  } finally {
    input.destroy();
  }
  throw new CaravanError('bad_usage', `${file}: its first line has no url; give --endpoint`);
}

/** Looks at a batch until it has ended, with a bar. */
async function untilEnded(client: CaravanClient, id: string, signal: AbortSignal): Promise<Batch> {
  const spell = (count: number): string =>
    Number.isInteger(count) ? String(count) : count.toFixed(1);
  const bar = new ProgressBar(id, process.stderr, { spell, rateWindowMs: RATE_WINDOW_MS });
  let done: number | null = null;
  let isExpected = false;
  let lastMs = performance.now();
  for (;;) {
    try {
      const view = await client.batch(id, { signal });
      lastMs = performance.now();
      const { total, completed, failed } = view.request_counts;
      if (!isExpected && total > 0) bar.expect(total);
      isExpected ||= total > 0;
      bar.advance(completed + failed - (done ?? 0), done !== null);
      done = completed + failed;
      bar.note(failed === 0 ? view.status : `${view.status}, ${failed} failed`);
      if (isEnded(view.status)) {
        bar.end();
        return view;
      }
    } catch (error) {
      const isAway = error instanceof CaravanError && error.isRetryable;
      if (!isAway || performance.now() - lastMs > GIVE_UP_AFTER_MS) throw error;
    }
    await delay(LOOK_EVERY_MS, undefined, { signal }).catch(() => undefined);
    signal.throwIfAborted();
  }
}

function told({ id, status, request_counts, errors, created_at, expires_at }: Batch): string {
  const { total, completed, failed } = request_counts;
  const at = (seconds: number | undefined): string =>
    seconds === undefined ? '' : new Date(1000 * seconds).toISOString();
  const counts = `${completed + failed} of ${total} done, ${failed} failed`;
  const faults = (errors?.data ?? []).map(
    ({ code, message, line }) => `  ${line === null ? '' : `line ${line}: `}${message} (${code})\n`,
  );
  const times = `created ${at(created_at)}  until ${at(expires_at)}`;
  return `${id}  ${status}  ${counts}  ${times}\n${faults.join('')}`;
}

function throwUnlessCompleted({ id, status, errors }: Batch): void {
  if (status === 'completed') return;
  const first = errors?.data[0];
  const where = first?.line == null ? '' : `line ${first.line}: `;
  const why = first === undefined ? '' : `: ${where}${first.message}`;
  const code =
    status === 'failed' ? 'invalid_request' : status === 'expired' ? 'expired' : 'cancelled';
  throw new CaravanError(code, `batch ${id} ended as ${status}${why}`);
}

/** A file is there whole or not at all. */
async function save(content: AsyncIterable<Uint8Array>, file: string): Promise<void> {
  const partial = `${file}.partial`;
  try {
    await pipeline(Readable.from(content, { objectMode: false }), fs.createWriteStream(partial));
    await rename(partial, file);
  } catch (error) {
    await rm(partial, { force: true });
    throw storageError(file, error);
  }
}

const print = (piece: Uint8Array): Promise<void> =>
  new Promise((resolve) => {
    process.stdout.write(piece, () => {
      resolve();
    });
  });
