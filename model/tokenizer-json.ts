/**
 * tokenizer.json through Hugging Face's own library: BPE with byte fallback, and byte-level BPE.
 */
import * as library from '@huggingface/tokenizers';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { onOneLine, quoted } from './quoted.js';
import { Detokenizer } from './detokenizer.js';
import type { PromptPart } from './marked-text.js';
import type { Tokenizer } from './tokenizer.js';

/** What we use of the library, whose own declarations do not resolve under Node's module rules. */
interface LibraryTokenizer {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] };
}
const { Tokenizer: HuggingFaceTokenizer } = library as unknown as {
  Tokenizer: new (json: unknown, config: unknown) => LibraryTokenizer;
};

const addedToken = z.looseObject({
  id: z.number().int().nonnegative(),
  content: z.string().min(1),
  special: z.boolean().default(false),
});

const tokenizerFile = z.looseObject({
  model: z.looseObject({
    type: z.string().optional(),
    vocab: z.record(z.string(), z.number().int().nonnegative()),
    unk_token: z.string().nullish(),
  }),
  added_tokens: z.array(addedToken).nullish(),
  post_processor: z.unknown().optional(),
  decoder: z.unknown().optional(),
});

/** The part of a post-processor that says what stands before a text. */
const templateProcessing = z.object({
  type: z.literal('TemplateProcessing'),
  single: z.array(z.looseObject({ SpecialToken: z.object({ id: z.string() }).optional() })),
});
const postProcessors = z.object({ processors: z.array(z.unknown()) });

/** What other files of the checkpoint say. */
interface Known {
  readonly bosTokenId: number | undefined;
  readonly eosTokenIds: readonly number[] | undefined;
  /** Whether BOS stands before a text; undefined leaves it to the post-processor. */
  readonly addsBos: boolean | undefined;
}

const NO_BYTES = new Uint8Array(0);

/** Ids and vocabularies beyond this are damage; the largest real ones have 256,000. */
const MAX_VOCABULARY = 1 << 22;

export class JsonTokenizer implements Tokenizer {
  readonly vocabSize: number;
  readonly bosTokenId: number;
  readonly eosTokenIds: readonly number[];
  readonly prefixTokenIds: readonly number[];
  readonly addsFirstSpace: boolean;
  readonly controlTokens: ReadonlyMap<string, number>;
  readonly #library: LibraryTokenizer;
  readonly #pieces: string[] = [];
  readonly #ids = new Map<string, number>();
  readonly #added = new Set<number>();
  readonly #silent = new Set<number>();
  readonly #isByteLevel: boolean;

  /** @throws CaravanError `invalid_checkpoint` or `unsupported_model`. */
  constructor(json: unknown, config: Readonly<Record<string, unknown>>, known: Known) {
    const parsed = tokenizerFile.safeParse(json);
    if (!parsed.success) {
      const issue = parsed.error.issues[0];
      const field = issue?.path.join('.') ?? '';
      throw damaged(onOneLine(`${field}: ${issue?.message ?? ''}`));
    }
    const { model, decoder } = parsed.data;
    const added = parsed.data.added_tokens ?? [];
    if (model.type !== undefined && model.type !== 'BPE') {
      throw new CaravanError(
        'unsupported_model',
        `tokenizer.json: model.type is ${quoted(model.type)}; Caravan runs BPE`,
      );
    }
    for (const [piece, id] of Object.entries(model.vocab)) this.#learn(piece, id);
    for (const { id, content } of added) {
      this.#learn(content, id);
      this.#added.add(id);
    }
    this.#isByteLevel = JSON.stringify(decoder ?? null).includes('"ByteLevel"');
    this.addsFirstSpace = !this.#isByteLevel;
    this.vocabSize = this.#pieces.length;
    const named = (key: string): number | undefined => this.#ids.get(spellingOf(config[key]));
    this.eosTokenIds =
      known.eosTokenIds ??
      oneOf(named('eos_token') ?? this.#firstOf(['</s>', '<|end_of_text|>', '<|im_end|>']));
    this.bosTokenId =
      known.bosTokenId ??
      named('bos_token') ??
      this.#firstOf(['<s>', '<|begin_of_text|>', '<|im_start|>']) ??
      // What a text begins with where the model knows no beginning.
      this.eosTokenIds[0]!;
    const controls = added.filter(({ id, content, special }) => {
      const isControl = special || this.eosTokenIds.includes(id);
      return isControl || id === this.bosTokenId || controlSpelling.test(content);
    });
    for (const { id } of controls) this.#silent.add(id);
    this.controlTokens = new Map(controls.map(({ id, content }) => [content, id]));
    this.#library = openLibrary(json, config, controls);
    this.prefixTokenIds =
      known.addsBos === undefined
        ? this.#prefixOf(parsed.data.post_processor)
        : known.addsBos
          ? [this.bosTokenId]
          : [];
  }

  encode(text: string): number[] {
    return this.encodeParts([text]);
  }

  encodeParts(parts: readonly PromptPart[]): number[] {
    const text = parts.map((part) =>
      typeof part === 'number' ? privateSpelling(part) : part.toWellFormed(),
    );
    const { ids } = this.#library.encode(text.join(''), { add_special_tokens: false });
    // The library leaves holes where a piece is missing and no unk_token stands for it.
    if (ids.every((id) => Number.isSafeInteger(id))) return ids;
    throw new CaravanError(
      'invalid_checkpoint',
      'tokenizer.json: the vocabulary has no piece for a part of this text, and no unk_token',
    );
  }

  tokenBytes(id: number): Uint8Array {
    const piece = this.#pieces[id];
    if (piece === undefined || this.#silent.has(id)) return NO_BYTES;
    if (this.#added.has(id)) return Buffer.from(piece);
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

  #learn(piece: string, id: number): void {
    if (id >= MAX_VOCABULARY) throw damaged(`the token ${quoted(piece)} has the id ${id}`);
    this.#pieces[id] = piece;
    this.#ids.set(piece, id);
  }

  #firstOf(names: readonly string[]): number | undefined {
    return names.map((name) => this.#ids.get(name)).find((id) => id !== undefined);
  }

  /** The special tokens that a post-processor puts before a text. */
  #prefixOf(postProcessor: unknown): number[] {
    const nested = postProcessors.safeParse(postProcessor).data?.processors ?? [postProcessor];
    for (const one of nested) {
      const template = templateProcessing.safeParse(one).data?.single;
      if (template === undefined) continue;
      const text = template.findIndex(({ SpecialToken: special }) => special === undefined);
      return template.slice(0, text).map(({ SpecialToken: special }) => {
        const id = this.#ids.get(special?.id ?? '');
        if (id === undefined) throw damaged(`post_processor: ${special?.id ?? ''} is no token`);
        return id;
      });
    }
    return [];
  }
}

const damaged = (message: string): CaravanError =>
  new CaravanError('invalid_checkpoint', `tokenizer.json: ${message}`);

/** Some checkpoints forget to say that such a token is special. */
const controlSpelling = /^<[|\uff5c].*[|\uff5c]>$/;

/** A token of tokenizer_config.json is a text, or an object with one. */
function spellingOf(token: unknown): string {
  if (typeof token === 'string') return token;
  const { content } = (token ?? {}) as { content?: unknown };
  return typeof content === 'string' ? content : '';
}

function oneOf(id: number | undefined): readonly [number] {
  if (id !== undefined) return [id];
  throw damaged('has no end-of-sequence token, and no other file of the checkpoint names one');
}

/**
 * How a control token is spelled to the library: with lone surrogates, which no text has. Its own spelling in a text is
 * then a text like any other.
 */
const privateSpelling = (id: number): string => `\udc00${id}\udc01`;

/**
 * A pre-tokenizer with `Digits` written as a pattern: in the library it splits at 0 to 9 alone, in the original at every
 * number of Unicode, ² and ¼ among them.
 */
function splitNumbers(preTokenizer: unknown): unknown {
  if (typeof preTokenizer !== 'object' || preTokenizer === null) return preTokenizer;
  const {
    type,
    pretokenizers,
    individual_digits: isEach,
  } = preTokenizer as {
    type?: unknown;
    pretokenizers?: unknown;
    individual_digits?: unknown;
  };
  if (type === 'Digits') {
    const pattern = { Regex: isEach === true ? '\\p{N}' : '\\p{N}+' };
    return { type: 'Split', pattern, behavior: 'Isolated', invert: false };
  }
  if (!Array.isArray(pretokenizers)) return preTokenizer;
  return { ...preTokenizer, pretokenizers: pretokenizers.map(splitNumbers) };
}

/** The library, which knows the control tokens by their private spellings alone. */
function openLibrary(
  json: unknown,
  config: Readonly<Record<string, unknown>>,
  controls: readonly z.infer<typeof addedToken>[],
): LibraryTokenizer {
  const file = json as z.infer<typeof tokenizerFile>;
  const hidden = new Set(controls.map(({ id }) => id));
  const spellings = new Set(controls.map(({ content }) => content));
  spellings.delete(file.model.unk_token ?? '');
  try {
    return new HuggingFaceTokenizer(
      {
        normalizer: null,
        ...file,
        pre_tokenizer: splitNumbers(file['pre_tokenizer'] ?? null),
        decoder: null,
        post_processor: null,
        model: {
          ...file.model,
          vocab: Object.fromEntries(
            Object.entries(file.model.vocab).filter(([piece]) => !spellings.has(piece)),
          ),
        },
        added_tokens: [
          ...(file.added_tokens ?? []).filter(({ id }) => !hidden.has(id)),
          ...controls.map((token) => ({
            ...token,
            content: privateSpelling(token.id),
            special: true,
            normalized: false,
          })),
        ],
      },
      config,
    );
  } catch (cause) {
    throw damaged(onOneLine(cause instanceof Error ? cause.message : String(cause)));
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
