/** How a request changes logits before they are compared, in the words of the wire. */
import type { Adjustment } from '../proto/gen/cluster.js';
import type { Request } from './request.js';

/** What ranks are told of a request's adjustment. */
export function adjustmentOf({ promptTokenIds, sampling }: Request): Adjustment | undefined {
  const { adjustment } = sampling;
  if (adjustment === undefined) return undefined;
  const { biases, ...penalties } = adjustment;
  return {
    ...penalties,
    promptLength: promptTokenIds.length,
    biasIds: biases.map(([id]) => id),
    biases: biases.map(([, bias]) => bias),
  };
}
