/** The HTTP front: routes, errors in OpenAI's shape, health, metrics and the status page. */
import type { IncomingMessage } from 'node:http';
import type { Server as HttpsServer } from 'node:https';
import type { Socket } from 'node:net';
import Fastify, { type FastifyInstance } from 'fastify';
import type { Logger } from 'pino';
import { CaravanError, errorTable, toCaravanError } from '../proto/errors.js';
import { addAnswerRoutes } from './http-answers.js';
import { addBatchRoutes, type BatchRoutes } from './http-batches.js';
import type { HttpCertificate } from './http-certificate.js';
import { addFileRoutes, type FileRoutes } from './http-files.js';
import { addJobRoutes } from './http-jobs.js';
import { addQueueRoutes, type QueueRoutes } from './http-queues.js';
import { addResponseRoutes, type ResponseRoutes } from './http-responses.js';
import { statusPage } from './http-status.js';
import { tenantOf } from './http-tenant.js';
import { addTokenizeRoutes } from './http-tokenize.js';
import type { GatewayMetrics } from './metrics.js';
import { parseJson } from './json-text.js';
import { errorBody, modelBody } from './openai-answer.js';
import { describeApi } from './openapi.js';
import { packageVersion } from './package-root.js';
import type { Store } from './store.js';
import type { RedisWatch } from './store-watch.js';
import type { WorkMeter } from './work.js';

export interface HttpRoutes extends ResponseRoutes, FileRoutes, BatchRoutes, QueueRoutes {
  readonly store: Store;
  readonly metrics: GatewayMetrics;
  readonly work: WorkMeter;
  readonly redis: RedisWatch;
}

/**
 * The server, not listening yet.
 *
 * @param maxBodyBytes of a request, but for uploaded files.
 * @param certificate of HTTPS; null serves plain HTTP.
 */
export function createHttpServer(
  routes: HttpRoutes,
  maxBodyBytes: number,
  log: Logger,
  certificate: HttpCertificate | null = null,
): FastifyInstance {
  const https: object = certificate === null ? {} : { https: { ...certificate.files } };
  const app = Fastify({
    ...https,
    bodyLimit: maxBodyBytes,
    // Streams end by themselves; idle connections need not be waited for.
    forceCloseConnections: 'idle',
    return503OnClosing: true,
  });
  closeSilentConnections(app);
  certificate?.follow(app.server as unknown as HttpsServer, log);
  app.addHook('onClose', () => certificate?.close());
  // Clients that forget the content type mean JSON.
  app.removeAllContentTypeParsers();
  app.addContentTypeParser('*', { parseAs: 'string' }, (_request, text, done) => {
    // Some clients give a type to a body that they do not send.
    if (text === '') {
      done(null, undefined);
      return;
    }
    try {
      done(null, parseJson(text as string));
    } catch (cause) {
      const reason = cause instanceof Error ? cause.message : String(cause);
      const refusal = new CaravanError('invalid_request', `the body is not valid JSON: ${reason}`);
      done(cause instanceof CaravanError ? cause : refusal);
    }
  });

  app.setErrorHandler((thrown, request, reply) => {
    const error = fromFastify(thrown, maxBodyBytes);
    if (error.retryAfterS !== null) void reply.header('retry-after', error.retryAfterS);
    const { http } = errorTable[error.code];
    if (http === 401) void reply.header('www-authenticate', 'Bearer realm="caravan"');
    if (http >= 500) log.warn({ code: error.code, url: request.url }, error.message);
    void reply.status(http).send(errorBody(error));
  });
  app.setNotFoundHandler((request) => {
    throw new CaravanError('not_found', `there is no ${request.method} ${request.url}`);
  });
  const served: string[] = [];
  app.addHook('onRoute', ({ method, url }) => {
    // Fastify's own HEAD routes beside those of GET are not described.
    for (const each of [method].flat()) if (each !== 'HEAD') served.push(`${each} ${url}`);
  });
  // Also hears of answers that their clients did not wait for: Fastify's onResponse does not.
  app.addHook('onRequest', (request, { raw }, done) => {
    const route = request.routeOptions.url ?? 'none';
    raw.once('close', () => {
      const status = raw.headersSent ? raw.statusCode : errorTable.cancelled.http;
      routes.metrics.requests.inc({ route, status });
    });
    done();
  });
  // Nothing of the API is for those who are nobody's. The route says what it is: a path can be written in many ways.
  app.addHook('onRequest', (request, _reply, done) => {
    if (/^\/(v1\/|tokenize$|detokenize$)/.test(request.routeOptions.url ?? '')) {
      tenantOf(routes, request);
    }
    done();
  });

  addAnswerRoutes(app, routes);
  addJobRoutes(app, routes);
  addQueueRoutes(app, routes);
  addResponseRoutes(app, routes);
  addTokenizeRoutes(app, routes);
  addModelRoutes(app, routes);
  addFileRoutes(app, routes);
  addBatchRoutes(app, routes);
  addHealthRoutes(app, routes);
  let description: ReturnType<typeof describeApi> | undefined;
  app.get('/openapi.json', () => (description ??= describeApi(served, packageVersion())));
  app.get('/', async (_request, reply) => {
    void reply.type('text/html; charset=utf-8');
    const [cards, engines] = await Promise.all([routes.models.cards(), routes.store.engines()]);
    const counts = await Promise.all(
      cards.map(({ name }) => routes.answers.queueOf(name).counts()),
    );
    return statusPage(cards, engines, counts, routes.tenants.areApart);
  });
  return app;
}

/**
 * Closes, when the server closes, connections on which nothing was asked yet (browsers open them ahead of need):
 * Node counts only those as idle that have had an answer, and would wait a minute for the others.
 */
function closeSilentConnections(app: FastifyInstance): void {
  // By the peer's address: a request over TLS has another socket than its connection.
  const silent = new Map<string, Socket>();
  const peerOf = ({ remoteAddress, remotePort }: Socket): string =>
    `${remoteAddress ?? ''} ${remotePort ?? ''}`;
  app.server.on('connection', (socket: Socket) => {
    const peer = peerOf(socket);
    silent.set(peer, socket);
    socket.once('close', () => {
      if (silent.get(peer) === socket) silent.delete(peer);
    });
  });
  app.server.on('request', ({ socket }: IncomingMessage) => {
    silent.delete(peerOf(socket));
  });
  app.addHook('preClose', (done) => {
    for (const socket of silent.values()) socket.destroy();
    done();
  });
}

function addModelRoutes(app: FastifyInstance, { models }: HttpRoutes): void {
  app.get('/v1/models', async () => ({
    object: 'list',
    data: (await models.cards()).map(modelBody),
  }));
  app.get<{ Params: { '*': string } }>('/v1/models/*', async (request) =>
    modelBody((await models.find(request.params['*'])).card),
  );
}

function addHealthRoutes(app: FastifyInstance, routes: HttpRoutes): void {
  const { store, metrics, models, answers, work, redis } = routes;
  app.get('/livez', () => ({ status: 'ok' }));
  app.get('/health', async () => {
    await store.ping();
    return { status: 'ok' };
  });
  app.get('/readyz', async () => {
    const engines = await store.engines();
    if (engines.length === 0) throw new CaravanError('engine_unavailable', 'no engine is alive');
    return { status: 'ok', engines: engines.length };
  });
  app.get('/metrics', async (_request, reply) => {
    void reply.type(metrics.contentType);
    const state = await redis.look();
    metrics.setRedis(state);
    // The rest stays as it was last seen: whoever watches must hear that Redis is away.
    if (!state.isUp) return metrics.text();
    const counts = new Map<string, number>();
    for (const { model } of await store.engines()) counts.set(model, (counts.get(model) ?? 0) + 1);
    metrics.setEngines(counts);
    for (const { name } of await models.cards()) {
      metrics.setQueue(name, { ...(await answers.queueOf(name).counts()) });
      metrics.setWork(name, await work.measure(name));
    }
    return metrics.text();
  });
}

/** Fastify's own errors carry a status; everything else is ours or a fault. */
function fromFastify(thrown: unknown, maxBodyBytes: number): CaravanError {
  if (thrown instanceof CaravanError) return thrown;
  const { statusCode, message } = thrown as { statusCode?: number; message?: string };
  if (statusCode === 413) {
    return new CaravanError('payload_too_large', `the body is over ${maxBodyBytes} bytes`);
  }
  if (statusCode !== undefined && statusCode < 500) {
    return new CaravanError('invalid_request', message ?? 'the request is malformed');
  }
  return toCaravanError(thrown);
}
