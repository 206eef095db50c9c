/** What stands in the streams of a job's journal: one stream a sequence. */
import type { Ending, FinishReason, TokenLogprobs } from './request.js';

export type JournalEntry =
  | {
      readonly kind: 'tokens';
      /** Tokens of the sequence up to and with this entry. */
      readonly endOffset: number;
      readonly tokenIds: readonly number[];
      /** The text that each of them released. */
      readonly texts: readonly string[];
      /** Of each of them; left out where the request asks for none. */
      readonly logprobs?: readonly TokenLogprobs[];
    }
  | {
      readonly kind: 'end';
      readonly endOffset: number;
      /** What was held back until the end; empty for one of several sequences. */
      readonly text: string;
      readonly ending: Ending;
    };

/** The sequence ended by itself, one of several: the job goes on until all have. */
export interface FinishEntry {
  readonly kind: 'finish';
  readonly endOffset: number;
  /** What was held back until the end. */
  readonly text: string;
  readonly finishReason: FinishReason;
}

/** An entry of any stream. */
export type StreamEntry = JournalEntry | FinishEntry;

/** How far a sequence is. */
export interface SequenceProgress {
  readonly tokenIds: readonly number[];
  /** The text that each of them released. */
  readonly texts: readonly string[];
  /** Of each of them; left out where the request asks for none. */
  readonly logprobs?: readonly TokenLogprobs[];
  /** Prompt tokens whose logprobs are written down. */
  readonly promptCount: number;
  /** How it ended, as one of several; null while it has not. */
  readonly finish: FinishEntry | null;
}

export function progressOf(entries: readonly StreamEntry[], promptCount: number): SequenceProgress {
  const tokens = entries.filter((entry) => entry.kind === 'tokens');
  const logprobs = tokens.flatMap((entry) => entry.logprobs ?? []);
  return {
    tokenIds: tokens.flatMap((entry) => entry.tokenIds),
    texts: tokens.flatMap((entry) => entry.texts),
    ...(logprobs.length > 0 ? { logprobs } : {}),
    promptCount,
    finish: entries.find((entry) => entry.kind === 'finish') ?? null,
  };
}

/** Tokens before `offset` are left out: after a loss, an entry may cover more than it once did. */
export function parseEntry(
  entryId: string,
  fields: readonly string[],
  offset: number,
): StreamEntry {
  const endOffset = Number(entryId.slice(0, entryId.indexOf('-')));
  // Fields stand at even places, their values after them.
  const value = (name: string): string | null => {
    const at = fields.findIndex((field, i) => i % 2 === 0 && field === name);
    return at === -1 ? null : (fields[at + 1] ?? '');
  };
  const ending = value('ending');
  const text = value('text') ?? '';
  if (ending !== null)
    return { kind: 'end', endOffset, text, ending: JSON.parse(ending) as Ending };
  const finish = value('finish');
  if (finish !== null) {
    return { kind: 'finish', endOffset, text, finishReason: finish as FinishReason };
  }
  const tokenIds = (value('tokens') ?? '').split(',').map(Number);
  const known = Math.max(0, offset - (endOffset - tokenIds.length));
  const texts = JSON.parse(value('texts') ?? '[]') as string[];
  const logprobs = value('logprobs');
  return {
    kind: 'tokens',
    endOffset,
    tokenIds: tokenIds.slice(known),
    texts: texts.slice(known),
    ...(logprobs === null
      ? {}
      : { logprobs: (JSON.parse(logprobs) as TokenLogprobs[]).slice(known) }),
  };
}
