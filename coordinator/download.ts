/**
 * Fetches files into a folder: in pieces by HTTP ranges, several at once, over connections that may break. What can be
 * mended by trying again is tried again from the byte that was reached; what cannot, ends all.
 */
import fs from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError } from '../proto/errors.js';
import { PartialFile, type Piece, type RemoteFile } from './partial-file.js';
import type { Web, WebResponse } from './web.js';

export interface DownloadOptions {
  readonly web: Web;
  /** For every request, by its URL. */
  readonly headers: Readonly<Record<string, string>>;
  /** What a status means that is neither success nor worth another try. */
  readonly explain: (response: WebResponse, name: string) => CaravanError;
  readonly signal: AbortSignal;
  /** Hears of every byte that came, and of those that an earlier process left. */
  readonly onBytes: (name: string, byteCount: number) => void;
  readonly connections?: number;
  readonly pieceBytes?: number;
  /** A connection that is silent for so long is given up. */
  readonly stallMs?: number;
  /** First pause before another try; it doubles each time. */
  readonly retryMs?: number;
}

const CONNECTIONS = 8;
const PIECE_BYTES = 16 * 1024 * 1024;
const STALL_MS = 30_000;
const RETRY_MS = 500;
const MAX_RETRY_MS = 20_000;
/** In a row, without a byte between them. */
const MAX_FAILURES = 6;

/**
 * Fetches all files, in their order as far as that goes.
 *
 * @throws CaravanError `hub_unavailable`, `checksum_mismatch`, `disk_full`, or what `explain` says.
 */
export async function download(
  folder: string,
  files: readonly RemoteFile[],
  options: DownloadOptions,
): Promise<void> {
  const { connections = CONNECTIONS, pieceBytes = PIECE_BYTES } = options;
  await checkRoom(folder, files);
  const failed = new AbortController();
  const signal = AbortSignal.any([options.signal, failed.signal]);
  const queue = files.values();
  const waiting: Piece[] = [];
  const open = new Map<PartialFile, number>();
  /** The next piece; another file is opened when the last one has none left. */
  let opening = Promise.resolve();
  const next = async (): Promise<Piece | undefined> => {
    // One worker at a time may open a file.
    const turn = opening.then(async () => {
      while (waiting.length === 0) {
        const { value: remote } = queue.next();
        if (remote === undefined) return;
        const file = await PartialFile.open(folder, remote, pieceBytes);
        const missing = file.missing();
        const missingBytes = missing.reduce((sum, { start, end }) => sum + end - start, 0);
        options.onBytes(remote.name, remote.bytes - missingBytes);
        open.set(file, missing.length);
        waiting.push(...missing);
        if (missing.length === 0) await finish(file);
      }
    });
    opening = turn.catch(() => undefined);
    await turn;
    return waiting.shift();
  };
  const finish = async (file: PartialFile): Promise<void> => {
    open.delete(file);
    try {
      await file.finish(signal);
    } catch (error) {
      // Pieces of an earlier process may be of another content: all of it is fetched once more.
      if (!file.isResumed || (error as CaravanError).code !== 'checksum_mismatch') throw error;
      options.onBytes(file.remote.name, -file.remote.bytes);
      const again = await PartialFile.open(folder, file.remote, pieceBytes);
      const missing = again.missing();
      open.set(again, missing.length);
      waiting.push(...missing);
    }
  };
  const work = async (): Promise<void> => {
    for (let piece = await next(); piece !== undefined; piece = await next()) {
      signal.throwIfAborted();
      await fetchPiece(piece, options, signal);
      const left = open.get(piece.file)! - 1;
      open.set(piece.file, left);
      if (left === 0) await finish(piece.file);
    }
  };
  try {
    const workers = Array.from({ length: connections }, () =>
      work().catch((error: unknown) => {
        failed.abort(error);
        throw error;
      }),
    );
    const settled = await Promise.allSettled(workers);
    options.signal.throwIfAborted();
    if (settled.some(({ status }) => status === 'rejected')) throw failed.signal.reason;
  } finally {
    for (const file of open.keys()) await file.close().catch(() => undefined);
  }
}

/** Fetches a piece, over as many connections as it takes. */
async function fetchPiece(
  piece: Piece,
  options: DownloadOptions,
  signal: AbortSignal,
): Promise<void> {
  const { file, start, end } = piece;
  const { name, bytes } = file.remote;
  let at = start;
  let failures = 0;
  while (at < end) {
    const reached = at;
    try {
      for await (const chunk of bytesOf(file.remote, at, end, options, signal)) {
        await file.write(chunk, at);
        at += chunk.length;
        options.onBytes(name, chunk.length);
      }
      if (at < end) throw new Error(`the answer ended at byte ${at}, before ${end}`);
    } catch (error) {
      signal.throwIfAborted();
      if (error instanceof CaravanError) throw error;
      failures = at > reached ? 1 : failures + 1;
      if (failures >= MAX_FAILURES) {
        throw new CaravanError(
          'hub_unavailable',
          `${name}: broke off at byte ${at} of ${bytes}: ${reasonOf(error)}; the same command goes on from there`,
          { cause: error },
        );
      }
      const pauseMs = Math.min((options.retryMs ?? RETRY_MS) * 2 ** (failures - 1), MAX_RETRY_MS);
      await delay(error instanceof Busy ? Math.max(error.pauseMs, pauseMs) : pauseMs, null, {
        signal,
      });
    }
  }
  await file.complete(piece);
}

/** The server asks to come back later. */
class Busy extends Error {
  readonly pauseMs: number;

  constructor(response: WebResponse) {
    super(`the server answered ${response.status}`);
    const seconds = Number(response.headers.get('retry-after') ?? 0);
    this.pauseMs = Number.isFinite(seconds) ? Math.min(1000 * seconds, MAX_RETRY_MS) : 0;
  }
}

/** The bytes from `start` to before `end`, or fewer when the connection ends early. */
async function* bytesOf(
  { name, url, bytes }: RemoteFile,
  start: number,
  end: number,
  { web, headers, explain, stallMs = STALL_MS }: DownloadOptions,
  signal: AbortSignal,
): AsyncGenerator<Uint8Array> {
  const stalled = new AbortController();
  const timer = setTimeout(() => {
    stalled.abort(new Error(`nothing came for ${stallMs} ms`));
  }, stallMs);
  try {
    const response = await web.fetch(url, {
      headers: { ...headers, range: `bytes=${start}-${end - 1}`, 'accept-encoding': 'identity' },
      signal: AbortSignal.any([signal, stalled.signal]),
    });
    if (response.status === 429 || response.status >= 500) {
      await response.body?.cancel();
      throw new Busy(response);
    }
    if (response.status !== 200 && response.status !== 206) {
      await response.body?.cancel();
      throw explain(response, name);
    }
    let at = checkRange(response, name, start, bytes);
    if (response.body === null) return;
    for await (const chunk of response.body as AsyncIterable<Uint8Array>) {
      timer.refresh();
      const wanted = chunk.subarray(Math.max(0, start - at), Math.max(0, end - at));
      at += chunk.length;
      if (wanted.length > 0) yield wanted;
      if (at >= end) return;
    }
  } catch (error) {
    stalled.signal.throwIfAborted();
    throw error;
  } finally {
    clearTimeout(timer);
  }
}

/** The byte that the answer begins with: 0 from a server that knows no ranges. */
function checkRange(response: WebResponse, name: string, start: number, bytes: number): number {
  const changed = (total: number): never => {
    throw new CaravanError(
      'checksum_mismatch',
      `${name}: has ${total} bytes now, and had ${bytes}; run the same command again`,
    );
  };
  if (response.status === 200) {
    const total = Number(response.headers.get('content-length') ?? bytes);
    return total === bytes ? 0 : changed(total);
  }
  const range = /^bytes (\d+)-\d+\/(\d+|\*)$/.exec(response.headers.get('content-range') ?? '');
  if (range === null || Number(range[1]) !== start) {
    throw new Error(`asked for byte ${start}, the server began with ${range?.[1] ?? 'another'}`);
  }
  return range[2] === '*' || Number(range[2]) === bytes ? start : changed(Number(range[2]));
}

/** Undici says "fetch failed" and keeps the reason in the cause, or in the cause of that. */
export function reasonOf(error: unknown): string {
  if (!(error instanceof Error)) return String(error);
  // Both addresses of a host were tried, and each failed.
  const cause: unknown =
    error.cause ?? (error instanceof AggregateError ? (error.errors as unknown[])[0] : undefined);
  const reason = cause instanceof Error ? reasonOf(cause) : '';
  return reason === '' ? error.message : reason;
}

/** @throws CaravanError `disk_full` before a byte is fetched that will not fit. */
async function checkRoom(folder: string, files: readonly RemoteFile[]): Promise<void> {
  const { bavail, bsize } = await fs.promises.statfs(folder);
  const parts = await Promise.all(
    files.map(({ name }) =>
      fs.promises.stat(path.join(folder, '.caravan-pull', `${name}.part`)).catch(() => null),
    ),
  );
  // Holes of a part that is not whole yet take no room: blocks are of 512 bytes.
  const there = parts.reduce((sum, stat) => sum + 512 * (stat?.blocks ?? 0), 0);
  const needed = files.reduce((sum, { bytes }) => sum + bytes, 0) - there;
  if (needed > bavail * bsize) {
    throw new CaravanError(
      'disk_full',
      `${folder}: ${needed} bytes are needed, ${bavail * bsize} are free`,
    );
  }
}
