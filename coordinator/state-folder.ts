/** The folder where `caravan up` keeps its private Redis: for one `up` at a time. */
import fs from 'node:fs';
import net from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { makeFolder } from '../model/folder.js';
import { CaravanError } from '../proto/errors.js';

/** Where a user's programs keep their data. */
export function defaultStateFolder(env: NodeJS.ProcessEnv): string {
  const base = env['XDG_DATA_HOME'] ?? path.join(os.homedir(), '.local', 'share');
  return path.join(base, 'caravan');
}

/**
 * Makes the folder and holds it until the process ends: by a socket in it, which a killed process lets go.
 *
 * @throws CaravanError `bad_usage` when another `up` holds it or it cannot be written.
 */
export async function holdStateFolder(folder: string): Promise<void> {
  try {
    makeFolder(folder);
    fs.accessSync(folder, fs.constants.W_OK);
  } catch (cause) {
    throw new CaravanError('bad_usage', `--state-dir ${folder}: cannot be written`, { cause });
  }
  const socket = path.join(folder, 'up.sock');
  if (await isAnswered(socket)) {
    throw new CaravanError(
      'bad_usage',
      `--state-dir ${folder}: another caravan up uses it; stop that one or name another folder`,
    );
  }
  fs.rmSync(socket, { force: true });
  const server = net.createServer((peer) => peer.destroy());
  await new Promise<void>((resolve, reject) => {
    server.once('error', (cause) => {
      reject(new CaravanError('bad_usage', `--state-dir ${folder}: ${cause.message}`, { cause }));
    });
    server.listen(socket, resolve);
  });
  server.unref();
}

function isAnswered(socket: string): Promise<boolean> {
  return new Promise((resolve) => {
    const peer = net.connect(socket);
    peer.once('connect', () => {
      peer.destroy();
      resolve(true);
    });
    peer.once('error', () => {
      resolve(false);
    });
  });
}

/** A port of the loopback interface that was free a moment ago. */
export async function freePort(): Promise<number> {
  const server = net.createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const { port } = server.address() as net.AddressInfo;
  await new Promise((resolve) => server.close(resolve));
  return port;
}
