/**
 * Keeps the processes of one machine running: a child that dies is started again, with growing pauses, and
 * children end with their parent, also when that is killed.
 */
import { fork, spawn, type ChildProcess } from 'node:child_process';
import { setTimeout as delay } from 'node:timers/promises';
import { CaravanError } from '../proto/errors.js';

/** How to start one child. */
export interface ChildSpec {
  readonly name: string;
  start(): ChildProcess;
  /** Resolves when this child serves; rejects when it never will. */
  ready(child: ChildProcess): Promise<Readonly<Record<string, unknown>>>;
}

export interface SupervisorLog {
  warn(fields: object, message: string): void;
}

const FIRST_PAUSE_MS = 200;
const MAX_PAUSE_MS = 5_000;
/** A child that ran this long was well: pauses begin small again. */
const WELL_AFTER_MS = 30_000;
const READY_TIMEOUT_MS = 600_000;

/** One child that is kept running. */
export class SupervisedChild {
  readonly #spec: ChildSpec;
  readonly #log: SupervisorLog;
  #child: ChildProcess | null = null;
  #isWanted = true;
  #pauseMs = FIRST_PAUSE_MS;

  constructor(spec: ChildSpec, log: SupervisorLog) {
    this.#spec = spec;
    this.#log = log;
  }

  /**
   * Starts the child and waits until it serves. From then on it is started again whenever it ends.
   *
   * @throws CaravanError when the first start fails.
   */
  async start(): Promise<Readonly<Record<string, unknown>>> {
    const child = this.#spec.start();
    this.#child = child;
    try {
      return await this.#spec.ready(child);
    } finally {
      if (child.exitCode === null && child.signalCode === null) this.#watch(child);
    }
  }

  /** Sends a signal, after which the child is not started again, and waits until it is gone. */
  async stop(signal: NodeJS.Signals): Promise<void> {
    this.#isWanted = false;
    const child = this.#child;
    if (child === null || child.exitCode !== null || child.signalCode !== null) return;
    const gone = new Promise((resolve) => child.once('exit', resolve));
    child.kill(signal);
    await gone;
    // The guard of a foreign program waits for the end of this pipe, and the pipe keeps us.
    child.stdin?.destroy();
  }

  #watch(child: ChildProcess): void {
    const startedMs = performance.now();
    child.once('exit', (code, signal) => {
      if (!this.#isWanted) return;
      if (performance.now() - startedMs > WELL_AFTER_MS) this.#pauseMs = FIRST_PAUSE_MS;
      this.#log.warn(
        { child: this.#spec.name, code, signal, pauseMs: this.#pauseMs },
        `${this.#spec.name} ended with ${signal ?? `code ${code ?? '?'}`}: starting it again`,
      );
      void this.#startAgain();
    });
  }

  async #startAgain(): Promise<void> {
    await delay(this.#pauseMs);
    this.#pauseMs = Math.min(2 * this.#pauseMs, MAX_PAUSE_MS);
    if (!this.#isWanted) return;
    const child = this.#spec.start();
    this.#child = child;
    this.#watch(child);
    // A start that fails ends the child, which is heard of above.
    this.#spec.ready(child).catch(() => undefined);
  }
}

/**
 * A Node process of ours: it says `ready` on its channel, and ends when the channel closes. A process group
 * of its own, so that Ctrl-C reaches the parent alone, which then decides.
 *
 * @param onMessage hears of all that it says on its channel, whenever it was started.
 */
export function nodeChild(
  name: string,
  entry: string,
  args: readonly string[],
  onMessage?: (message: Readonly<Record<string, unknown>>) => void,
  execArgv: readonly string[] = process.execArgv,
): ChildSpec {
  return {
    name,
    start: () => {
      const stdio = ['ignore', 'ignore', 'inherit', 'ipc'] as const;
      const child = fork(entry, args, {
        detached: true,
        stdio: [...stdio],
        execArgv: [...execArgv],
      });
      if (onMessage !== undefined) child.on('message', onMessage);
      return child;
    },
    ready: (child) =>
      settle(name, child, (resolve) => {
        child.on('message', (message: { type?: string }) => {
          if (message.type === 'ready') resolve(message);
        });
      }),
  };
}

// `cat` ends when our end of the pipe does: then Redis ends too, even if we were killed.
const guardScript =
  'exec 3<&0; "$@" </dev/null >/dev/null & pid=$!; { cat <&3 >/dev/null; kill $pid 2>/dev/null; } & ' +
  "trap 'kill $pid' TERM; while kill -0 $pid 2>/dev/null; do wait $pid; done";

/** A foreign program, guarded so that it ends with us. `ready` polls until it serves. */
export function guardedChild(
  name: string,
  command: readonly string[],
  isServing: () => Promise<boolean>,
): ChildSpec {
  return {
    name,
    start: () =>
      spawn('sh', ['-c', guardScript, name, ...command], {
        detached: true,
        stdio: ['pipe', 'ignore', 'inherit'],
      }),
    ready: (child) =>
      settle(name, child, (resolve) => {
        void (async () => {
          while (child.exitCode === null && !(await isServing())) await delay(50);
          resolve({});
        })();
      }),
  };
}

function settle(
  name: string,
  child: ChildProcess,
  listen: (resolve: (details: Readonly<Record<string, unknown>>) => void) => void,
): Promise<Readonly<Record<string, unknown>>> {
  return new Promise((resolve, reject) => {
    const fail = (reason: string): void => {
      clearTimeout(timer);
      reject(new CaravanError('internal', `${name} did not start: ${reason}`));
    };
    const timer = setTimeout(() => {
      fail(`not ready within ${READY_TIMEOUT_MS / 1000} s`);
    }, READY_TIMEOUT_MS);
    child.once('error', (error) => {
      fail(error.message);
    });
    child.once('exit', (code, signal) => {
      fail(signal ?? `it ended with code ${code ?? '?'} (its reason stands above)`);
    });
    // What a rank says instead of being ready.
    child.on('message', ({ type, message }: { type?: string; message?: string }) => {
      if (type === 'failed') fail(message ?? 'it gave no reason');
    });
    listen((details) => {
      clearTimeout(timer);
      resolve(details);
    });
  });
}
