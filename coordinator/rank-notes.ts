/** What ranks say after loading of what they do without. */
import type { Loaded } from '../proto/gen/cluster.js';

/** A line for each reason, not for each rank. */
export function notesOf(loaded: readonly Loaded[]): string[] {
  const lines = loaded.flatMap(({ directFault, captureFault }) => [
    directFault === '' ? [] : [`partials do not stay on the devices: ${directFault}`],
    captureFault === '' ? [] : [`no CUDA graphs: ${captureFault}`],
  ]);
  return [...new Set(lines.flat())];
}
