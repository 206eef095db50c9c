/**
 * A small server of the S3 protocol: objects, ranges, uploads in parts, lists in pages. It checks every request's
 * signature (AWS Signature Version 4) and the digest of its body, written from Amazon's description.
 */
import { createHash, createHmac } from 'node:crypto';
import http, { type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';

const KEY_ID = 'caravan-test';
const SECRET = 'a secret of the test';
const PAGE = 2;
const LEAST_PART_BYTES = 5 * 1024 * 1024;

/** What an AWS client finds in its environment. */
export const s3Credentials = { AWS_ACCESS_KEY_ID: KEY_ID, AWS_SECRET_ACCESS_KEY: SECRET } as const;

export interface S3Server {
  readonly endpoint: string;
  /** By `bucket/key`. */
  readonly objects: Map<string, Buffer>;
  /** Uploads in parts that have neither been completed nor given up. */
  readonly uploads: Map<string, Map<number, Buffer>>;
  /** Every so many parts of an upload, in the order of their coming. */
  partCount(): number;
  /** The next `count` requests that write are answered 500. */
  failWrites(count: number): void;
  stop(): Promise<void>;
}

const sha256 = (data: Buffer | string): string => createHash('sha256').update(data).digest('hex');
const hmac = (key: Buffer | string, data: string): Buffer =>
  createHmac('sha256', key).update(data).digest();

/** Amazon's encoding of a query: more than encodeURIComponent's. */
const encode = (text: string): string =>
  encodeURIComponent(text).replace(
    /[!'()*]/g,
    (c) => `%${c.charCodeAt(0).toString(16).toUpperCase()}`,
  );

/** @returns why the signature is wrong, or null. */
function wrongSignature(request: IncomingMessage, url: URL, body: Buffer): string | null {
  const { authorization = '' } = request.headers;
  const match =
    /^AWS4-HMAC-SHA256 Credential=([^/]+)\/((\d{8})\/([\w-]+)\/s3\/aws4_request), ?SignedHeaders=([^,]+), ?Signature=([0-9a-f]{64})$/.exec(
      authorization,
    );
  if (match === null) return 'no signature';
  const [, keyId, scope, day, region, signed, signature] = match as unknown as string[];
  if (keyId !== KEY_ID) return 'another key';
  const digest = String(request.headers['x-amz-content-sha256']);
  if (digest !== sha256(body) && digest !== 'UNSIGNED-PAYLOAD') return 'another body';
  const query = [...url.searchParams].map(([name, value]) => `${encode(name)}=${encode(value)}`);
  const headers = signed!
    .split(';')
    .map((name) => `${name}:${String(request.headers[name]).trim().replace(/ +/g, ' ')}\n`);
  const canonical = [
    request.method,
    url.pathname,
    query.sort().join('&'),
    headers.join(''),
    signed,
    digest,
  ].join('\n');
  const date = String(request.headers['x-amz-date']);
  const text = ['AWS4-HMAC-SHA256', date, scope, sha256(canonical)].join('\n');
  const key = [region!, 's3', 'aws4_request'].reduce(hmac, hmac(`AWS4${SECRET}`, day!));
  return hmac(key, text).toString('hex') === signature ? null : 'another signature';
}

export async function startS3(): Promise<S3Server> {
  const objects = new Map<string, Buffer>();
  const uploads = new Map<string, Map<number, Buffer>>();
  let failing = 0;
  let parts = 0;

  const xml = (response: ServerResponse, status: number, inner: string): void => {
    response.writeHead(status, { 'content-type': 'application/xml' });
    response.end(`<?xml version="1.0" encoding="UTF-8"?>${inner}`);
  };
  const fail = (response: ServerResponse, status: number, code: string): void => {
    xml(response, status, `<Error><Code>${code}</Code><Message>${code}</Message></Error>`);
  };

  const list = (response: ServerResponse, bucket: string, query: URLSearchParams): void => {
    const prefix = `${bucket}/${query.get('prefix') ?? ''}`;
    const after = query.get('continuation-token') ?? '';
    const keys = [...objects.keys()].filter((key) => key.startsWith(prefix) && key > after).sort();
    const page = keys.slice(0, PAGE);
    const rows = page.map(
      (key) => `<Contents><Key>${key.slice(bucket.length + 1)}</Key></Contents>`,
    );
    const next = keys.length > PAGE;
    const last = page.at(-1) ?? '';
    const token = next ? `<NextContinuationToken>${last}</NextContinuationToken>` : '';
    const head = `<IsTruncated>${next}</IsTruncated>${token}`;
    xml(response, 200, `<ListBucketResult>${head}${rows.join('')}</ListBucketResult>`);
  };

  const post = (response: ServerResponse, key: string, query: URLSearchParams, body: Buffer) => {
    const id = query.get('uploadId');
    if (id === null) {
      const newId = `upload-${uploads.size}-${Date.now()}`;
      uploads.set(newId, new Map());
      const inner = `<UploadId>${newId}</UploadId>`;
      xml(response, 200, `<InitiateMultipartUploadResult>${inner}</InitiateMultipartUploadResult>`);
      return;
    }
    const upload = uploads.get(id);
    if (upload === undefined) {
      fail(response, 404, 'NoSuchUpload');
      return;
    }
    const named = [...body.toString().matchAll(/<PartNumber>(\d+)</g)].map(([, n]) => Number(n));
    const pieces = named.map((n) => upload.get(n)!);
    if (pieces.slice(0, -1).some((piece) => piece.length < LEAST_PART_BYTES)) {
      fail(response, 400, 'EntityTooSmall');
      return;
    }
    objects.set(key, Buffer.concat(pieces));
    uploads.delete(id);
    xml(response, 200, '<CompleteMultipartUploadResult></CompleteMultipartUploadResult>');
  };

  const put = (response: ServerResponse, key: string, query: URLSearchParams, body: Buffer) => {
    if (failing > 0) {
      failing -= 1;
      fail(response, 500, 'InternalError');
      return;
    }
    const upload = uploads.get(query.get('uploadId') ?? '');
    if (upload !== undefined) {
      upload.set(Number(query.get('partNumber')), body);
      parts += 1;
    } else objects.set(key, body);
    response.writeHead(200, { etag: `"${sha256(body).slice(0, 32)}"` });
    response.end();
  };

  const get = (request: IncomingMessage, response: ServerResponse, key: string): void => {
    const object = objects.get(key);
    if (object === undefined) {
      fail(response, 404, 'NoSuchKey');
      return;
    }
    const range = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '');
    if (range === null) {
      response.writeHead(200, { 'content-length': object.length });
      response.end(request.method === 'HEAD' ? undefined : object);
      return;
    }
    const start = Number(range[1]);
    if (start >= object.length) {
      fail(response, 416, 'InvalidRange');
      return;
    }
    const piece = object.subarray(start, Number(range[2]) + 1);
    response.writeHead(206, {
      'content-length': piece.length,
      'content-range': `bytes ${start}-${start + piece.length - 1}/${object.length}`,
    });
    response.end(piece);
  };

  const answer = (request: IncomingMessage, response: ServerResponse, body: Buffer): void => {
    const url = new URL(request.url!, 'http://s3');
    if (wrongSignature(request, url, body) !== null) {
      fail(response, 403, 'SignatureDoesNotMatch');
      return;
    }
    const query = url.searchParams;
    const key = decodeURIComponent(url.pathname.slice(1)).replace(/\/$/, '');
    if (!key.includes('/')) {
      if (query.has('uploads')) xml(response, 200, '<ListMultipartUploadsResult/>');
      else list(response, key, query);
    } else if (request.method === 'PUT') put(response, key, query, body);
    else if (request.method === 'POST') post(response, key, query, body);
    else if (request.method === 'DELETE') {
      const id = query.get('uploadId');
      if (id === null) objects.delete(key);
      else uploads.delete(id);
      response.writeHead(204);
      response.end();
    } else get(request, response, key);
  };

  const server = http.createServer((request, response) => {
    const chunks: Buffer[] = [];
    request.on('data', (chunk: Buffer) => chunks.push(chunk));
    request.on('end', () => {
      answer(request, response, Buffer.concat(chunks));
    });
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as AddressInfo;
  return {
    endpoint: `http://127.0.0.1:${port}`,
    objects,
    uploads,
    partCount: () => parts,
    failWrites: (count) => {
      failing = count;
    },
    stop: async () => {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
}
