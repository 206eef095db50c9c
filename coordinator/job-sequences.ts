/** The sequences of a job: every prompt, as often as answers to it are wanted. */
import type { Request } from './request.js';

/** Sequences that are generated for each prompt. */
export const sequencesPerPrompt = ({ n, bestOf }: Request): number => bestOf ?? n ?? 1;

/** Prompts of the request. */
export const promptCount = ({ otherPrompts }: Request): number => 1 + (otherPrompts?.length ?? 0);

/** Sequences of the job: those of the first prompt come first. */
export const sequenceCount = (request: Request): number =>
  promptCount(request) * sequencesPerPrompt(request);

/** Number of the prompt that a sequence answers. */
export const promptIndexOf = (request: Request, index: number): number =>
  Math.floor(index / sequencesPerPrompt(request));

/** The request as one of its sequences sees it: with one prompt and one answer. */
export function sequenceRequest(request: Request, index: number): Request {
  const { otherPrompts, ...rest } = request;
  const prompt = otherPrompts?.[promptIndexOf(request, index) - 1];
  return prompt === undefined ? rest : { ...rest, ...prompt };
}

/** Tokens of all prompts, each counted once. */
export const promptTokenCount = ({ promptTokenIds, otherPrompts }: Request): number =>
  (otherPrompts ?? []).reduce(
    (sum, prompt) => sum + prompt.promptTokenIds.length,
    promptTokenIds.length,
  );

/**
 * Of those, what was not computed again: of each prompt, what none of its sequences computed.
 *
 * @param bySequence what each was spared, as far as it is known.
 */
export function cachedTokenCount(
  request: Request,
  bySequence: readonly (number | undefined)[],
): number {
  const perPrompt = sequencesPerPrompt(request);
  let sum = 0;
  for (let first = 0; first < sequenceCount(request); first += perPrompt) {
    const known = bySequence.slice(first, first + perPrompt).filter((count) => count !== undefined);
    if (known.length > 0) sum += Math.min(...known);
  }
  return sum;
}

/** Whether ranks report logprobs for it: they are shown, or the best of several is looked for. */
export const needsLogprobs = ({ logprobs, n, bestOf }: Request): boolean =>
  logprobs !== undefined || (bestOf ?? 1) > (n ?? 1);

/** Whether the logprobs of the prompt are shown too. */
export const needsPromptLogprobs = ({ logprobs, echo }: Request): boolean =>
  logprobs !== undefined && echo === true;
