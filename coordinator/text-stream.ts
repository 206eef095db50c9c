/**
 * The text of one sequence as it grows: whole characters only, and nothing that is or may become a
 * stop text. What has been released is a function of the tokens alone, so that an engine that takes over a
 * sequence continues the text where it stood.
 */
import { Detokenizer } from '../model/detokenizer.js';
import { StopText } from '../model/stop-text.js';
import type { Tokenizer } from '../model/tokenizer.js';

export class TextStream {
  readonly #detokenizer: Detokenizer;
  readonly #stopText: StopText;

  /**
   * @param options `stop`: texts that end the sequence; `isTextStart`: the space before a first word is
   *   dropped.
   */
  constructor(
    tokenizer: Pick<Tokenizer, 'tokenBytes'>,
    { stop, isTextStart }: { readonly stop: readonly string[]; readonly isTextStart: boolean },
  ) {
    this.#detokenizer = new Detokenizer(tokenizer, isTextStart);
    this.#stopText = new StopText(stop);
  }

  /** True once a stop text was met. */
  get isStopped(): boolean {
    return this.#stopText.isStopped;
  }

  /** The text that this token releases. */
  push(tokenId: number): string {
    return this.#stopText.push(this.#detokenizer.push(tokenId));
  }

  /** What was held back, when the sequence is over. */
  end(): string {
    return this.#stopText.push(this.#detokenizer.end()) + this.#stopText.end();
  }
}
