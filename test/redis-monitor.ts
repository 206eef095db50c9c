/**
 * What Redis executes, as MONITOR tells it. ioredis has a monitor of its own, which fails when the first line comes in one
 * packet with Redis's answer: on a Redis that is being used.
 */
import { once } from 'node:events';
import net from 'node:net';
import readline from 'node:readline';

/**
 * @param onCall hears of every command: its words as Redis quotes them, and whence it came, `lua` for those of scripts.
 * @returns what ends it.
 */
export async function monitorRedis(
  port: number,
  onCall: (words: readonly string[], source: string) => void,
): Promise<() => void> {
  const socket = net.connect(port, '127.0.0.1');
  await once(socket, 'connect');
  socket.write('MONITOR\r\n');
  const lines = readline.createInterface({ input: socket });
  const answer = once(lines, 'line');
  lines.on('line', (line) => {
    const call = /^\+[\d.]+ \[\d+ (\S+)\] (.*)$/.exec(line);
    if (call === null) return;
    const words = Array.from(call[2]!.matchAll(/"((?:[^"\\]|\\.)*)"/g), ([, word]) => word!);
    onCall(words, call[1]!);
  });
  const [first] = (await answer) as [string];
  if (first !== '+OK') throw new Error(`MONITOR: ${first}`);
  return () => {
    socket.destroy();
  };
}
