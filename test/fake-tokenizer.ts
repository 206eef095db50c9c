/** For models that never learned a language: every token is a letter. */
import type { Tokenizer } from '../model/tokenizer.js';

export const fakeTokenizer = (vocabSize: number): Tokenizer => ({
  vocabSize,
  bosTokenId: 1,
  eosTokenIds: [2],
  prefixTokenIds: [1],
  addsFirstSpace: true,
  controlTokens: new Map(),
  encode: (text) => Array.from(text, (character) => character.charCodeAt(0) % vocabSize),
  encodeParts(parts) {
    return parts.flatMap((part) => (typeof part === 'string' ? this.encode(part) : [part]));
  },
  tokenBytes: (id) => Uint8Array.of(97 + (id % 26)),
  pieceOf: (id) => String.fromCharCode(97 + (id % 26)),
  decode: (ids) => ids.map((id) => String.fromCharCode(97 + (id % 26))).join(''),
});
