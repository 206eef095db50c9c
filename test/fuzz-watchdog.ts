/**
 * Ends a process whose main thread hangs in one input, and says which: a loop without an end gives no test a chance to.
 * What counts is processor time, so that a busy machine ends nobody.
 */
import fs from 'node:fs';
import { isMainThread, Worker, workerData } from 'node:worker_threads';
import { fileURLToPath } from 'node:url';
import { processorMs } from './processor-time.js';

const LOOK_EVERY_MS = 500;
const MOST_MS = 60_000;

export class FuzzWatchdog {
  /** The input that is being read. */
  readonly #input = new Int32Array(new SharedArrayBuffer(4));
  readonly #thread: Worker;

  constructor(name: string) {
    const file = fileURLToPath(import.meta.url);
    this.#thread = new Worker(file, { workerData: { name, input: this.#input } });
    this.#thread.unref();
  }

  begin(input: number): void {
    Atomics.store(this.#input, 0, input);
  }

  async stop(): Promise<void> {
    await this.#thread.terminate();
  }
}

/** Looks now and then, for ever: the thread is ended from outside. */
function watch(name: string, input: Int32Array): never {
  const never = new Int32Array(new SharedArrayBuffer(4));
  let seen = -1;
  let sinceMs = processorMs();
  for (;;) {
    const current = Atomics.load(input, 0);
    if (current !== seen) {
      seen = current;
      sinceMs = processorMs();
    } else if (processorMs() - sinceMs > MOST_MS) {
      fs.writeSync(2, `${name}, input ${current}: hangs\n`);
      process.kill(process.pid, 'SIGKILL');
    }
    Atomics.wait(never, 0, 0, LOOK_EVERY_MS);
  }
}

if (!isMainThread) {
  const { name, input } = workerData as { name: string; input: Int32Array };
  watch(name, input);
}
