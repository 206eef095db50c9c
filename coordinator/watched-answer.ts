/** Waiting for an answer with open eyes. */
import os from 'node:os';
import type { Loaded } from '../proto/gen/cluster.js';

/** The longest that an answer is watched for: decode steps are short, and what takes longer need not be answered so soon. */
const WATCH_MS = 20;

const coreCount = os.availableParallelism();

/**
 * Waits for what GPUs answer without sleeping: they have nothing to do while this process wakes up. Where every core has a
 * rank, or ranks are CPUs, it sleeps.
 */
export async function watched<T>(answer: Promise<T>, ranks: readonly Loaded[]): Promise<T> {
  const isOnGpus = ranks.every(({ device }) => device.startsWith('cuda'));
  if (!isOnGpus || coreCount <= ranks.length + 1) return answer;
  let isHere = false;
  const untilMs = performance.now() + WATCH_MS;
  const turn = (): void => {
    if (!isHere && performance.now() < untilMs) setImmediate(turn);
  };
  turn();
  try {
    return await answer;
  } finally {
    isHere = true;
  }
}
