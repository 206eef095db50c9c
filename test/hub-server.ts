/**
 * A Hugging Face hub of the tests' own: its API, its redirects of large files to another host with signed URLs, gated
 * repositories, ranges. It breaks connections, lies, and is slow, when it is told to. Beside it stands Meta's server.
 */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import type { AddressInfo } from 'node:net';
import type { Leaf } from './certificates.js';

export interface ServedRepository {
  readonly commit: string;
  readonly files: ReadonlyMap<string, Buffer>;
  /** Who may read it: anybody, or whoever has this token. */
  readonly token?: string;
}

/** What was asked for, and what of it was answered. */
export interface Asked {
  readonly path: string;
  readonly range: string | undefined;
  readonly authorization: string | undefined;
  /** Bytes of content that were handed to the socket. */
  sentBytes: number;
}

export interface HubHosts {
  readonly hub: string;
  readonly storage: string;
  readonly leaf?: Leaf;
}

/** Changes an answer: sends something else than `bytes`, or nothing for ever. */
export type Fault = (
  asked: Asked,
  bytes: Buffer,
  response: http.ServerResponse,
) => 'handled' | 'as usual';

/** Files from this size on lie in the hub's large storage. */
const LARGE_BYTES = 4096;

export class HubServer {
  readonly repositories = new Map<string, ServedRepository>();
  readonly asked: Asked[] = [];
  /** Of content, not of the API. */
  fault: Fault = () => 'as usual';
  /** Claims another size of a file. */
  claimedBytes = new Map<string, number>();
  /** Meta's files by path; the signature must be right. */
  readonly metaFiles = new Map<string, Buffer>();
  readonly #hub: http.Server;
  readonly #storage: http.Server;
  readonly #hosts: HubHosts;

  /** @param hosts what hub and storage call themselves, and the certificate of both: then they speak https. */
  constructor(hosts: HubHosts = { hub: '127.0.0.1', storage: '127.0.0.1' }) {
    this.#hosts = hosts;
    const serve = (answer: http.RequestListener): http.Server => {
      if (hosts.leaf === undefined) return http.createServer(answer);
      const [cert, key] = [hosts.leaf.certPath, hosts.leaf.keyPath].map((f) => fs.readFileSync(f));
      return https.createServer({ cert, key }, answer);
    };
    this.#hub = serve((request, response) => {
      this.#answer(request, response);
    });
    this.#storage = serve((request, response) => {
      this.#answerLarge(request, response);
    });
  }

  async start(): Promise<void> {
    for (const server of [this.#hub, this.#storage]) {
      await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    }
  }

  stop(): void {
    for (const server of [this.#hub, this.#storage]) {
      server.close();
      server.closeAllConnections();
    }
  }

  get url(): string {
    return this.#urlOf(this.#hub, this.#hosts.hub);
  }

  /** As Meta's e-mail has it. */
  metaUrl(signature = 'right'): string {
    return `${this.url}/meta/*?Policy=abc&Signature=${signature}&Key-Pair-Id=K1`;
  }

  /** Bytes of content since the last call. */
  takeSentBytes(): number {
    return this.asked.splice(0).reduce((sum, { sentBytes }) => sum + sentBytes, 0);
  }

  #urlOf(server: http.Server, host: string): string {
    const scheme = this.#hosts.leaf === undefined ? 'http' : 'https';
    return `${scheme}://${host}:${(server.address() as AddressInfo).port}`;
  }

  #answer(request: http.IncomingMessage, response: http.ServerResponse): void {
    const { pathname, searchParams } = new URL(request.url!, this.url);
    const api = /^\/api\/models\/([^/]+\/[^/]+)\/revision\/([^/]+)$/.exec(pathname);
    if (api !== null) {
      this.#describe(api[1]!, decodeURIComponent(api[2]!), request, response);
      return;
    }
    const file = /^\/([^/]+\/[^/]+)\/resolve\/([^/]+)\/([^/]+)$/.exec(pathname);
    if (file !== null) {
      this.#resolve(file[1]!, file[2]!, decodeURIComponent(file[3]!), request, response);
      return;
    }
    const meta = this.metaFiles.get(pathname.slice('/meta/'.length));
    if (searchParams.get('Signature') !== 'right') refuse(response, 403);
    else if (meta === undefined) refuse(response, 404);
    else this.#send(pathname, meta, request, response);
  }

  #describe(
    id: string,
    revision: string,
    { headers }: http.IncomingMessage,
    response: http.ServerResponse,
  ): void {
    const repository = this.repositories.get(id);
    if (repository === undefined) {
      // As the hub does: it does not say which private repositories there are.
      refuse(response, headers.authorization === undefined ? 401 : 404, 'RepoNotFound');
      return;
    }
    if (revision !== 'main' && revision !== repository.commit) {
      refuse(response, 404, 'RevisionNotFound');
      return;
    }
    const siblings = [...repository.files].map(([rfilename, bytes]) => {
      const size = this.claimedBytes.get(rfilename) ?? bytes.length;
      const blobId = createHash('sha1')
        .update(`blob ${bytes.length}\0`)
        .update(bytes)
        .digest('hex');
      const sha256 = createHash('sha256').update(bytes).digest('hex');
      const isLarge = bytes.length >= LARGE_BYTES;
      return { rfilename, size, blobId, ...(isLarge ? { lfs: { sha256, size } } : {}) };
    });
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify({ id, sha: repository.commit, siblings }));
  }

  #resolve(
    id: string,
    commit: string,
    name: string,
    request: http.IncomingMessage,
    response: http.ServerResponse,
  ): void {
    const repository = this.repositories.get(id);
    const bytes = repository?.files.get(name);
    if (repository === undefined || bytes === undefined || repository.commit !== commit) {
      refuse(response, 404, 'EntryNotFound');
    } else if (
      repository.token !== undefined &&
      request.headers.authorization !== `Bearer ${repository.token}`
    ) {
      refuse(response, request.headers.authorization === undefined ? 401 : 403, 'GatedRepo');
    } else if (bytes.length >= LARGE_BYTES) {
      const location = `${this.#urlOf(this.#storage, this.#hosts.storage)}/${id}/${name}?signature=right`;
      response.writeHead(302, { location }).end();
    } else {
      this.#send(`/${id}/${name}`, bytes, request, response);
    }
  }

  #answerLarge(request: http.IncomingMessage, response: http.ServerResponse): void {
    const { pathname, searchParams } = new URL(request.url!, this.url);
    const [, organization, name, file] = pathname.split('/');
    const bytes = this.repositories.get(`${organization}/${name}`)?.files.get(file ?? '');
    if (searchParams.get('signature') !== 'right' || bytes === undefined) refuse(response, 403);
    else this.#send(pathname, bytes, request, response);
  }

  #send(
    path: string,
    bytes: Buffer,
    { headers }: http.IncomingMessage,
    response: http.ServerResponse,
  ): void {
    const { range, authorization } = headers;
    const asked: Asked = { path, range, authorization, sentBytes: 0 };
    this.asked.push(asked);
    const [, first, last] = /^bytes=(\d+)-(\d+)$/.exec(range ?? '') ?? [];
    const start = Number(first ?? 0);
    const end = Math.min(Number(last ?? bytes.length - 1) + 1, bytes.length);
    if (first !== undefined && start < bytes.length) {
      response.statusCode = 206;
      response.setHeader('content-range', `bytes ${start}-${end - 1}/${bytes.length}`);
    }
    const part = bytes.subarray(start, end);
    response.setHeader('content-length', part.length);
    if (this.fault(asked, part, response) === 'handled') return;
    asked.sentBytes = part.length;
    response.end(part);
  }
}

function refuse(response: http.ServerResponse, status: number, code?: string): void {
  if (code !== undefined) response.setHeader('x-error-code', code);
  response.writeHead(status).end();
}
