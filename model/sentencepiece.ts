/**
 * SentencePiece's BPE: the reader of tokenizer.model, and an encoder with the same results.
 *
 * T. Kudo and J. Richardson, "SentencePiece", EMNLP 2018; field numbers of sentencepiece_model.proto.
 */
import { BinaryReader } from '@bufbuild/protobuf/wire';
import { CaravanError } from '../proto/errors.js';
import { Detokenizer } from './detokenizer.js';
import type { PromptPart } from './marked-text.js';
import type { Tokenizer } from './tokenizer.js';

const kind = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

interface Piece {
  readonly text: string;
  readonly score: number;
  readonly type: number;
}

export interface SentencePieceModel {
  readonly pieces: readonly Piece[];
  readonly addsDummyPrefix: boolean;
  readonly removesExtraSpaces: boolean;
  readonly bosTokenId: number;
  readonly eosTokenId: number;
  readonly unknownTokenId: number;
}

const BPE = 2;
/** What SentencePiece writes for a space. */
const SPACE_MARK = '\u2581';

/** Calls `visit` with each field of a message; `visit` returns false for fields that it does not read. */
function eachField(
  reader: BinaryReader,
  end: number,
  visit: (field: number, wireType: number) => boolean,
): void {
  while (reader.pos < end) {
    const [field, wireType] = reader.tag();
    if (!visit(field, wireType)) reader.skip(wireType, field);
  }
}

/** @throws CaravanError `invalid_checkpoint` or `unsupported_model` naming the file. */
export function parseSentencePieceModel(bytes: Uint8Array, fileName: string): SentencePieceModel {
  const pieces: Piece[] = [];
  const flags = { modelType: 1, bos: 1, eos: 2, unknown: 0, dummyPrefix: true, extraSpaces: true };
  let characterMapBytes = 0;
  try {
    const reader = new BinaryReader(bytes);
    const within = (visit: (field: number) => boolean): true => {
      const byteCount = reader.uint32();
      if (reader.pos + byteCount > reader.len) throw new RangeError('a message is cut off');
      eachField(reader, reader.pos + byteCount, visit);
      return true;
    };
    eachField(reader, reader.len, (field) => {
      switch (field) {
        case 1: {
          const piece = { text: '', score: 0, type: kind.normal as number };
          within((inner) => {
            if (inner === 1) piece.text = reader.string();
            else if (inner === 2) piece.score = reader.float();
            else if (inner === 3) piece.type = reader.int32();
            else return false;
            return true;
          });
          pieces.push(piece);
          return true;
        }
        case 2:
          return within((inner) => {
            if (inner === 3) flags.modelType = reader.int32();
            else if (inner === 40) flags.unknown = reader.int32();
            else if (inner === 41) flags.bos = reader.int32();
            else if (inner === 42) flags.eos = reader.int32();
            else return false;
            return true;
          });
        case 3:
          return within((inner) => {
            if (inner === 2) characterMapBytes = reader.bytes().length;
            else if (inner === 3) flags.dummyPrefix = reader.bool();
            else if (inner === 4) flags.extraSpaces = reader.bool();
            else return false;
            return true;
          });
        default:
          return false;
      }
    });
  } catch (cause) {
    const reason = cause instanceof Error ? cause.message : String(cause);
    throw new CaravanError('invalid_checkpoint', `${fileName}: is damaged: ${reason}`, { cause });
  }
  if (pieces.length === 0) {
    throw new CaravanError('invalid_checkpoint', `${fileName}: holds no pieces`);
  }
  const unsupported = (what: string): never => {
    throw new CaravanError('unsupported_model', `${fileName}: ${what} is not supported`);
  };
  if (flags.modelType !== BPE) unsupported(`model type ${flags.modelType} (BPE is ${BPE})`);
  if (characterMapBytes > 0) unsupported('a normalizer with a character map');
  return {
    pieces,
    addsDummyPrefix: flags.dummyPrefix,
    removesExtraSpaces: flags.extraSpaces,
    bosTokenId: flags.bos,
    eosTokenId: flags.eos,
    unknownTokenId: flags.unknown,
  };
}

const NO_BYTES = new Uint8Array(0);
const byteName = /^<0x([0-9A-F]{2})>$/;

export class SentencePieceTokenizer implements Tokenizer {
  readonly vocabSize: number;
  readonly bosTokenId: number;
  readonly eosTokenIds: readonly number[];
  readonly prefixTokenIds: readonly number[];
  readonly addsFirstSpace: boolean;
  readonly controlTokens: ReadonlyMap<string, number>;
  readonly #model: SentencePieceModel;
  /** Pieces that text can become, with their ids. */
  readonly #ids = new Map<string, number>();
  /** Id of each byte's piece; empty where the model has no byte fallback. */
  readonly #byteIds: number[] = [];
  /** User-defined pieces, longest first: they are never split or merged. */
  readonly #userDefined: readonly string[];
  readonly #bytes: readonly Uint8Array[];

  /** @param addsBos whether BOS stands before a text that is to be continued. */
  constructor(model: SentencePieceModel, eosTokenIds: readonly number[], addsBos = true) {
    this.#model = model;
    this.vocabSize = model.pieces.length;
    this.bosTokenId = model.bosTokenId;
    this.eosTokenIds = eosTokenIds;
    this.addsFirstSpace = model.addsDummyPrefix;
    this.prefixTokenIds = addsBos ? [model.bosTokenId] : [];
    const controls = model.pieces.flatMap(({ text, type }, id) =>
      type === kind.control && text !== '' ? [[text, id] as const] : [],
    );
    this.controlTokens = new Map(controls);
    const userDefined: string[] = [];
    this.#bytes = model.pieces.map(({ text, type }, id) => {
      switch (type) {
        case kind.control:
          return NO_BYTES;
        case kind.unknown:
          return Buffer.from(' \u2047 ');
        case kind.byte: {
          const value = Number.parseInt(byteName.exec(text)?.[1] ?? '', 16);
          this.#byteIds[value] = id;
          return Uint8Array.of(value);
        }
        default:
          if (type === kind.userDefined) userDefined.push(text);
          this.#ids.set(text, id);
          return Buffer.from(text.replaceAll(SPACE_MARK, ' '));
      }
    });
    this.#userDefined = userDefined.sort((a, b) => b.length - a.length);
  }

  encode(text: string): number[] {
    const normalized = this.#normalize(text);
    const ids: number[] = [];
    for (const symbol of this.#segment(normalized)) this.#emit(symbol, ids);
    return ids;
  }

  /** Each text between control tokens gets the space before its first word, as the reference's do. */
  encodeParts(parts: readonly PromptPart[]): number[] {
    return parts.flatMap((part) => (typeof part === 'string' ? this.encode(part) : [part]));
  }

  tokenBytes(id: number): Uint8Array {
    return this.#bytes[id] ?? NO_BYTES;
  }

  pieceOf(id: number): string {
    return this.#model.pieces[id]?.text ?? '';
  }

  decode(ids: readonly number[]): string {
    const detokenizer = new Detokenizer(this, this.#model.addsDummyPrefix);
    return ids.map((id) => detokenizer.push(id)).join('') + detokenizer.end();
  }

  #normalize(text: string): string {
    // SentencePiece reads UTF-8, where a lone surrogate cannot stand.
    let clean = text.toWellFormed();
    if (this.#model.removesExtraSpaces) clean = clean.replace(/ +/g, ' ').replace(/^ | $/g, '');
    if (clean === '') return '';
    const prefix = this.#model.addsDummyPrefix ? ' ' : '';
    return `${prefix}${clean}`.replaceAll(' ', SPACE_MARK);
  }

  /**
   * Merges neighbours, the pair with the highest score first and the leftmost of equals, until none is a
   * piece. O(n log n): pairs wait in a heap, and a pair whose symbols have changed since is passed over.
   */
  #segment(text: string): string[] {
    const { starts, ends, isFixed } = this.#split(text);
    const count = starts.length;
    const previous = Int32Array.from({ length: count }, (_, i) => i - 1);
    const next = Int32Array.from({ length: count }, (_, i) => (i + 1 < count ? i + 1 : -1));
    const heap = new PairHeap();
    const offer = (left: number, right: number): void => {
      if (left === -1 || right === -1 || isFixed[left] === 1 || isFixed[right] === 1) return;
      const id = this.#ids.get(text.slice(starts[left], ends[right]));
      if (id !== undefined) {
        heap.push({ score: this.#model.pieces[id]!.score, left, right, end: ends[right]! });
      }
    };
    for (let i = 1; i < count; i += 1) offer(i - 1, i);
    for (let pair = heap.pop(); pair !== undefined; pair = heap.pop()) {
      const { left, right, end } = pair;
      // A merged-away symbol is empty; one that has grown has another end.
      if (starts[left] === ends[left] || next[left] !== right || ends[right] !== end) continue;
      ends[left] = end;
      ends[right] = starts[right]!;
      next[left] = next[right]!;
      if (next[right] !== -1) previous[next[right]!] = left;
      offer(previous[left]!, left);
      offer(left, next[left]);
    }
    const symbols: string[] = [];
    for (let i = count === 0 ? -1 : 0; i !== -1; i = next[i]!) {
      symbols.push(text.slice(starts[i], ends[i]));
    }
    return symbols;
  }

  /** Code points, and user-defined pieces as they stand. */
  #split(text: string) {
    const starts: number[] = [];
    const ends: number[] = [];
    const isFixed: number[] = [];
    for (let at = 0; at < text.length;) {
      const piece = this.#userDefined.find((candidate) => text.startsWith(candidate, at));
      const length = piece?.length ?? (text.codePointAt(at)! > 0xffff ? 2 : 1);
      starts.push(at);
      ends.push(at + length);
      isFixed.push(piece === undefined ? 0 : 1);
      at += length;
    }
    return { starts, ends, isFixed };
  }

  #emit(symbol: string, ids: number[]): void {
    const id = this.#ids.get(symbol);
    if (id !== undefined && this.#model.pieces[id]!.type !== kind.unused) {
      ids.push(id);
      return;
    }
    if (this.#byteIds.length === 256) {
      for (const byte of Buffer.from(symbol)) ids.push(this.#byteIds[byte]!);
      return;
    }
    // Neighbouring unknown characters become one unknown token.
    if (ids.at(-1) !== this.#model.unknownTokenId) ids.push(this.#model.unknownTokenId);
  }
}

interface Pair {
  readonly score: number;
  /** Numbers of the two symbols. */
  readonly left: number;
  readonly right: number;
  /** Where the right symbol ended when the pair was offered. */
  readonly end: number;
}

/** A binary heap: the highest score first, then the leftmost. */
class PairHeap {
  readonly #pairs: Pair[] = [];

  push(pair: Pair): void {
    const pairs = this.#pairs;
    let at = pairs.length;
    pairs.push(pair);
    while (at > 0) {
      const parent = (at - 1) >> 1;
      if (!comesBefore(pair, pairs[parent]!)) break;
      pairs[at] = pairs[parent]!;
      at = parent;
    }
    pairs[at] = pair;
  }

  pop(): Pair | undefined {
    const pairs = this.#pairs;
    const first = pairs[0];
    const last = pairs.pop();
    if (first === undefined || last === undefined || pairs.length === 0) return first;
    let at = 0;
    for (;;) {
      const left = 2 * at + 1;
      if (left >= pairs.length) break;
      const right = left + 1;
      const child = right < pairs.length && comesBefore(pairs[right]!, pairs[left]!) ? right : left;
      if (!comesBefore(pairs[child]!, last)) break;
      pairs[at] = pairs[child]!;
      at = child;
    }
    pairs[at] = last;
    return first;
  }
}

const comesBefore = (a: Pair, b: Pair): boolean =>
  a.score > b.score || (a.score === b.score && a.left < b.left);
