/**
 * Reader of safetensors files: an 8-byte little-endian header length, a JSON header, then raw tensors.
 * Format: https://huggingface.co/docs/safetensors. Nothing but the header is read here.
 */
import fs from 'node:fs';
import path from 'node:path';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { formatOf } from './formats.js';
import { quoted } from './quoted.js';
import type { StoredTensor } from './stored-tensor.js';

const MAX_HEADER_BYTES = 100_000_000;
/** Names stand in messages: one line, and not long. */
const tensorName = /^[^\p{Cc}\p{Zl}\p{Zp}]{1,400}$/u;

const entry = z.object({
  dtype: z.string().regex(/^\w{1,20}$/, 'is no name of a dtype'),
  shape: z.array(z.number().int().nonnegative()),
  data_offsets: z.tuple([z.number().int().nonnegative(), z.number().int().nonnegative()]),
});

export interface SafetensorsHeader {
  readonly tensors: ReadonlyMap<string, StoredTensor>;
  /** The header as it stands in the file, for digests. */
  readonly bytes: Buffer;
}

/**
 * Reads and checks the header of one file.
 *
 * @throws CaravanError `invalid_checkpoint` naming the file, the tensor, the rule and the value.
 */
export function readSafetensorsHeader(file: string): SafetensorsHeader {
  const name = path.basename(file);
  const fail = (message: string, cause?: unknown): never => {
    throw new CaravanError('invalid_checkpoint', `${name}: ${message}`, { cause });
  };
  const descriptor = openForReading(file);
  try {
    const fileBytes = fs.fstatSync(descriptor).size;
    const prefix = Buffer.alloc(8);
    if (fs.readSync(descriptor, prefix, 0, 8, 0) < 8) fail('is shorter than 8 bytes');
    const headerBytes = Number(prefix.readBigUInt64LE());
    if (headerBytes > MAX_HEADER_BYTES) fail(`header of ${headerBytes} bytes is over the limit`);
    if (8 + headerBytes > fileBytes) {
      fail(`header of ${headerBytes} bytes ends after the file of ${fileBytes} bytes: truncated?`);
    }
    const bytes = Buffer.alloc(headerBytes);
    fs.readSync(descriptor, bytes, 0, headerBytes, 8);
    let json: unknown;
    try {
      json = JSON.parse(bytes.toString('utf8'));
    } catch (cause) {
      return fail('the header is not valid JSON', cause);
    }
    if (typeof json !== 'object' || json === null || Array.isArray(json)) {
      return fail('the header is not a JSON object');
    }
    const dataStart = 8 + headerBytes;
    const tensors = new Map<string, StoredTensor>();
    for (const [tensor, value] of Object.entries(json)) {
      if (tensor === '__metadata__') continue;
      if (!tensorName.test(tensor)) fail(`${quoted(tensor)} is no name of a tensor`);
      const parsed = entry.safeParse(value);
      if (!parsed.success) {
        const issue = parsed.error.issues[0];
        return fail(`${tensor}: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`);
      }
      const {
        dtype,
        shape,
        data_offsets: [begin, end],
      } = parsed.data;
      const byteCount = end - begin;
      if (byteCount < 0 || dataStart + end > fileBytes) {
        fail(
          `${tensor}: data_offsets [${begin}, ${end}] lie outside the file's ` +
            `${fileBytes - dataStart} bytes of data: truncated?`,
        );
      }
      const format = formatOf(dtype);
      if (format !== undefined) {
        const expected = shape.reduce((product, n) => product * n, format.blockBytes);
        if (expected !== byteCount) {
          fail(
            `${tensor}: ${dtype} of shape [${shape.join(', ')}] needs ${expected} bytes, has ${byteCount}`,
          );
        }
      }
      tensors.set(tensor, { file, format: dtype, shape, offset: dataStart + begin, byteCount });
    }
    refuseOverlaps(tensors, fail);
    return { tensors, bytes };
  } finally {
    fs.closeSync(descriptor);
  }
}

function refuseOverlaps(
  tensors: ReadonlyMap<string, StoredTensor>,
  fail: (message: string) => never,
): void {
  const byOffset = [...tensors].sort(([, a], [, b]) => a.offset - b.offset);
  let previous: [string, StoredTensor] | undefined;
  for (const current of byOffset) {
    const [name, tensor] = current;
    if (previous !== undefined && tensor.offset < previous[1].offset + previous[1].byteCount) {
      fail(`${name}: overlaps ${previous[0]}`);
    }
    if (tensor.byteCount > 0) previous = current;
  }
}

/** Opens a file of a checkpoint, or says in one line why not. */
export function openForReading(file: string): number {
  try {
    return fs.openSync(file, 'r');
  } catch (cause) {
    const reason =
      (cause as NodeJS.ErrnoException).code === 'ENOENT' ? 'does not exist' : String(cause);
    throw new CaravanError('invalid_checkpoint', `${file}: ${reason}`, { cause });
  }
}
