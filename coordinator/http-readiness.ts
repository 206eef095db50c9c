/** What may be asked of a gateway's readiness. */
import { z } from 'zod';

export const readinessQuery = z.object({
  /** `optional`: it is ready while jobs can be taken, although nobody works on them yet. */
  engines: z.enum(['needed', 'optional']).default('needed'),
});
