/** A private Redis for one test file: on a free port of the loopback interface, in a folder of its own. */
import { spawn, type ChildProcess } from 'node:child_process';
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { Redis } from 'ioredis';

export interface RedisServer {
  readonly url: string;
  readonly port: number;
  readonly pid: number;
  /** SIGKILL unless told otherwise: what AOF had not written is lost. */
  kill(signal?: NodeJS.Signals): Promise<void>;
  /** The same port and folder. */
  restart(): Promise<void>;
  stop(): Promise<void>;
}

/** A port that was free a moment ago. */
export const freePort = async (): Promise<number> => (await freePorts(1))[0]!;

/** Different ports that were free a moment ago. */
export async function freePorts(count: number): Promise<number[]> {
  const servers = Array.from({ length: count }, () => net.createServer());
  await Promise.all(
    servers.map((server) => new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))),
  );
  const ports = servers.map((server) => (server.address() as net.AddressInfo).port);
  await Promise.all(servers.map((server) => new Promise((resolve) => server.close(resolve))));
  return ports;
}

/** @throws Error when the server ends instead: another program may have taken its port. */
async function startServer(port: number, folder: string): Promise<ChildProcess> {
  const args = ['--port', String(port), '--bind', '127.0.0.1', '--dir', folder, '--save', ''];
  args.push('--appendonly', 'yes', '--appendfsync', 'everysec', '--maxmemory-policy', 'noeviction');
  const child = spawn('redis-server', args, { stdio: 'ignore' });
  const url = `redis://127.0.0.1:${port}`;
  const probe = new Redis(url, { retryStrategy: () => 20, maxRetriesPerRequest: null });
  // Refused until it listens; a call waits for that, and for the AOF to be loaded.
  probe.on('error', () => undefined);
  try {
    await new Promise<void>((resolve, reject) => {
      child.once('error', reject);
      child.once('exit', (code) => {
        reject(new Error(`redis-server on port ${port} ended with code ${code ?? '?'}`));
      });
      probe.info('server').then((text) => {
        if (text.includes(`process_id:${child.pid ?? 0}\r`)) resolve();
        else reject(new Error(`another Redis has port ${port}`));
      }, reject);
    });
    child.removeAllListeners('exit');
  } finally {
    probe.disconnect();
  }
  return child;
}

/** Ports to try: what was free a moment ago may be taken since. */
const ATTEMPTS = 3;

export async function startRedis(): Promise<RedisServer> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-redis-'));
  let port = 0;
  const startAnywhere = async (attempt = 1): Promise<ChildProcess> => {
    port = await freePort();
    try {
      return await startServer(port, folder);
    } catch (error) {
      if (attempt === ATTEMPTS) throw error;
      return startAnywhere(attempt + 1);
    }
  };
  let child = await startAnywhere();
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    if (child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill(signal);
    await gone;
  };
  return {
    url: `redis://127.0.0.1:${port}`,
    port,
    get pid() {
      return child.pid ?? 0;
    },
    kill: (signal = 'SIGKILL') => end(signal),
    restart: async () => {
      child = await startServer(port, folder);
    },
    stop: async () => {
      await end('SIGTERM');
      fs.rmSync(folder, { recursive: true, force: true });
    },
  };
}
