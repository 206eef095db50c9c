/** An engine's own HTTP port: probes and metrics, nothing else. */
import Fastify, { type FastifyReply } from 'fastify';
import type { EngineHealth, Verdict } from './engine-health.js';
import { listenHttp } from './http-listen.js';
import type { EngineMetrics } from './metrics-engine.js';
import type { RedisWatch } from './store-watch.js';

export interface EngineFace {
  readonly health: EngineHealth;
  readonly metrics: EngineMetrics;
  readonly redis: RedisWatch;
  /** As measured; null before. */
  readonly tokensPerSecond: () => number | null;
}

/** @returns the address that is served, and how to stop. @throws CaravanError `bad_usage` when the port is taken. */
export async function serveEngineFace(
  { health, metrics, redis, tokensPerSecond }: EngineFace,
  host: string,
  port: number,
): Promise<{ readonly url: string; readonly close: () => Promise<void> }> {
  const app = Fastify({ forceCloseConnections: true });
  const answer = (reply: FastifyReply, { isOk, reason }: Verdict): FastifyReply =>
    reply.status(isOk ? 200 : 503).send({ status: isOk ? 'ok' : 'unavailable', reason });
  app.get('/livez', (_request, reply) => answer(reply, health.alive()));
  app.get('/startupz', (_request, reply) => answer(reply, health.started()));
  app.get('/readyz', (_request, reply) => answer(reply, health.ready(redis.state.isUp)));
  app.get('/metrics', async (_request, reply) => {
    void reply.type(metrics.contentType);
    return metrics.text(health, redis.state, tokensPerSecond());
  });
  const url = await listenHttp(app, host, port, '--metrics-port');
  return { url, close: () => app.close() };
}
