/** What may be said of a stream of events that is asked for again. */
import { z } from 'zod';

export const eventsQuery = z.object({
  /** An event's id: the stream goes on after it. */
  from: z.string().optional(),
  /** The shape of its chunks. */
  as: z.enum(['chat', 'completion']).default('completion'),
  usage: z
    .enum(['true', 'false'])
    .transform((word) => word === 'true')
    .default(true),
});
