/** What a step is about to do, in words, for sinks that want to know of what their engine died. */
import type { StepPlan } from './scheduler.js';
import type { Sequence } from './sequence.js';

export function announceStep({ decodes, drafts, chunks }: StepPlan<Sequence>): void {
  for (const { sink, spec, fed } of [...decodes, ...drafts]) {
    sink.step?.(`decode at position ${fed} of sequence ${spec.index}`);
  }
  for (const { sequence, count } of chunks) {
    const { sink, spec, fed } = sequence;
    sink.step?.(`prefill of positions ${fed} to ${fed + count - 1} of sequence ${spec.index}`);
  }
}
