/** `caravan up` as a process, for tests that want everything at once. */
import { spawn, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import { cliEntry } from '../coordinator/package-root.js';
import { cleanEnvironment } from './environment.js';

export interface UpProcess {
  readonly process: ChildProcess;
  /** The gateway's address. */
  readonly url: string;
  /** SIGTERM, and wait for its end. */
  stop(): Promise<void>;
}

/** Starts `caravan up` on two ranks and a free port, and returns when it has printed its address. */
export async function startUp(stateDir: string, args: readonly string[] = []): Promise<UpProcess> {
  const base = ['up', '--port', '0', '--tp', '2', '--state-dir', stateDir, '--log-level', 'error'];
  const child = spawn(process.execPath, [cliEntry, ...base, ...args], {
    env: cleanEnvironment,
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  child.stdout.setEncoding('utf8');
  const url = await new Promise<string>((resolve, reject) => {
    let printed = '';
    child.stdout.on('data', (text: string) => {
      printed += text;
      const found = /caravan serves (http:\S+)/.exec(printed)?.[1];
      if (found !== undefined) resolve(found);
    });
    child.once('exit', (code) => {
      reject(new Error(`up ended with ${code ?? '?'}: ${printed}`));
    });
  });
  return {
    process: child,
    url,
    stop: async () => {
      if (child.exitCode !== null || child.signalCode !== null) return;
      const gone = once(child, 'exit');
      child.kill('SIGTERM');
      await gone;
    },
  };
}

export interface ProcessEntry {
  readonly pid: number;
  readonly parent: number;
  readonly command: string;
}

/** Every process of the machine. */
export function processes(): ProcessEntry[] {
  return fs
    .readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .flatMap((name) => {
      try {
        const stat = fs.readFileSync(`/proc/${name}/stat`, 'utf8');
        const parent = Number(stat.slice(stat.lastIndexOf(')') + 2).split(' ')[1]);
        const command = fs.readFileSync(`/proc/${name}/cmdline`, 'utf8').replaceAll('\0', ' ');
        return [{ pid: Number(name), parent, command }];
      } catch {
        // It has ended since.
        return [];
      }
    });
}

/** Processes below this one, however deep. */
export function descendants(pid: number): ProcessEntry[] {
  const all = processes();
  const below = (parent: number): ProcessEntry[] =>
    all.filter((each) => each.parent === parent).flatMap((child) => [child, ...below(child.pid)]);
  return below(pid);
}
