/** New sequences take what is there of their beginning, or wait for one that is being computed. Pure. */
import type { Join } from '../proto/gen/cluster.js';
import type { Sequence } from './sequence.js';
import type { Slots } from './slots.js';
import { joinOf } from './step-message.js';

/**
 * Begins those of the new sequences that need not wait.
 *
 * @param sequences in the order in which they came. @returns what ranks are told of those that begin.
 */
export function beginSequences(sequences: readonly Sequence[], slots: Slots): Join[] {
  const joins: Join[] = [];
  for (const sequence of sequences) {
    if (!sequence.isNew) continue;
    const request = sequence.prefixRequest;
    const prefix = slots.find(sequence.slot, request);
    const isAwaited = (other: Sequence): boolean =>
      !other.isNew && other.isPreparing(request, prefix.length);
    if (slots.copies && sequences.some(isAwaited)) continue;
    slots.begin(sequence.slot, request, prefix);
    sequence.begin(prefix.length);
    joins.push(joinOf(sequence, prefix));
  }
  return joins;
}
