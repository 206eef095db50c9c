/**
 * The bytes of all tokens as one tree, laid out in the order of a walk: a node's children follow it, and whoever does not
 * want to go down jumps to `after`.
 */
import type { Tokenizer } from '../model/tokenizer.js';

export class TokenTrie {
  /** (nodes) the byte that leads to the node. */
  readonly byte: Uint8Array;
  /** (nodes) depth, from 1. */
  readonly depth: Uint16Array;
  /** (nodes) the first node that is not below this one. */
  readonly after: Uint32Array;
  /** (nodes + 1) where a node's tokens begin in `tokens`. */
  readonly firstToken: Uint32Array;
  readonly tokens: Uint32Array;
  readonly maxDepth: number;
  readonly vocabSize: number;
  readonly eosTokenIds: readonly number[];
  readonly #tokenizer: Pick<Tokenizer, 'tokenBytes'>;

  /** Tokens that write nothing (control tokens) are not in it. */
  constructor(tokenizer: Pick<Tokenizer, 'tokenBytes' | 'vocabSize' | 'eosTokenIds'>) {
    this.#tokenizer = tokenizer;
    this.vocabSize = tokenizer.vocabSize;
    this.eosTokenIds = tokenizer.eosTokenIds;
    const eos = new Set(tokenizer.eosTokenIds);
    const entries: { id: number; bytes: Buffer }[] = [];
    for (let id = 0; id < tokenizer.vocabSize; id += 1) {
      const bytes = Buffer.from(tokenizer.tokenBytes(id));
      if (bytes.length > 0 && !eos.has(id)) entries.push({ id, bytes });
    }
    entries.sort((a, b) => Buffer.compare(a.bytes, b.bytes) || a.id - b.id);
    const byte: number[] = [];
    const depth: number[] = [];
    const firstToken: number[] = [];
    const tokens: number[] = [];
    let previous: Buffer = Buffer.alloc(0);
    for (const { id, bytes } of entries) {
      let shared = 0;
      while (shared < previous.length && previous[shared] === bytes[shared]) shared += 1;
      for (let i = shared; i < bytes.length; i += 1) {
        byte.push(bytes[i]!);
        depth.push(i + 1);
        firstToken.push(tokens.length);
      }
      tokens.push(id);
      previous = bytes;
    }
    firstToken.push(tokens.length);
    this.byte = Uint8Array.from(byte);
    this.depth = Uint16Array.from(depth);
    this.firstToken = Uint32Array.from(firstToken);
    this.tokens = Uint32Array.from(tokens);
    this.maxDepth = depth.reduce((most, d) => Math.max(most, d), 0);
    this.after = new Uint32Array(depth.length);
    const open: number[] = [];
    for (let node = 0; node <= depth.length; node += 1) {
      const d = depth[node] ?? 0;
      while (open.length > 0 && depth[open.at(-1)!]! >= d) this.after[open.pop()!] = node;
      open.push(node);
    }
  }

  get nodeCount(): number {
    return this.byte.length;
  }

  /** What the token writes in the middle of a text. */
  bytesOf(token: number): Uint8Array {
    return this.#tokenizer.tokenBytes(token);
  }
}
