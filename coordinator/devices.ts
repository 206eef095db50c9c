/** What this machine has to compute on: found out by starting a rank there. */
import fs from 'node:fs';
import { deviceOfRank, parseDevice } from '../model/device-name.js';
import { toCaravanError } from '../proto/errors.js';
import { startLocalRank, stopLocalRank, type LocalRank } from './local-ranks.js';

export interface DeviceReport {
  readonly device: string;
  /** What keeps a rank from starting there, and how to mend it; null when one starts. */
  readonly fault: string | null;
  /** Of its own memory; null where it has none, or it cannot be known. */
  readonly memory: LocalRank['memory'];
  readonly readablePeers: LocalRank['readablePeers'];
}

/** The devices of `tp` ranks under this --device, each once. */
export const devicesOfRanks = (device: string, tp: number): string[] => [
  ...new Set(Array.from({ length: tp }, (_, rank) => deviceOfRank(device, rank))),
];

/** Every device that could be on this machine: NVIDIA GPUs as far as their driver shows them, at least one. */
export function possibleDevices(): string[] {
  let gpuCount = 0;
  try {
    gpuCount = fs.readdirSync('/proc/driver/nvidia/gpus').length;
  } catch {
    // No driver, or another system: the first GPU's fault says what is missing.
  }
  return ['cpu', 'webgpu', ...devicesOfRanks('cuda', Math.max(1, gpuCount))];
}

export async function probeDevice(device: string): Promise<DeviceReport> {
  try {
    const rank = await startLocalRank({ threads: 1, device, logLevel: 'silent' });
    await stopLocalRank(rank);
    const { memory, readablePeers } = rank;
    return { device, fault: null, memory, readablePeers };
  } catch (error) {
    const { message } = toCaravanError(error);
    const fault = message.replace(/^a rank process did not start: /, '');
    return { device, fault, memory: null, readablePeers: null };
  }
}

/**
 * Of the ranks of one machine, the first two whose GPUs cannot read each other's memory: the first cannot read the second's.
 *
 * @returns null where all can.
 */
export function unreadablePair(
  devices: readonly string[],
  reports: readonly DeviceReport[],
): readonly [reader: string, owner: string] | null {
  for (const reader of devices) {
    const readable = reports.find(({ device }) => device === reader)?.readablePeers ?? [];
    const owner = devices.find((name) => {
      const device = parseDevice(name);
      return device.kind !== 'cuda' || !readable.includes(device.index);
    });
    if (owner !== undefined) return [reader, owner];
  }
  return null;
}
