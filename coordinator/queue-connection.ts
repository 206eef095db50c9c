/** How BullMQ reaches Redis, and what a model's queue is called there. */
import { redisOptions, type Patience } from './store-connection.js';

/** BullMQ's name of a model's queue; it allows no colon. */
export const queueName = (model: string): string => `caravan-${model.replace(/[^\w.-]/g, '_')}`;

/** BullMQ's options of a connection. */
export const connectionOf = (url: string, patience: Patience) => {
  const { hostname, port, username, password, pathname, protocol } = new URL(url);
  return {
    ...redisOptions(patience),
    // The URL class keeps the brackets of an IPv6 address.
    host: hostname.replace(/^\[|\]$/g, '') || '127.0.0.1',
    port: port === '' ? 6379 : Number(port),
    ...(username === '' ? {} : { username: decodeURIComponent(username) }),
    ...(password === '' ? {} : { password: decodeURIComponent(password) }),
    ...(pathname.length > 1 ? { db: Number(pathname.slice(1)) } : {}),
    ...(protocol === 'rediss:' ? { tls: {} } : {}),
  };
};
