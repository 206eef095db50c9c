/**
 * The port on which a rank says whether it moves: GET /livez. The answer itself says that its event loop turns; it is
 * 503 when a step, or the loading of weights, has stood still for too long. Ranks that wait for a coordinator are well.
 */
import { createServer } from 'node:http';
import type { AddressInfo } from 'node:net';
import { CaravanError } from '../proto/errors.js';

export interface Progress {
  readonly state: 'idle' | 'loading' | 'serving';
  /** Since what is under way last moved, in milliseconds; 0 while nothing is. */
  readonly unmovedMs: number;
}

/** @returns the port that is served. @throws CaravanError `bad_usage` when it is taken. */
export async function serveHealth(
  progress: () => Progress,
  stallMs: number,
  address: { readonly host: string; readonly port: number },
): Promise<number> {
  const server = createServer((request, response) => {
    if (request.url !== '/livez') {
      response.writeHead(404).end();
      return;
    }
    const { state, unmovedMs } = progress();
    const isOk = unmovedMs <= stallMs;
    const status = isOk ? 'ok' : 'unavailable';
    const seconds = Math.round(unmovedMs / 1000);
    const reason = isOk ? state : `${state}, and nothing has moved for ${seconds} s`;
    response.writeHead(isOk ? 200 : 503, { 'content-type': 'application/json' });
    response.end(JSON.stringify({ status, reason }));
  });
  await new Promise<void>((resolve, reject) => {
    server.once('error', (error) => {
      reject(new CaravanError('bad_usage', `--health-port ${address.port}: ${error.message}`));
    });
    server.listen(address, resolve);
  });
  server.unref();
  return (server.address() as AddressInfo).port;
}
