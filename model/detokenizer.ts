/**
 * From tokens back to text, one at a time: a character comes out when all of its bytes are there, and
 * ill-formed bytes become U+FFFD as in the WHATWG Encoding Standard.
 */
import type { Tokenizer } from './tokenizer.js';

const SPACE = 0x20;

export class Detokenizer {
  readonly #tokenizer: Pick<Tokenizer, 'tokenBytes'>;
  // A byte order mark is a character like any other here.
  readonly #decoder = new TextDecoder('utf-8', { ignoreBOM: true });
  #isSpaceDue: boolean;

  /** @param dropsFirstSpace the space that SentencePiece puts before a first word is left out. */
  constructor(tokenizer: Pick<Tokenizer, 'tokenBytes'>, dropsFirstSpace: boolean) {
    this.#tokenizer = tokenizer;
    this.#isSpaceDue = dropsFirstSpace;
  }

  /** The text that this token completes. */
  push(id: number): string {
    let bytes = this.#tokenizer.tokenBytes(id);
    if (bytes.length === 0) return '';
    if (this.#isSpaceDue) {
      this.#isSpaceDue = false;
      if (bytes[0] === SPACE) bytes = bytes.subarray(1);
    }
    return this.#decoder.decode(bytes, { stream: true });
  }

  /** What an unfinished character leaves: U+FFFD or nothing. */
  end(): string {
    return this.#decoder.decode();
  }
}
