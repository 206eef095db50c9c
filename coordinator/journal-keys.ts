/** Names of a job's keys in Redis. All share the hash tag {job id}. */

export const jobKey = (id: string): string => `caravan:{${id}}:job`;
export const streamKey = (id: string, index: number): string => `caravan:{${id}}:journal:${index}`;
export const promptKey = (id: string, index: number): string => `caravan:{${id}}:prompt:${index}`;
export const channelOf = (id: string): string => `caravan:{${id}}:wake`;

/** Every key of a job: the job, the streams, the lists of its prompts' logprobs. */
export function keysOf(id: string, count: number): string[] {
  const indices = Array.from({ length: count }, (_, index) => index);
  const ofEach = (keyOf: typeof streamKey): string[] => indices.map((index) => keyOf(id, index));
  return [jobKey(id), ...ofEach(streamKey), ...ofEach(promptKey)];
}
