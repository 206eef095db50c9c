/** Runs the command line as a user would: a process of its own, with a clean environment. */
import { spawn } from 'node:child_process';
import { cliEntry } from '../coordinator/package-root.js';
import { cleanEnvironment } from './environment.js';

export interface CliRun {
  /** Exit code, or null when it was killed at the deadline. */
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
  readonly wallMs: number;
}

/** @param env beside the clean environment. */
export function runCli(
  args: readonly string[],
  timeoutMs = 60_000,
  env: NodeJS.ProcessEnv = {},
): Promise<CliRun> {
  const startMs = performance.now();
  const child = spawn(process.execPath, [cliEntry, ...args], {
    env: { ...cleanEnvironment, ...env },
    stdio: ['ignore', 'pipe', 'pipe'],
  });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
  child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
  const timer = setTimeout(() => child.kill('SIGKILL'), timeoutMs);
  return new Promise((resolve, reject) => {
    child.on('error', reject);
    child.on('close', (code) => {
      clearTimeout(timer);
      resolve({ code, stdout, stderr, wallMs: performance.now() - startMs });
    });
  });
}

/** The one JSON document that a command printed. @throws Error with stderr when it failed. */
export async function runCliJson(args: readonly string[], timeoutMs?: number): Promise<unknown> {
  const { code, stdout, stderr } = await runCli([...args, '--json'], timeoutMs);
  if (code !== 0) throw new Error(`caravan ${args.join(' ')}: exit ${code ?? 'killed'}: ${stderr}`);
  return JSON.parse(stdout);
}
