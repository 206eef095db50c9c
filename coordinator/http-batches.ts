/** OpenAI's batches: created, looked at, listed and cancelled. Any gateway may run them. */
import type { FastifyInstance } from 'fastify';
import { CaravanError } from '../proto/errors.js';
import type { Batches } from './batches.js';
import { batchBody, listBody, parseBatch, parseBatchList } from './openai-batch.js';
import type { BatchRecords } from './store-batches.js';
import type { WebhookIntake } from './webhook-intake.js';

export interface BatchRoutes {
  readonly batches: Batches;
  readonly batchRecords: BatchRecords;
  readonly webhooks: WebhookIntake;
}

export function addBatchRoutes(
  app: FastifyInstance,
  { batches, batchRecords, webhooks }: BatchRoutes,
): void {
  app.post('/v1/batches', async ({ body }) => {
    const { order, webhook } = parseBatch(body);
    webhooks.check(webhook);
    await webhooks.add(order.id, webhook);
    return batchBody(await batches.create(order));
  });

  app.get('/v1/batches', async ({ query }) => {
    const { after, limit } = parseBatchList(query);
    return listBody(await batchRecords.list(after ?? null, limit), batchBody);
  });

  app.get<{ Params: { id: string } }>('/v1/batches/:id', async ({ params }) =>
    batchBody(await batchRecords.get(params.id)),
  );

  app.post<{ Params: { id: string } }>('/v1/batches/:id/cancel', async ({ params: { id } }) => {
    const status = await batchRecords.cancel(id);
    if (status !== 'cancelling' && status !== 'cancelled') {
      throw new CaravanError('invalid_request', `batch ${id} is ${status}: it cannot be cancelled`);
    }
    return batchBody(await batchRecords.get(id));
  });
}
