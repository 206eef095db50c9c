/** How BullMQ reaches Redis, and what a model's queue is called there. */
import { redisAddress } from './store-address.js';
import { redisOptions, type Patience } from './store-connection.js';

/** BullMQ's name of a model's queue; it allows no colon. */
export const queueName = (model: string): string => `caravan-${model.replace(/[^\w.-]/g, '_')}`;

/** BullMQ's options of a connection. */
export const connectionOf = (url: string, patience: Patience) => ({
  ...redisOptions(patience),
  ...redisAddress(url),
});
