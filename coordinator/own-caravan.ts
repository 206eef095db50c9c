/** A whole Caravan on this machine for one command. */
import { fork } from 'node:child_process';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { CaravanError } from '../proto/errors.js';
import { cliEntry } from './package-root.js';

/**
 * Runs `use` with the address of a Caravan that ends with it and leaves nothing behind.
 *
 * @param args of `caravan up`.
 * @throws CaravanError when it does not start, or the signal's reason.
 */
export async function withCaravan<T>(
  args: readonly string[],
  signal: AbortSignal,
  use: (url: string) => Promise<T>,
): Promise<T> {
  const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-bench-'));
  const child = fork(cliEntry, ['up', ...args, '--state-dir', folder], {
    // A group of its own: Ctrl-C is ours to pass on.
    detached: true,
    stdio: ['ignore', 'pipe', 'inherit', 'ipc'],
  });
  const gone = new Promise<void>((resolve) =>
    child.once('exit', () => {
      resolve();
    }),
  );
  try {
    const url = await new Promise<string>((resolve, reject) => {
      let said = '';
      child.stdout!.setEncoding('utf8').on('data', (text: string) => {
        said += text;
        const served = /^caravan serves (\S+)$/m.exec(said)?.[1];
        if (served !== undefined) resolve(served);
      });
      child.once('error', reject);
      child.once('exit', () => {
        reject(new CaravanError('internal', 'it did not start (its reason stands above)'));
      });
      const onAbort = (): void => {
        reject(signal.reason as CaravanError);
      };
      signal.addEventListener('abort', onAbort);
      if (signal.aborted) onAbort();
    });
    return await use(url);
  } finally {
    child.kill('SIGTERM');
    await gone;
    fs.rmSync(folder, { recursive: true, force: true });
  }
}
