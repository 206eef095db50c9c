/** node-llama-cpp, which is no dependency of ours: installed on demand into a folder of its own. */
import { execFileSync, fork, type ChildProcess } from 'node:child_process';
import { once } from 'node:events';
import fs from 'node:fs';
import path from 'node:path';
import { packageRoot } from '../../../coordinator/package-root.js';
import type { TimedAnswer } from '../../../coordinator/bench-stream.js';

export const PEER_VERSION = '3.22.1';

/** Installs it where it is not yet. @param folder is made. @throws when npm cannot. */
export function installPeer(folder: string): void {
  const installed = path.join(folder, 'node_modules/node-llama-cpp/package.json');
  if (fs.existsSync(installed)) return;
  fs.mkdirSync(folder, { recursive: true });
  fs.writeFileSync(path.join(folder, 'package.json'), '{"private":true}\n');
  const args = ['install', '--ignore-scripts', '--no-audit', '--no-fund', '--loglevel=error'];
  execFileSync('npm', [...args, `node-llama-cpp@${PEER_VERSION}`], { cwd: folder });
}

export interface PeerOptions {
  readonly modules: string;
  readonly file: string;
  readonly threads: number;
  readonly contextSize: number;
  readonly sequences: number;
}

export class LlamaCpp {
  readonly #child: ChildProcess;

  private constructor(child: ChildProcess) {
    this.#child = child;
  }

  static async start(options: PeerOptions): Promise<LlamaCpp> {
    const { file, threads, contextSize, sequences, modules } = options;
    const entry = path.join(packageRoot, 'test/bench/peers/peer-llama-cpp.mjs');
    const child = fork(entry, [file, ...[threads, contextSize, sequences].map(String), modules]);
    await Promise.race([
      once(child, 'message'),
      once(child, 'exit').then(() => {
        throw new Error('llama.cpp did not start');
      }),
    ]);
    return new LlamaCpp(child);
  }

  /** All prompts at once, each to `maxTokens` tokens, temperature 0. */
  async run(prompts: readonly (readonly number[])[], maxTokens: number): Promise<TimedAnswer[]> {
    const answer = once(this.#child, 'message');
    this.#child.send({ prompts, maxTokens });
    const [{ startMs, events }] = (await answer) as [{ startMs: number; events: number[][] }];
    return events.map((times, i) => ({
      startMs,
      events: times.map((atMs, at) => ({ atMs, tokens: at + 1 })),
      promptTokens: prompts[i]!.length,
      cachedTokens: 0,
      outputTokens: times.length,
    }));
  }

  async stop(): Promise<void> {
    const gone = once(this.#child, 'exit');
    this.#child.kill('SIGKILL');
    await gone;
  }
}
