/**
 * A small byte-level BPE in the form of tokenizer.json, as GPT-2's successors have it: Llama 3, SmolLM2. All bytes, a
 * few merges, and control tokens after them.
 */

/** GPT-2's spelling of bytes. */
export const byteLetters: readonly string[] = (() => {
  const isPlain = (byte: number): boolean =>
    (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  let next = 0x100;
  return Array.from({ length: 256 }, (_, byte) =>
    String.fromCodePoint(isPlain(byte) ? byte : next++),
  );
})();

const merges = [
  'i m',
  'e n',
  'en d',
  'im _',
  'Ġ t',
  'Ġt h',
  'h e',
  'l l',
  'he ll',
  'hell o',
  '< |',
];

export interface ControlToken {
  readonly content: string;
  readonly special?: boolean;
}

/** Control tokens have the ids from `firstControlId` on, in their order. */
export function byteLevelTokenizer(controls: readonly ControlToken[], extra: object = {}) {
  const pieces = [...byteLetters, ...merges.map((merge) => merge.replace(' ', ''))];
  const firstControlId = pieces.length;
  const json = {
    version: '1.0',
    added_tokens: controls.map(({ content, special = true }, i) => ({
      ...{ id: firstControlId + i, content, special },
      ...{ single_word: false, lstrip: false, rstrip: false, normalized: false },
    })),
    normalizer: null,
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        { type: 'Digits', individual_digits: true },
        { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
      ],
    },
    post_processor: null,
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      // SmolLM2 has its control tokens in the vocabulary, too.
      vocab: Object.fromEntries([
        ...pieces.map((piece, id) => [piece, id] as const),
        ...controls.map(({ content }, i) => [content, firstControlId + i] as const),
      ]),
      merges,
    },
    ...extra,
  };
  return { json, firstControlId };
}

export const fileOf = (json: unknown): Buffer => Buffer.from(JSON.stringify(json));
