/** Files in a bucket of S3 or of what speaks its protocol. */
import {
  AbortMultipartUploadCommand,
  CompleteMultipartUploadCommand,
  CreateMultipartUploadCommand,
  DeleteObjectCommand,
  GetObjectCommand,
  HeadObjectCommand,
  ListMultipartUploadsCommand,
  ListObjectsV2Command,
  PutObjectCommand,
  S3Client,
  S3ServiceException,
  UploadPartCommand,
  type CompletedPart,
} from '@aws-sdk/client-s3';
import { CaravanError } from '../proto/errors.js';
import { storageError, type FileStorage, type StoredObject } from './file-storage.js';

/** S3 takes parts of at least 5 MiB, and at most 10,000 of them: objects up to 80 GB. */
const PART_BYTES = 8 * 1024 * 1024;
const CONNECT_TIMEOUT_MS = 5_000;
const CALL_TIMEOUT_MS = 60_000;
const MAX_ATTEMPTS = 3;
const DEFAULT_REGION = 'us-east-1';
/** A multipart upload that has not ended after this was a dead gateway's. */
const ABANDONED_AFTER_MS = 24 * 3600 * 1000;

/**
 * Opens `s3://BUCKET/PREFIX?endpoint=URL&region=REGION`. Credentials, and what the place leaves out, come from where
 * Amazon's tools look for them: AWS_ACCESS_KEY_ID and the like, profiles, the roles of a container.
 *
 * @throws CaravanError `bad_usage`.
 */
export function openBucket(place: string): FileBucket {
  const match = /^s3:\/\/([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:\/([\w.\-/]*))?(?:\?(.*))?$/.exec(
    place,
  );
  if (match === null) {
    throw new CaravanError('bad_usage', `--files ${place}: must be s3://BUCKET/PREFIX`);
  }
  const query = new URLSearchParams(match[3] ?? '');
  for (const name of query.keys()) {
    if (name === 'endpoint' || name === 'region') continue;
    throw new CaravanError('bad_usage', `--files ${place}: ${name} is neither endpoint nor region`);
  }
  const endpoint = query.get('endpoint');
  if (endpoint !== null && !/^https?:\/\/[^\s/]+\/?$/.test(endpoint)) {
    throw new CaravanError('bad_usage', `--files ${place}: endpoint must be http(s)://HOST:PORT`);
  }
  const region = query.get('region') ?? process.env['AWS_REGION'] ?? DEFAULT_REGION;
  const isOther = endpoint !== null || process.env['AWS_ENDPOINT_URL'] !== undefined;
  // It would tell every user of Node 20 of releases that we do not take: ours is pinned.
  process.env['AWS_SDK_JS_NODE_VERSION_SUPPORT_WARNING_DISABLED'] ??= 'true';
  const client = new S3Client({
    region,
    maxAttempts: MAX_ATTEMPTS,
    requestHandler: { connectionTimeout: CONNECT_TIMEOUT_MS, requestTimeout: CALL_TIMEOUT_MS },
    // Checksums in trailers are Amazon's own; others refuse them.
    requestChecksumCalculation: 'WHEN_REQUIRED',
    responseChecksumValidation: 'WHEN_REQUIRED',
    ...(endpoint === null ? {} : { endpoint }),
    // Few but Amazon have a host name for every bucket.
    ...(isOther ? { forcePathStyle: true } : {}),
  });
  const prefix = (match[2] ?? '').replace(/\/*$/, '');
  return new FileBucket(client, match[1]!, prefix === '' ? '' : `${prefix}/`);
}

export class FileBucket implements FileStorage {
  readonly place: string;
  readonly #client: S3Client;
  readonly #bucket: string;
  readonly #prefix: string;

  constructor(client: S3Client, bucket: string, prefix: string) {
    this.#client = client;
    this.#bucket = bucket;
    this.#prefix = prefix;
    this.place = `s3://${bucket}/${prefix}`;
  }

  async write(
    key: string,
    source: AsyncIterable<Uint8Array>,
    signal?: AbortSignal,
  ): Promise<number> {
    const target = { Bucket: this.#bucket, Key: this.#prefix + key };
    const parts = gathered(source);
    const first = await parts.next();
    const head = first.done === true ? Buffer.alloc(0) : first.value;
    signal?.throwIfAborted();
    if (head.length < PART_BYTES) {
      await this.#call(() => this.#client.send(new PutObjectCommand({ ...target, Body: head })));
      return head.length;
    }
    const { UploadId } = await this.#call(() =>
      this.#client.send(new CreateMultipartUploadCommand(target)),
    );
    const upload = { ...target, UploadId };
    const done: CompletedPart[] = [];
    let bytes = 0;
    const send = async (body: Buffer): Promise<void> => {
      signal?.throwIfAborted();
      const PartNumber = done.length + 1;
      const { ETag } = await this.#call(() =>
        this.#client.send(new UploadPartCommand({ ...upload, PartNumber, Body: body })),
      );
      done.push({ PartNumber, ETag });
      bytes += body.length;
    };
    try {
      await send(head);
      for await (const part of parts) await send(part);
      const MultipartUpload = { Parts: done };
      await this.#call(() =>
        this.#client.send(new CompleteMultipartUploadCommand({ ...upload, MultipartUpload })),
      );
      return bytes;
    } catch (error) {
      await this.#client.send(new AbortMultipartUploadCommand(upload)).catch(() => undefined);
      throw error;
    }
  }

  async read(key: string, start: number, end: number): Promise<Buffer> {
    const target = { Bucket: this.#bucket, Key: this.#prefix + key };
    try {
      return await this.#call(async () => {
        const Range = `bytes=${start}-${end - 1}`;
        const { Body } = await this.#client.send(new GetObjectCommand({ ...target, Range }));
        return Buffer.from((await Body?.transformToByteArray()) ?? []);
      });
    } catch (error) {
      const { cause } = error as CaravanError;
      if (cause instanceof S3ServiceException && cause.name === 'InvalidRange') {
        return Buffer.alloc(0);
      }
      throw error;
    }
  }

  async size(key: string): Promise<number | null> {
    try {
      const { ContentLength } = await this.#call(() =>
        this.#client.send(new HeadObjectCommand({ Bucket: this.#bucket, Key: this.#prefix + key })),
      );
      return ContentLength ?? 0;
    } catch (error) {
      if (error instanceof CaravanError && error.code === 'not_found') return null;
      throw error;
    }
  }

  async remove(key: string): Promise<void> {
    await this.#call(() =>
      this.#client.send(new DeleteObjectCommand({ Bucket: this.#bucket, Key: this.#prefix + key })),
    );
  }

  /** On the way, half-written objects of dead gateways are given up. */
  async *list(prefix: string): AsyncGenerator<StoredObject> {
    const all = { Bucket: this.#bucket, Prefix: this.#prefix + prefix };
    await this.#giveUpAbandoned(all);
    let ContinuationToken: string | undefined;
    do {
      const page = await this.#call(() =>
        this.#client.send(new ListObjectsV2Command({ ...all, ContinuationToken })),
      );
      for (const { Key, LastModified } of page.Contents ?? []) {
        const key = Key!.slice(this.#prefix.length);
        yield { key, modifiedMs: LastModified?.getTime() ?? Date.now() };
      }
      ContinuationToken = page.NextContinuationToken;
    } while (ContinuationToken !== undefined);
  }

  async #giveUpAbandoned(all: { readonly Bucket: string; readonly Prefix: string }): Promise<void> {
    try {
      const { Uploads = [] } = await this.#client.send(new ListMultipartUploadsCommand(all));
      for (const { Key, UploadId, Initiated } of Uploads) {
        if (Date.now() - (Initiated?.getTime() ?? Date.now()) < ABANDONED_AFTER_MS) continue;
        const upload = { Bucket: this.#bucket, Key, UploadId };
        await this.#client.send(new AbortMultipartUploadCommand(upload));
      }
    } catch {
      // Not every storage allows it; a rule of the bucket can do the same.
    }
  }

  async #call<T>(call: () => Promise<T>): Promise<T> {
    try {
      return await call();
    } catch (cause) {
      const { name } = cause as Error;
      if (name === 'NoSuchKey' || name === 'NotFound') {
        throw new CaravanError('not_found', `the file is not at ${this.place}`, { cause });
      }
      throw storageError(this.place, cause);
    }
  }
}

/** Pieces of any size as parts of PART_BYTES, the last one shorter. */
async function* gathered(source: AsyncIterable<Uint8Array>): AsyncGenerator<Buffer> {
  let held: Uint8Array[] = [];
  let bytes = 0;
  for await (const piece of source) {
    held.push(piece);
    bytes += piece.length;
    while (bytes >= PART_BYTES) {
      const all = Buffer.concat(held);
      yield all.subarray(0, PART_BYTES);
      const rest = all.subarray(PART_BYTES);
      held = [Buffer.from(rest)];
      bytes = rest.length;
    }
  }
  if (bytes > 0) yield Buffer.concat(held);
}
