/** What one step of an engine was, for those who measure. */
export interface StepFigures {
  /** One a decode, one a guessed token, one a prompt token; and how many it could have had. */
  readonly rows: number;
  readonly stepRows: number;
  readonly promptTokens: number;
  readonly sequences: number;
  /** Tokens that were guessed, and those of them that came true. */
  readonly draftTokens: number;
  readonly acceptedTokens: number;
  /** From planning to the last sink, and what of it the ranks took (the slowest). */
  readonly totalMs: number;
  readonly ranksMs: number;
  /** Waiting for peers, of the rank that computed longest. */
  readonly waitMs: number;
  /** The longest time that a rank did not serve the network. */
  readonly stretchMs: number;
}
