/** All tensors of a small checkpoint, in memory, to be written in another layout. */
import type { Checkpoint } from '../model/checkpoint.js';
import { listSlices, planRanks, slicesOf } from '../model/plan.js';
import { SliceReader } from '../model/slice-reader.js';

/** (rows, columns), by Hugging Face's names. */
export async function readWhole(checkpoint: Checkpoint): Promise<Map<string, Float32Array>> {
  const { config } = checkpoint;
  const whole = new Map<string, Float32Array>();
  const reader = new SliceReader(checkpoint);
  for (const slice of listSlices(slicesOf(config, planRanks(config, 1)[0]!))) {
    const floats = new Float32Array(slice.rows.count * slice.columns.count);
    await reader.read(slice, floats, 0);
    whole.set(slice.tensor, floats);
  }
  reader.close();
  return whole;
}
