/**
 * The tokenizer of a checkpoint. `openTokenizer` picks the reader by the files that are there.
 */

export interface Tokenizer {
  readonly vocabSize: number;
  readonly bosTokenId: number;
  /** Ids that end an answer. */
  readonly eosTokenIds: readonly number[];
  /** Ids of `text`, without BOS or EOS. Special tokens' spellings in the text are plain text. */
  encode(text: string): number[];
  /** The raw bytes of a token as it stands in the middle of a text; control tokens are empty. */
  tokenBytes(id: number): Uint8Array;
  /** How a person would see the piece, for `caravan tokenize`. */
  pieceOf(id: number): string;
  /** Text of `ids`; control tokens are left out; ill-formed UTF-8 becomes U+FFFD. */
  decode(ids: readonly number[]): string;
}
