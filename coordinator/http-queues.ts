/** Bull Board under /queues. */
import type { FastifyInstance } from 'fastify';
import type { Models } from './models.js';
import type { QueueBoard } from './queue-board.js';

export const BOARD_PATH = '/queues';

export interface QueueRoutes {
  readonly models: Models;
  /** Left out where it is switched off. */
  readonly board?: QueueBoard | undefined;
}

export function addQueueRoutes(app: FastifyInstance, { models, board }: QueueRoutes): void {
  if (board === undefined) return;
  app.register(
    (scope, _options, done) => {
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
