/** OpenAI's batches: created, looked at, listed and cancelled. Any gateway may run them. */
import type { FastifyInstance, FastifyRequest } from 'fastify';
import { CaravanError } from '../proto/errors.js';
import type { BatchState } from './batch.js';
import type { Batches } from './batches.js';
import { ownerOf, tenantOf, type TenantRoutes } from './http-tenant.js';
import { batchBody, listBody, parseBatch, parseBatchList } from './openai-batch.js';
import type { BatchRecords } from './store-batches.js';
import type { WebhookIntake } from './webhook-intake.js';

export interface BatchRoutes extends TenantRoutes {
  readonly batches: Batches;
  readonly batchRecords: BatchRecords;
  readonly webhooks: WebhookIntake;
}

export function addBatchRoutes(app: FastifyInstance, routes: BatchRoutes): void {
  const { batches, batchRecords, webhooks, tenants } = routes;
  const isOwn = (request: FastifyRequest) => {
    const tenant = tenantOf(routes, request);
    return ({ tenant: owner }: { readonly tenant?: string }) => tenants.mayMind(tenant, owner);
  };
  const find = async (request: FastifyRequest, id: string): Promise<BatchState> => {
    const state = await batchRecords.get(id);
    if (isOwn(request)(state.order)) return state;
    throw new CaravanError('not_found', `batch ${id} does not exist`);
  };

  app.post('/v1/batches', async (request) => {
    const { order, webhook } = parseBatch(request.body);
    const tenant = ownerOf(routes, request);
    webhooks.check(webhook);
    await webhooks.add(order.id, webhook);
    const owned = tenant === null ? order : { ...order, tenant };
    return batchBody(await batches.create(owned, isOwn(request)));
  });

  app.get('/v1/batches', async (request) => {
    const { after, limit } = parseBatchList(request.query);
    return listBody(await batchRecords.list(after ?? null, limit, isOwn(request)), batchBody);
  });

  app.get<{ Params: { id: string } }>('/v1/batches/:id', async (request) =>
    batchBody(await find(request, request.params.id)),
  );

  app.post<{ Params: { id: string } }>('/v1/batches/:id/cancel', async (request) => {
    const { id } = request.params;
    await find(request, id);
    const status = await batchRecords.cancel(id);
    if (status !== 'cancelling' && status !== 'cancelled') {
      throw new CaravanError('invalid_request', `batch ${id} is ${status}: it cannot be cancelled`);
    }
    return batchBody(await batchRecords.get(id));
  });
}
