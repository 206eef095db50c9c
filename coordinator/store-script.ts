/**
 * A Lua script of ours. A connection is sent its text once, and its digest from then on; a Redis that knows it no more
 * (started again, another one after a fail-over, `SCRIPT FLUSH`) is sent the text anew: ioredis sees to it.
 */
import { createHash } from 'node:crypto';
import type { Redis } from 'ioredis';

type Run = (...args: (string | number)[]) => Promise<unknown>;

/** Commands that are sent together. */
export interface Commands {
  runCommand(name: string, args: readonly (string | number)[]): unknown;
}

export class Script {
  readonly #text: string;
  /** What connections call it. */
  readonly #command: string;

  constructor(text: string) {
    this.#text = text;
    this.#command = `caravan:${createHash('sha1').update(text).digest('hex')}`;
  }

  /** @returns what the script does. */
  async run(
    redis: Redis,
    keys: readonly string[],
    args: readonly (string | number)[],
  ): Promise<unknown> {
    return this.define(redis)(keys.length, ...keys, ...args);
  }

  /** Adds it to commands that were made by a connection that it was defined for. */
  queue(commands: Commands, keys: readonly string[], args: readonly (string | number)[]): void {
    commands.runCommand(this.#command, [keys.length, ...keys, ...args]);
  }

  /** Makes it a command of a connection. */
  define(redis: Redis): Run {
    const commands = redis as unknown as Record<string, Run | undefined>;
    if (commands[this.#command] === undefined) {
      redis.defineCommand(this.#command, { lua: this.#text });
    }
    return (...args) => commands[this.#command]!(...args);
  }
}
