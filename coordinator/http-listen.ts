/** Binding a port, with a failure that says which flag to change. */
import type { FastifyInstance } from 'fastify';
import { CaravanError } from '../proto/errors.js';

/** @returns the address that is served. @throws CaravanError `bad_usage` naming the host and the port's flag. */
export async function listenHttp(
  app: Pick<FastifyInstance, 'listen'>,
  host: string,
  port: number,
  portFlag = '--port',
): Promise<string> {
  try {
    return await app.listen({ host, port });
  } catch (cause) {
    const { code, message } = cause as NodeJS.ErrnoException;
    const reason = code === 'EADDRINUSE' ? 'another program listens there' : message;
    throw new CaravanError('bad_usage', `--host ${host} ${portFlag} ${port}: ${reason}`, { cause });
  }
}
