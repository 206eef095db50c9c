/**
 * A whole Caravan of processes that can be killed one by one: Redis, gateways, coordinators and their ranks. Whatever is
 * killed is started again at once.
 */
import { fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import readline from 'node:readline';
import { setTimeout as delay } from 'node:timers/promises';
import { cliEntry, workerEntry } from '../coordinator/package-root.js';
import { freePorts, startRedis, type RedisServer } from './redis-server.js';

export const victimKinds = ['coordinator', 'gateway', 'rank', 'redis'] as const;
export type VictimKind = (typeof victimKinds)[number];

/** Settings of whoever runs the tests must not reach the processes. */
const environment = Object.fromEntries(
  Object.entries(process.env).filter(([name]) => !name.startsWith('CARAVAN_')),
);
const RESTART_PAUSE_MS = 100;
const START_TIMEOUT_MS = 120_000;

/** A line of a coordinator's log. */
export interface LogLine {
  readonly msg: string;
  readonly job?: string;
  readonly resumed?: number;
  readonly outcome?: string;
}

/** One process, started again whenever it ends. */
export class Member {
  readonly kind: VictimKind;
  /** What it said when it was ready; null while it is not. */
  ready: Readonly<Record<string, unknown>> | null = null;
  /** Of its log. */
  lastLine = '';
  readonly #entry: string;
  readonly #args: readonly string[];
  readonly #onLine: (line: string) => void;
  #child: ChildProcess | null = null;
  #isWanted = true;

  constructor(
    kind: VictimKind,
    entry: string,
    args: readonly string[],
    onLine: (line: string) => void,
  ) {
    this.kind = kind;
    this.#entry = entry;
    this.#args = args;
    this.#onLine = onLine;
    this.#start();
  }

  /** kill -9; returns when it is gone. */
  async kill(): Promise<void> {
    const child = this.#child!;
    if (child.exitCode !== null || child.signalCode !== null) return;
    const gone = once(child, 'exit');
    child.kill('SIGKILL');
    await gone;
  }

  async stop(): Promise<void> {
    this.#isWanted = false;
    await this.kill();
  }

  #start(): void {
    const child = fork(this.#entry, this.#args, {
      env: environment,
      stdio: ['ignore', 'ignore', 'pipe', 'ipc'],
    });
    this.#child = child;
    readline.createInterface(child.stderr!).on('line', (line) => {
      this.lastLine = line;
      this.#onLine(line);
    });
    child.once('message', (message) => {
      this.ready = message as Readonly<Record<string, unknown>>;
    });
    child.once('exit', () => {
      this.ready = null;
      if (!this.#isWanted) return;
      void delay(RESTART_PAUSE_MS).then(() => {
        if (this.#isWanted) this.#start();
      });
    });
  }
}

export interface WorldSize {
  readonly engines: number;
  readonly gateways: number;
  readonly tp: number;
  readonly maxBatchSize: number;
  /** More arguments of coordinators. */
  readonly more?: readonly string[];
}

export class ChaosWorld {
  readonly redis: RedisServer;
  readonly members: readonly Member[];
  readonly #folder: string;

  private constructor(redis: RedisServer, members: readonly Member[], folder: string) {
    this.redis = redis;
    this.members = members;
    this.#folder = folder;
  }

  /**
   * Coordinators with `tp` ranks each, and gateways. Returns when all of them serve.
   *
   * @param onLine hears what coordinators log.
   */
  static async start(
    { engines, gateways, tp, maxBatchSize, more = [] }: WorldSize,
    onLine: (line: LogLine) => void,
  ): Promise<ChaosWorld> {
    const redis = await startRedis();
    const folder = fs.mkdtempSync(path.join(os.tmpdir(), 'caravan-chaos-'));
    const silent = (): void => undefined;
    const members: Member[] = [];
    const ports = await freePorts(engines * tp);
    for (let engine = 0; engine < engines; engine += 1) {
      const addresses: string[] = [];
      for (let rank = 0; rank < tp; rank += 1) {
        const address = `127.0.0.1:${ports.pop()!}`;
        addresses.push(address);
        const args = ['--listen', address, '--threads', '1', '--log-level', 'error'];
        members.push(new Member('rank', workerEntry, args, silent));
      }
      const args = ['coordinator', '--ranks', addresses.join(','), '--redis', redis.url, '--exact'];
      args.push('--model', 'caravan-tiny', '--max-batch-size', String(maxBatchSize), ...more);
      members.push(
        new Member('coordinator', cliEntry, args, (line) => {
          if (line.startsWith('{')) onLine(JSON.parse(line) as LogLine);
        }),
      );
    }
    for (let gateway = 0; gateway < gateways; gateway += 1) {
      const files = ['--files', path.join(folder, 'files'), '--log-level', 'error'];
      members.push(
        new Member(
          'gateway',
          cliEntry,
          ['gateway', '--redis', redis.url, '--port', '0', ...files],
          silent,
        ),
      );
    }
    const world = new ChaosWorld(redis, members, folder);
    try {
      await until(
        () => members.every(({ ready }) => ready !== null),
        START_TIMEOUT_MS,
        'all serve',
      );
    } catch (error) {
      const absent = members.filter(({ ready }) => ready === null);
      const why = absent.map(({ kind, lastLine }) => `${kind}: ${lastLine}`).join('; ');
      await world.stop();
      throw new Error(why, { cause: error });
    }
    return world;
  }

  /** Addresses of the gateways that serve. */
  get urls(): string[] {
    return this.members.flatMap(({ kind, ready }) =>
      kind === 'gateway' && ready !== null ? [String(ready['url'])] : [],
    );
  }

  /** kill -9 of one process of a kind. @param choose one of so many that are ready. */
  async kill(kind: VictimKind, choose: (count: number) => number): Promise<void> {
    if (kind === 'redis') {
      await this.redis.kill();
      await this.redis.restart();
      return;
    }
    const ready = (): Member[] => this.members.filter((m) => m.kind === kind && m.ready !== null);
    await until(() => ready().length > 0, 30_000, `a ${kind} is ready`);
    const victims = ready();
    await victims[choose(victims.length)]!.kill();
  }

  async stop(): Promise<void> {
    await Promise.all(this.members.map((member) => member.stop()));
    await this.redis.stop();
    fs.rmSync(this.#folder, { recursive: true, force: true });
  }
}

const LOOK_EVERY_MS = 10;

/** Looks until it is so. @throws Error after `timeoutMs`. */
export async function until(isSo: () => boolean, timeoutMs: number, what: string): Promise<void> {
  const giveUpMs = performance.now() + timeoutMs;
  while (!isSo()) {
    if (performance.now() > giveUpMs) throw new Error(`not within ${timeoutMs} ms: ${what}`);
    await delay(LOOK_EVERY_MS);
  }
}
