/**
 * A whole engine of real processes for a test: ranks, and a coordinator that can be killed and started again.
 * Needs a Redis of the test's own.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import { startLocalRank, stopLocalRank, type LocalRank } from '../coordinator/local-ranks.js';
import { cliEntry } from '../coordinator/package-root.js';
import { embeddedModelPath } from '../model/checkpoint.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';
import { cleanEnvironment } from './environment.js';

const START_TIMEOUT_MS = 60_000;

export interface RealEngine {
  /** Name of its model card. */
  readonly model: string;
  /** Where its probes and metrics are; empty unless `--metrics-port` is among the arguments. */
  readonly metricsUrl: string;
  readonly ranks: readonly LocalRank[];
  /** The coordinator that runs, or the last one. */
  readonly coordinator: ChildProcess;
  /** kill -9 of the coordinator; the ranks live on. Returns when it is gone. */
  readonly kill: () => Promise<void>;
  /** Starts another coordinator over the same ranks. Returns when it serves. */
  readonly restart: () => Promise<void>;
  /** Ends every process. */
  readonly stop: () => Promise<void>;
}

export interface EngineOptions {
  readonly tp: number;
  readonly maxBatchSize: number;
  /** More arguments of the coordinator. */
  readonly args?: readonly string[];
}

/** Starts caravan-tiny in exact mode on `tp` ranks, and returns when it serves. */
export async function startEngine(
  redisUrl: string,
  { tp, maxBatchSize, args: more = [] }: EngineOptions,
): Promise<RealEngine> {
  const ranks: LocalRank[] = [];
  let coordinator: ChildProcess | null = null;
  let model = '';
  let metricsUrl = '';
  const start = async (): Promise<void> => {
    const addresses = ranks.map(({ address }) => address).join(',');
    const args = ['coordinator', '--ranks', addresses, '--redis', redisUrl, '--exact'];
    const limits = ['--max-batch-size', String(maxBatchSize), '--log-level', 'error', ...more];
    const child = fork(cliEntry, [...args, '--model', 'caravan-tiny', ...limits], {
      env: cleanEnvironment,
      stdio: ['ignore', 'ignore', 'inherit', 'ipc'],
    });
    coordinator = child;
    ({ model, metricsUrl } = await readyOf(child));
  };
  const kill = async (): Promise<void> => {
    if (coordinator === null || coordinator.exitCode !== null || coordinator.signalCode !== null) {
      return;
    }
    const gone = once(coordinator, 'exit');
    coordinator.kill('SIGKILL');
    await gone;
  };
  const stop = async (): Promise<void> => {
    await kill();
    await Promise.all(ranks.splice(0).map(stopLocalRank));
  };
  try {
    for (let rank = 0; rank < tp; rank += 1) {
      ranks.push(await startLocalRank({ threads: 1, device: 'cpu', logLevel: 'error' }));
    }
    await start();
  } catch (error) {
    await stop();
    throw error;
  }
  return {
    model,
    get metricsUrl() {
      return metricsUrl;
    },
    ranks,
    get coordinator() {
      return coordinator!;
    },
    kill,
    restart: start,
    stop,
  };
}

async function readyOf(child: ChildProcess): Promise<{ model: string; metricsUrl: string }> {
  return new Promise((resolve, reject) => {
    const fail = (reason: string): void => {
      clearTimeout(timer);
      child.kill('SIGKILL');
      reject(new Error(`the coordinator does not serve: ${reason}`));
    };
    const timer = setTimeout(() => {
      fail(`nothing within ${START_TIMEOUT_MS} ms`);
    }, START_TIMEOUT_MS);
    child.once('exit', (code) => {
      fail(`it ended with code ${code ?? '?'}`);
    });
    // Before, it tells how ranks load.
    child.on('message', (message: { type: string; model: string; metricsUrl: string }) => {
      if (message.type !== 'ready') return;
      clearTimeout(timer);
      child.removeAllListeners('exit');
      resolve(message);
    });
  });
}

export function tinyTokenizer(): Tokenizer {
  const file = 'tokenizer.model';
  return openTokenizer(new Map([[file, fs.readFileSync(path.join(embeddedModelPath(), file))]]));
}
