/** Draws the token of a sampled row: from what the ranks told of it, or from the whole row where that is not enough. */
import { CaravanError } from '../proto/errors.js';
import { coin, purpose } from './coin.js';
import type { Ranks } from './ranks.js';
import type { TokenLogprobs } from './request.js';
import type { SampledRow } from './sampled-row.js';
import { pickToken, wholeRowCandidates } from './sampler.js';
import type { Sequence } from './sequence.js';

export interface Draw {
  readonly token: number;
  /** Where the sequence reports them. */
  readonly logprobs: TokenLogprobs | undefined;
}

/** @param row of the last step, for the sequence's next token: its position has a coin of its own. */
export async function drawToken(
  ranks: Ranks,
  sequence: Sequence,
  stepNumber: number,
  row: SampledRow,
): Promise<Draw> {
  const { spec } = sequence;
  const { sampling } = spec.request;
  const drawn =
    sampling.temperature === 0
      ? 0
      : coin(sampling.seed, spec.index, sequence.position, purpose.sample);
  const candidates = row.candidates();
  const fetch = (kind: 'adjusted' | 'raw') => ranks.fetchRow(stepNumber, row.number, kind);
  const token =
    pickToken(candidates, sampling, drawn) ??
    pickToken(wholeRowCandidates(await fetch('adjusted'), candidates.lse), sampling, drawn);
  if (token === null) throw new CaravanError('internal', 'a whole row gave no token');
  if (spec.reportsLogprobs !== true) return { token, logprobs: undefined };
  const logit = row.rawLogitOf(token) ?? (await fetch('raw'))[token]!;
  return { token, logprobs: row.logprobs(logit, sequence.topLogprobCount) };
}
