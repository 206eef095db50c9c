/**
 * tokenizer.json through Hugging Face's own library: BPE with byte fallback, and byte-level BPE.
 */
import * as library from '@huggingface/tokenizers';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { Detokenizer } from './detokenizer.js';
import type { Tokenizer } from './tokenizer.js';

/** What we use of the library, whose own declarations do not resolve under Node's module rules. */
interface LibraryTokenizer {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
}
const { Tokenizer: HuggingFaceTokenizer } = library as unknown as {
  Tokenizer: new (json: unknown, config: unknown) => LibraryTokenizer;
};

const tokenizerFile = z.looseObject({
  model: z.looseObject({
    type: z.string().optional(),
    vocab: z.record(z.string(), z.number().int().nonnegative()),
    byte_fallback: z.boolean().optional(),
  }),
  added_tokens: z
    .array(
      z.object({ id: z.number().int().nonnegative(), content: z.string(), special: z.boolean() }),
    )
    .default([]),
  decoder: z.unknown().optional(),
});

/** What other files of the checkpoint say. */
interface KnownIds {
  readonly bosTokenId: number | undefined;
  readonly eosTokenIds: readonly number[] | undefined;
}

const NO_BYTES = new Uint8Array(0);

export class JsonTokenizer implements Tokenizer {
  readonly vocabSize: number;
  readonly bosTokenId: number;
  readonly eosTokenIds: readonly number[];
  readonly #library: LibraryTokenizer;
  readonly #pieces: string[] = [];
  readonly #special = new Set<number>();
  readonly #isByteLevel: boolean;

  /** @throws CaravanError `invalid_checkpoint` or `unsupported_model`. */
  constructor(json: unknown, config: unknown, known: KnownIds) {
    const parsed = tokenizerFile.safeParse(json);
    if (!parsed.success) {
      const issue = parsed.error.issues[0];
      throw new CaravanError(
        'invalid_checkpoint',
        `tokenizer.json: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`,
      );
    }
    const { model, added_tokens: addedTokens, decoder } = parsed.data;
    if (model.type !== undefined && model.type !== 'BPE') {
      throw new CaravanError(
        'unsupported_model',
        `tokenizer.json: model.type is ${model.type}; Caravan runs BPE`,
      );
    }
    for (const [piece, id] of Object.entries(model.vocab)) this.#pieces[id] = piece;
    for (const { id, content, special } of addedTokens) {
      this.#pieces[id] = content;
      if (special) this.#special.add(id);
    }
    this.#isByteLevel = JSON.stringify(decoder ?? null).includes('"ByteLevel"');
    this.vocabSize = this.#pieces.length;
    this.#library = new HuggingFaceTokenizer(json, config);
    this.bosTokenId =
      known.bosTokenId ?? this.#namedId(['<s>', '<|begin_of_text|>', '<|im_start|>']);
    this.eosTokenIds = known.eosTokenIds ?? [
      this.#namedId(['</s>', '<|end_of_text|>', '<|im_end|>']),
    ];
  }

  encode(text: string): number[] {
    return this.#library.encode(text, { add_special_tokens: false }).ids;
  }

  tokenBytes(id: number): Uint8Array {
    const piece = this.#pieces[id];
    if (piece === undefined || this.#special.has(id)) return NO_BYTES;
    if (this.#isByteLevel) {
      return Uint8Array.from(piece, (character) => byteLevel.get(character) ?? 0);
    }
    const byte = /^<0x([0-9A-Fa-f]{2})>$/.exec(piece)?.[1];
    if (byte !== undefined) return Uint8Array.of(Number.parseInt(byte, 16));
    return Buffer.from(piece.replaceAll('\u2581', ' '));
  }

  pieceOf(id: number): string {
    return this.#pieces[id] ?? '';
  }

  decode(ids: readonly number[]): string {
    const detokenizer = new Detokenizer(this, !this.#isByteLevel);
    return ids.map((id) => detokenizer.push(id)).join('') + detokenizer.end();
  }

  #namedId(names: readonly string[]): number {
    const id = this.#pieces.findIndex((piece) => names.includes(piece));
    if (id >= 0) return id;
    throw new CaravanError(
      'invalid_checkpoint',
      `tokenizer.json: has none of the tokens ${names.join(', ')}, and config.json names none`,
    );
  }
}

/**
 * Character to byte, as GPT-2 spells bytes: printable Latin-1 as itself, the others from U+0100 on.
 */
const byteLevel: ReadonlyMap<string, number> = (() => {
  const isPrintable = (byte: number): boolean =>
    (byte >= 0x21 && byte <= 0x7e) || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
  const map = new Map<string, number>();
  let next = 0x100;
  for (let byte = 0; byte < 256; byte += 1) {
    map.set(String.fromCodePoint(isPrintable(byte) ? byte : next++), byte);
  }
  return map;
})();
