/**
 * What a rank computes on, as it is written: `cpu`, `webgpu`, `cuda` or `cuda:3`.
 */
import { CaravanError } from '../proto/errors.js';

export type DeviceName =
  | { readonly kind: 'cpu' }
  | { readonly kind: 'webgpu' }
  | { readonly kind: 'cuda'; readonly index: number };

/** @throws CaravanError `bad_usage` naming what is understood. */
export function parseDevice(text: string): DeviceName {
  if (text === 'cpu' || text === 'webgpu') return { kind: text };
  const cuda = /^cuda(?::(\d{1,3}))?$/.exec(text);
  if (cuda !== null) return { kind: 'cuda', index: Number(cuda[1] ?? 0) };
  throw new CaravanError('bad_usage', `--device ${text}: must be cpu, webgpu, cuda or cuda:N`);
}
