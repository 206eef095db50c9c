/** One pull into a folder at a time: the second waits for the first, whose end, a kill included, lets go. */
import { createHash } from 'node:crypto';
import fs from 'node:fs';
import net from 'node:net';

/**
 * Holds the folder until the returned function is called, by a socket in Linux's abstract namespace: nothing of it lies
 * on the disk, and it goes with the process. Two hosts or containers that share a folder do not see each other;
 * then both fetch, and what they write is the same.
 *
 * @param onWait called once, when another process holds it.
 * @throws what the signal aborts with.
 */
export async function lockFolder(
  folder: string,
  onWait: () => void,
  signal: AbortSignal,
): Promise<() => void> {
  const name = createHash('sha256').update(fs.realpathSync(folder)).digest('hex');
  const address = `\0caravan-pull-${name}`;
  let hasWaited = false;
  for (;;) {
    signal.throwIfAborted();
    const server = await listen(address);
    if (server !== null) {
      const peers = new Set<net.Socket>();
      server.on('connection', (peer) => {
        peers.add(peer);
        peer.on('error', () => undefined);
        peer.on('close', () => peers.delete(peer));
      });
      server.unref();
      return () => {
        server.close();
        for (const peer of peers) peer.destroy();
      };
    }
    if (!hasWaited) onWait();
    hasWaited = true;
    await hangUp(address, signal);
  }
}

function listen(address: string): Promise<net.Server | null> {
  return new Promise((resolve, reject) => {
    const server = net.createServer();
    server.once('error', (error: NodeJS.ErrnoException) => {
      if (error.code === 'EADDRINUSE') resolve(null);
      else reject(error);
    });
    server.listen(address, () => {
      resolve(server);
    });
  });
}

/** Returns when the holder lets go. */
function hangUp(address: string, signal: AbortSignal): Promise<void> {
  return new Promise((resolve) => {
    const peer = net.connect(address);
    const onAbort = (): void => {
      peer.destroy();
    };
    signal.addEventListener('abort', onAbort);
    // It has gone before we came, or while we wait: either way it is our turn to try.
    peer.on('error', () => undefined);
    peer.on('close', () => {
      signal.removeEventListener('abort', onAbort);
      resolve();
    });
    peer.resume();
  });
}
