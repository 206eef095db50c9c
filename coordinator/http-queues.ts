/** Bull Board under /queues. */
import type { FastifyInstance } from 'fastify';
import { toCaravanError } from '../proto/errors.js';
import { basicAsBearer } from './key-ring.js';
import type { Models } from './models.js';
import { errorBody } from './openai-answer.js';
import type { QueueBoard } from './queue-board.js';
import type { TenantRoutes } from './http-tenant.js';

export const BOARD_PATH = '/queues';

export interface QueueRoutes extends TenantRoutes {
  readonly models: Models;
  /** Left out where it is switched off. */
  readonly board?: QueueBoard | undefined;
}

export function addQueueRoutes(
  app: FastifyInstance,
  { models, board, tenants }: QueueRoutes,
): void {
  if (board === undefined) return;
  app.register(
    (scope, _options, done) => {
      // A browser asks whoever looks for a name, which does not matter, and a password: an API key.
      scope.addHook('onRequest', async ({ headers }, reply) => {
        if (!tenants.areApart) return;
        try {
          tenants.find({ authorization: basicAsBearer(headers.authorization), name: undefined });
        } catch (thrown) {
          void reply.header('www-authenticate', 'Basic realm="caravan", charset="UTF-8"');
          await reply.status(401).send(errorBody(toCaravanError(thrown)));
        }
      });
      // Models come and go while the gateway runs.
      scope.addHook('onRequest', async () => {
        board.show((await models.cards()).map(({ name }) => name));
      });
      scope.register(board.plugin());
      done();
    },
    { prefix: BOARD_PATH },
  );
}
