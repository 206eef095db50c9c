/**
 * What a rank computes on, as it is written: `cpu`, `webgpu`, `cuda` or `cuda:3`.
 */
import { CaravanError } from '../proto/errors.js';
import { DeviceKind as DeviceCode } from '../proto/gen/cluster.js';

export type DeviceKind = 'cpu' | 'webgpu' | 'cuda';

export type DeviceName =
  | { readonly kind: 'cpu' }
  | { readonly kind: 'webgpu' }
  | { readonly kind: 'cuda'; readonly index: number };

/** On the wire. */
export const deviceCodes = {
  cpu: DeviceCode.DEVICE_KIND_UNSPECIFIED,
  webgpu: DeviceCode.DEVICE_KIND_WEBGPU,
  cuda: DeviceCode.DEVICE_KIND_CUDA,
} as const satisfies Record<DeviceKind, DeviceCode>;

const PATTERN = /^(?:(cpu|webgpu)|cuda(?::(\d{1,3}))?)$/;

export const isDeviceName = (text: string): boolean => PATTERN.test(text);

/** @throws CaravanError `bad_usage` naming what is understood. */
export function parseDevice(text: string): DeviceName {
  const match = PATTERN.exec(text);
  if (match === null) {
    throw new CaravanError('bad_usage', `--device ${text}: must be cpu, webgpu, cuda or cuda:N`);
  }
  if (match[1] !== undefined) return { kind: match[1] as 'cpu' | 'webgpu' };
  return { kind: 'cuda', index: Number(match[2] ?? 0) };
}

/**
 * The device of one of several ranks on a machine: with `cuda` rank i has GPU i, with `cuda:N` all ranks share GPU N.
 */
export const deviceOfRank = (device: string, rank: number): string =>
  device === 'cuda' ? `cuda:${rank}` : device;

export const nameOfDevice = (device: DeviceName): string =>
  device.kind === 'cuda' ? `cuda:${device.index}` : device.kind;
