/**
 * Rank processes on this machine: children that end with their parent.
 */
import { fork, type ChildProcess } from 'node:child_process';
import os from 'node:os';
import { CaravanError } from '../proto/errors.js';
import { linkVariables } from '../proto/link-security.js';
import { workerEntry } from './package-root.js';

/**
 * Flags of processes that take steps, ranks and coordinators: young garbage has 32 MB from the start, so that it is not
 * collected during hundreds of steps; the runtime would begin with 1 MB, and end at 16 whatever the start.
 */
export const stepExecArgv: readonly string[] = [
  ...process.execArgv,
  '--min-semi-space-size=32',
  '--max-semi-space-size=32',
];

const START_TIMEOUT_MS = 30_000;

export interface LocalRank {
  readonly address: string;
  /** Of the device's own memory; null where it has none, or it cannot be known. */
  readonly memory: { readonly freeBytes: number; readonly totalBytes: number } | null;
  /** Numbers of the devices of its kind whose memory it can read; null where that cannot be, or be known. */
  readonly readablePeers: readonly number[] | null;
  readonly process: ChildProcess;
}

/** Threads for each of `rankCount` ranks, so that all of them together use the machine's cores. */
export const threadsPerRank = (rankCount: number): number =>
  Math.max(1, Math.floor(os.availableParallelism() / rankCount));

/** A file that a child can be: kept short, since it is read at start. */
export interface LocalRankOptions {
  readonly threads: number;
  readonly device: string;
  readonly logLevel: string;
}

const noLinkVariables = Object.fromEntries(Object.values(linkVariables).map((name) => [name, '']));

/** What a rank process says first. */
type RankStart =
  | ({ readonly type: 'ready' } & Pick<LocalRank, 'address' | 'memory' | 'readablePeers'>)
  | { readonly type: 'failed'; readonly message: string };

/**
 * Starts one rank process on a free port of the loopback interface.
 *
 * @throws CaravanError `rank_unavailable` when it does not come up.
 */
export async function startLocalRank(options: LocalRankOptions): Promise<LocalRank> {
  const { threads, device, logLevel } = options;
  const child = fork(
    workerEntry,
    ['--listen', '127.0.0.1:0', '--device', device, '--threads', String(threads)].concat([
      '--log-level',
      logLevel,
    ]),
    {
      // Links within one command need no certificates, and its own end has none.
      env: { ...process.env, ...noLinkVariables },
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      execArgv: [...stepExecArgv],
    },
  );
  return new Promise((resolve, reject) => {
    const fail = (reason: string): void => {
      clearTimeout(timer);
      child.kill('SIGKILL');
      reject(new CaravanError('rank_unavailable', `a rank process did not start: ${reason}`));
    };
    const timer = setTimeout(() => {
      fail(`no answer within ${START_TIMEOUT_MS} ms`);
    }, START_TIMEOUT_MS);
    child.once('error', (error) => {
      fail(error.message);
    });
    child.once('exit', (code, signal) => {
      fail(`it ended with ${signal ?? `code ${code ?? '?'}`}`);
    });
    child.once('message', (message: RankStart) => {
      if (message.type === 'failed') {
        fail(message.message);
        return;
      }
      clearTimeout(timer);
      child.removeAllListeners('error');
      child.removeAllListeners('exit');
      const { address, memory, readablePeers } = message;
      resolve({ address, memory, readablePeers, process: child });
    });
  });
}

/** Ends a rank process and waits until it is gone. */
export async function stopLocalRank({ process: child }: LocalRank): Promise<void> {
  if (child.exitCode !== null || child.signalCode !== null) return;
  const gone = new Promise((resolve) => child.once('exit', resolve));
  child.kill('SIGTERM');
  await gone;
}
