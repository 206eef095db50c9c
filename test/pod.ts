/**
 * The processes of one engine as a Pod has them: ranks and a coordinator, started together, told to end together, and
 * killed together when the grace period is over, as a kubelet does with containers that are no sidecars.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { cliEntry, workerEntry } from '../coordinator/package-root.js';
import { freePort } from './redis-server.js';

/** Settings of whoever runs the tests must not reach the processes. */
const environment = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !name.startsWith('CARAVAN_')),
);

export interface PodOptions {
  readonly redisUrl: string;
  readonly tp: number;
  readonly maxBatchSize: number;
  /** More arguments of the coordinator. */
  readonly args?: readonly string[];
  readonly rankArgs?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
}

/** How a Pod ended. */
export interface PodEnd {
  /** Exit codes, the coordinator's first; null of a process that was killed. */
  readonly codes: readonly (number | null)[];
  readonly seconds: number;
}

export class Pod {
  readonly #children: readonly ChildProcess[];
  readonly startedMs = performance.now();
  /** Resolves when its engine serves. */
  readonly ready: Promise<{ readonly model: string; readonly metricsUrl: string | null }>;
  readonly #ended: Promise<PodEnd>;

  private constructor(children: readonly ChildProcess[]) {
    this.#children = children;
    const coordinator = children[0]!;
    this.ready = new Promise((resolve, reject) => {
      coordinator.once('message', resolve);
      coordinator.once('exit', (code) => {
        reject(new Error(`the coordinator ended with code ${code ?? '?'}`));
      });
    });
    this.ready.catch(() => undefined);
    this.#ended = Promise.all(
      children.map(
        (child) =>
          new Promise<number | null>((resolve) => {
            child.once('exit', (code) => {
              resolve(code);
            });
          }),
      ),
    ).then((codes) => ({ codes, seconds: (performance.now() - this.startedMs) / 1000 }));
  }

  /** Starts all processes at once: who is first waits for the others. */
  static async start(options: PodOptions): Promise<Pod> {
    const { redisUrl, tp, maxBatchSize, args = [], rankArgs = [], env = {} } = options;
    const ports = await Promise.all(Array.from({ length: tp }, freePort));
    const addresses = ports.map((port) => `127.0.0.1:${port}`);
    const start = (entry: string, words: readonly string[]): ChildProcess =>
      fork(entry, [...words, '--log-level', 'error'], {
        env: { ...environment, ...env },
        stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
      });
    const coordinator = start(cliEntry, [
      ...['coordinator', '--ranks', addresses.join(','), '--redis', redisUrl, '--exact'],
      ...['--model', 'caravan-tiny', '--max-batch-size', String(maxBatchSize), ...args],
    ]);
    // A parent of ours would make them end at once: these have none, as in a container.
    const drain = ['--drain-timeout', '300'];
    const ranks = addresses.map((address) =>
      start(workerEntry, ['--listen', address, ...drain, ...rankArgs]),
    );
    return new Pod([coordinator, ...ranks]);
  }

  get coordinator(): ChildProcess {
    return this.#children[0]!;
  }

  /** SIGTERM to all, in this order or the opposite one; SIGKILL to those that are left after the grace period. */
  async terminate(
    graceMs: number,
    order: 'ranks last' | 'ranks first' = 'ranks last',
  ): Promise<PodEnd> {
    const startMs = performance.now();
    this.signal('SIGTERM', order);
    const timer = setTimeout(() => {
      this.signal('SIGKILL');
    }, graceMs);
    const end = await this.#ended;
    clearTimeout(timer);
    return { ...end, seconds: (performance.now() - startMs) / 1000 };
  }

  async kill(): Promise<PodEnd> {
    this.signal('SIGKILL');
    return this.#ended;
  }

  signal(signal: NodeJS.Signals, order: 'ranks last' | 'ranks first' = 'ranks last'): void {
    const children = order === 'ranks last' ? this.#children : [...this.#children].reverse();
    for (const child of children) child.kill(signal);
  }
}
