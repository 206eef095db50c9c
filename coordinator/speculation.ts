/**
 * How many guessed tokens a step computes beside the certain ones: as many as pay for themselves, by what steps were
 * measured to take. Pure: time comes in as numbers.
 */

/** A sequence that can guess. */
export interface Guesser {
  /** How likely token `index` of its draft is right when those before it are, 0 to 1. */
  chance(index: number): number;
  /** Most tokens that may be guessed. */
  readonly draftLimit: number;
}

/** Most guessed tokens of one sequence in a step. */
export const MAX_DRAFT = 12;
/** A guess must promise this much more than going without, so that noise does not switch it on. */
const LEAST_GAIN = 1.05;

/** What an engine is told of `--speculation`. */
export const draftTokensOf = (speculation: 'auto' | 'off'): 'adaptive' | 0 =>
  speculation === 'auto' ? 'adaptive' : 0;

/** What steps take by their rows, without prompts: the measured ones, and lines between them. */
export class StepCosts {
  /** By rows: milliseconds. */
  readonly #ms: (number | undefined)[] = [];

  /** @param ms that a step of decodes and drafts took. */
  add(rows: number, ms: number): void {
    const known = this.#ms[rows];
    // A step that was disturbed counts as if it had taken twice what is known.
    this.#ms[rows] = known === undefined ? ms : known + 0.2 * (Math.min(ms, 2 * known) - known);
  }

  /** Milliseconds of a step; what was never measured is guessed from its neighbours. Null while nothing was. */
  of(rows: number): number | null {
    const known = this.#ms[rows];
    if (known !== undefined) return known;
    let below = rows - 1;
    while (below > 0 && this.#ms[below] === undefined) below -= 1;
    let above = rows + 1;
    while (above < this.#ms.length && this.#ms[above] === undefined) above += 1;
    const [low, high] = [this.#ms[below], this.#ms[above]];
    if (low === undefined) return high ?? null;
    if (high === undefined) return low * (1 + ROW_SHARE * (rows - below));
    return low + ((high - low) * (rows - below)) / (above - below);
  }
}

/** What one more row is guessed to add to a step before it was measured: little, so that it is measured. */
const ROW_SHARE = 0.05;

/**
 * How many tokens each sequence should guess in a step of `rows` certain ones.
 *
 * @returns as `guessers`.
 */
export function chooseDrafts(
  guessers: readonly Guesser[],
  rows: number,
  maxDraftRows: number,
  costs: StepCosts,
): number[] {
  const counts = guessers.map(() => 0);
  const plainMs = costs.of(rows);
  if (plainMs === null) return counts;
  let best = { speed: (LEAST_GAIN * rows) / plainMs, counts: [...counts] };
  // The likeliest token that is not yet guessed comes next: the chance that a draft holds up to it.
  const chances = guessers.map((guesser) => guesser.chance(0));
  let expected = rows;
  for (let added = 1; added <= maxDraftRows; added += 1) {
    let next = -1;
    guessers.forEach(({ draftLimit }, i) => {
      if (counts[i]! < Math.min(draftLimit, MAX_DRAFT) && chances[i]! > (chances[next] ?? 0)) {
        next = i;
      }
    });
    if (next === -1) break;
    expected += chances[next]!;
    counts[next]! += 1;
    chances[next]! *= guessers[next]!.chance(counts[next]!);
    const speed = expected / costs.of(rows + added)!;
    if (speed > best.speed) best = { speed, counts: [...counts] };
  }
  return best.counts;
}

/** A sequence as far as guessing looks at it. */
export interface GuessingSequence extends Guesser {
  /** 0 when it decodes. */
  readonly prefillLeft: number;
  guess(count: number): void;
}

/**
 * Has every decoding sequence guess as much as it should for the next step; nothing beside prompts, which fill it.
 *
 * @param most rows of a step.
 */
export function guessNext(
  sequences: readonly GuessingSequence[],
  draftTokens: 'adaptive' | number,
  most: number,
  costs: StepCosts,
): void {
  const decoding = sequences.filter(({ prefillLeft }) => prefillLeft === 0);
  const room = decoding.length === sequences.length ? most - decoding.length : 0;
  const counts =
    draftTokens === 'adaptive'
      ? chooseDrafts(decoding, decoding.length, room, costs)
      : decoding.map(({ draftLimit }) => (room > 0 ? Math.min(draftLimit, draftTokens) : 0));
  decoding.forEach((sequence, i) => {
    sequence.guess(counts[i]!);
  });
}
