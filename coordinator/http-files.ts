/** OpenAI's files: uploaded in a stream, listed, read and deleted. */
import { Readable } from 'node:stream';
import multipart from '@fastify/multipart';
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { CaravanError } from '../proto/errors.js';
import type { Batches } from './batches.js';
import { pieces } from './file-storage.js';
import type { Files } from './files.js';
import { ownerOf, tenantOf, type TenantRoutes } from './http-tenant.js';
import { fileBody, listBody, parseFileList, parseUpload } from './openai-batch.js';
import { fileKey, type FileRecord } from './store-files.js';

/** Fields beside the file are short. */
const MAX_FIELD_BYTES = 4096;
const MAX_FIELDS = 16;
const MAX_FILENAME_CHARACTERS = 255;
/** An upload that sends nothing for this long is given up. */
const SILENCE_MS = 120_000;

export interface FileRoutes extends TenantRoutes {
  readonly files: Files;
  readonly batches: Batches;
}

export function addFileRoutes(app: FastifyInstance, routes: FileRoutes): void {
  const { files, batches, tenants } = routes;
  const isOwn = (request: FastifyRequest) => {
    const tenant = tenantOf(routes, request);
    return ({ tenant: owner }: FileRecord) => tenants.mayMind(tenant, owner);
  };
  const find = async (request: FastifyRequest, id: string): Promise<FileRecord> => {
    const record = await files.records.get(id);
    if (isOwn(request)(record)) return record;
    throw new CaravanError('not_found', `file ${id} does not exist`);
  };
  // The sizes of files are limited where they are written: no part of the form is held in memory.
  void app.register(multipart, {
    limits: { files: 1, fields: MAX_FIELDS, fieldSize: MAX_FIELD_BYTES, fileSize: Infinity },
    throwFileSizeLimit: false,
  });

  app.post('/v1/files', async (request) => {
    if (!request.isMultipart()) {
      throw new CaravanError('invalid_request', 'the body must be multipart/form-data', {
        param: 'file',
      });
    }
    return fileBody(await receive(request, files, ownerOf(routes, request)));
  });

  app.get('/v1/files', async (request) => {
    const { purpose, order, after, limit } = parseFileList(request.query);
    const wish = { purpose: purpose ?? null, order, after: after ?? null, limit };
    return listBody(await files.records.list(wish, isOwn(request)), fileBody);
  });

  app.get<{ Params: { id: string } }>('/v1/files/:id', async (request) =>
    fileBody(await find(request, request.params.id)),
  );

  app.get<{ Params: { id: string } }>('/v1/files/:id/content', async (request, reply) => {
    const { id, bytes, filename } = await find(request, request.params.id);
    if ((await files.storage.size(fileKey(id))) === null) {
      throw new CaravanError(
        'not_found',
        `the bytes of file ${id} are not in this gateway's storage`,
      );
    }
    const name = encodeURIComponent(filename);
    void reply
      .type('application/octet-stream')
      .header('content-length', bytes)
      .header('content-disposition', `attachment; filename*=UTF-8''${name}`);
    return reply.send(Readable.from(pieces(files.storage, fileKey(id)), { objectMode: false }));
  });

  app.delete<{ Params: { id: string } }>('/v1/files/:id', async (request) => {
    const { id } = request.params;
    if (tenants.areApart) await find(request, id);
    if (await batches.isInput(id)) {
      throw new CaravanError('in_use', `file ${id} is the input of a batch that has not ended`);
    }
    await files.remove(id);
    return { id, object: 'file', deleted: true };
  });
}

/** Parts come in any order: the file is stored as it comes, and made known when all fields are right. */
async function receive(
  request: FastifyRequest,
  files: Files,
  tenant: string | null,
): Promise<FileRecord> {
  const fields = new Map<string, string>();
  let stored: { readonly id: string; readonly bytes: number; readonly filename: string } | null =
    null;
  try {
    for await (const part of request.parts()) {
      if (part.type === 'field') {
        fields.set(part.fieldname, String(part.value));
        continue;
      }
      if (part.fieldname !== 'file') {
        part.file.resume();
        throw new CaravanError('invalid_request', `${part.fieldname}: a file has no place here`);
      }
      const received = await files.receive(unlessSilent(part.file, request));
      stored = { ...received, filename: part.filename.slice(0, MAX_FILENAME_CHARACTERS) };
    }
    if (stored === null) {
      throw new CaravanError('invalid_request', 'file: is missing', { param: 'file' });
    }
    const { keptS } = parseUpload(fields);
    const { id, bytes, filename } = stored;
    const createdMs = Date.now();
    const expiresS = Math.floor(createdMs / 1000) + keptS;
    const owned = tenant === null ? {} : { tenant };
    const about = { filename, purpose: 'batch', ...owned } as const;
    const record = { id, bytes, createdMs, expiresS, ...about };
    await files.add(record);
    return record;
  } catch (error) {
    if (stored !== null) await files.discard(stored.id);
    throw asRefusal(error);
  }
}

/** The pieces of an upload, for as long as they come. @throws CaravanError `timeout`, `cancelled`. */
async function* unlessSilent(file: Readable, request: FastifyRequest): AsyncGenerator<Buffer> {
  const timer = setTimeout(() => {
    const seconds = SILENCE_MS / 1000;
    file.destroy(new CaravanError('timeout', `file: nothing came for ${seconds} s`));
  }, SILENCE_MS);
  try {
    for await (const piece of file) {
      yield piece as Buffer;
      timer.refresh();
    }
  } catch (error) {
    if (error instanceof CaravanError || !request.raw.destroyed) throw error;
    throw new CaravanError('cancelled', 'the client left', { cause: error });
  } finally {
    clearTimeout(timer);
  }
}

/** What is wrong with the form itself, in our words. */
function asRefusal(error: unknown): unknown {
  const { code, message = '' } = error as { code?: unknown; message?: string };
  if (error instanceof CaravanError) return error;
  // Its reader's own errors have no code.
  const isOfForm =
    (typeof code === 'string' && code.startsWith('FST_')) ||
    /^(Unexpected end of|Malformed|Multipart:|Boundary)/.test(message);
  if (!isOfForm) return error;
  return new CaravanError('invalid_request', `the form is malformed: ${message}`);
}
