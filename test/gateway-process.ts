/** A gateway as a process of its own, that can be killed. */
import { fork } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import { cliEntry } from '../coordinator/package-root.js';
import { cleanEnvironment } from './environment.js';

const START_TIMEOUT_MS = 30_000;

export interface GatewayProcess {
  readonly url: string;
  readonly pid: number;
  /** Bytes of memory that it holds now. */
  residentBytes(): number;
  /** kill -9 unless told otherwise; returns when it is gone. */
  kill(signal?: NodeJS.Signals): Promise<void>;
}

/** @param heapMegabytes the most that it may have; it dies of more. */
export async function startGatewayProcess(
  redisUrl: string,
  args: readonly string[],
  heapMegabytes: number,
): Promise<GatewayProcess> {
  const base = ['gateway', '--redis', redisUrl, '--port', '0', '--log-level', 'error'];
  const child = fork(cliEntry, [...base, ...args], {
    env: cleanEnvironment,
    execArgv: [`--max-old-space-size=${heapMegabytes}`],
    stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
  });
  const gone = once(child, 'exit');
  const signal = AbortSignal.timeout(START_TIMEOUT_MS);
  const ended = gone.then(() => {
    throw new Error('the gateway ended');
  });
  ended.catch(() => undefined);
  const [{ url }] = (await Promise.race([once(child, 'message', { signal }), ended])) as [
    { url: string },
  ];
  const pid = child.pid!;
  return {
    url,
    pid,
    residentBytes: () => {
      const status = fs.readFileSync(`/proc/${pid}/status`, 'utf8');
      return 1024 * Number(/^VmRSS:\s+(\d+)/m.exec(status)![1]);
    },
    kill: async (name = 'SIGKILL') => {
      child.kill(name);
      await gone;
    },
  };
}
