/** Bull Board under /queues. */
import type { FastifyInstance } from 'fastify';
import { CaravanError, toCaravanError } from '../proto/errors.js';
import { basicAsBearer } from './key-ring.js';
import type { Models } from './models.js';
import { errorBody } from './openai-answer.js';
import type { QueueBoard } from './queue-board.js';
import type { TenantRoutes } from './http-tenant.js';

export const BOARD_PATH = '/queues';
const notForAll =
  'Bull Board shows the jobs of all tenants: it needs the API key of a tenant that --operators names';

export interface QueueRoutes extends TenantRoutes {
  readonly models: Models;
  /** Left out where it is switched off. */
  readonly board?: QueueBoard | undefined;
  /** Names of the tenants who may look at it where tenants are kept apart. */
  readonly operators: ReadonlySet<string>;
}

export function addQueueRoutes(
  app: FastifyInstance,
  { models, board, tenants, operators }: QueueRoutes,
): void {
  if (board === undefined) return;
  app.register(
    (scope, _options, done) => {
      // A browser asks whoever looks for a name, which does not matter, and a password: an API key.
      scope.addHook('onRequest', async ({ headers }, reply) => {
        if (!tenants.areApart) return;
        try {
          const authorization = basicAsBearer(headers.authorization);
          const { name } = tenants.find({ authorization, name: undefined });
          if (!operators.has(name)) throw new CaravanError('invalid_api_key', notForAll);
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
