/**
 * Which tokens may come next in a state of a grammar, as bits: one walk of the machine along the tree of all tokens.
 *
 * States that differ only deep in their stacks share most of their mask. It is computed once, with a hole where the stacks
 * agree: tokens that never return through the hole are settled for all such states, and only the others are tried in
 * each. After Y. Dong et al., "XGrammar", 2024 (context-independent tokens).
 */
import { CaravanError } from '../proto/errors.js';
import type { Machine, MachineState } from './grammar-machine.js';
import type { TokenTrie } from './token-trie.js';

/** Bit `id % 8` of byte `id / 8` is set for each token that may come. */
export interface TokenMask {
  readonly bits: Buffer;
  /** How many may come. */
  readonly count: number;
}

/** What is known of all states with one local state. */
interface LocalMask {
  readonly bits: Buffer;
  readonly count: number;
  /** Tokens that return through the hole. */
  readonly unsettled: readonly number[];
}

/** Masks kept, of 4 KB each with a vocabulary of 32,000; then all are forgotten. */
const MAX_MASKS = 2_048;
/** Places that the machine may look at for one mask: some 100 ms. */
const MAX_WORK = 4_000_000;

/** Where more tokens than this are unsettled, a walk along the tree is quicker. */
const MAX_UNSETTLED = 4_000;

const SPACE = 0x20;

export class TokenMasks {
  readonly #machine: Machine;
  readonly #trie: TokenTrie;
  #masks = new Map<MachineState, TokenMask>();
  #firstMasks = new Map<MachineState, TokenMask>();
  #locals = new Map<MachineState, LocalMask>();
  /** (depths) the machine's state on the way down. */
  readonly #path: MachineState[] = [];
  readonly #escaped: boolean[] = [];

  constructor(machine: Machine, trie: TokenTrie) {
    this.#machine = machine;
    this.#trie = trie;
  }

  /**
   * @param dropsSpace nothing was written yet, and the first space is dropped.
   * @throws CaravanError `invalid_request` when the grammar takes too much work.
   */
  of(state: MachineState, dropsSpace: boolean): TokenMask {
    const known = (dropsSpace ? this.#firstMasks : this.#masks).get(state);
    if (known !== undefined) return known;
    if (this.#masks.size + this.#locals.size >= MAX_MASKS) {
      this.#masks = new Map();
      this.#locals = new Map();
    }
    const mask = dropsSpace ? this.#firstMask(state) : this.#mask(state);
    (dropsSpace ? this.#firstMasks : this.#masks).set(state, mask);
    return mask;
  }

  #mask(state: MachineState): TokenMask {
    const local = this.#machine.localOf(state);
    const shared = local && this.#localMask(local);
    let bits: Buffer;
    let count: number;
    if (shared === null || shared.unsettled.length > MAX_UNSETTLED) {
      bits = this.#empty();
      count = this.#walk(state, 0, this.#trie.nodeCount, bits, null);
    } else {
      bits = Buffer.from(shared.bits);
      count = shared.count;
      for (const token of shared.unsettled) {
        if (this.#machine.run(state, this.#trie.bytesOf(token)) === null) continue;
        bits[token >> 3]! |= 1 << (token & 7);
        count += 1;
      }
    }
    return { bits, count: count + this.#addEnd(state, bits) };
  }

  #localMask(local: MachineState): LocalMask {
    let mask = this.#locals.get(local);
    if (mask === undefined) {
      const bits = this.#empty();
      const unsettled: number[] = [];
      const count = this.#walk(local, 0, this.#trie.nodeCount, bits, unsettled);
      mask = { bits, count, unsettled };
      this.#locals.set(local, mask);
    }
    return mask;
  }

  /** A token that begins with a space is read without it. */
  #firstMask(state: MachineState): TokenMask {
    const { byte, depth, after, firstToken, tokens, nodeCount } = this.#trie;
    const bits = this.#empty();
    let count = 0;
    for (let node = 0; node < nodeCount; node = after[node]!) {
      if (byte[node] !== SPACE) {
        count += this.#walk(state, node, after[node]!, bits, null);
        continue;
      }
      for (let i = firstToken[node]!; i < firstToken[node + 1]!; i += 1) {
        bits[tokens[i]! >> 3]! |= 1 << (tokens[i]! & 7);
        count += 1;
      }
      count += this.#walk(state, node + 1, after[node]!, bits, null, depth[node]);
    }
    return { bits, count: count + this.#addEnd(state, bits) };
  }

  #empty(): Buffer {
    return Buffer.alloc((this.#trie.vocabSize + 7) >> 3);
  }

  #addEnd(state: MachineState, bits: Buffer): number {
    if (!state.isAccepting) return 0;
    for (const eos of this.#trie.eosTokenIds) bits[eos >> 3]! |= 1 << (eos & 7);
    return this.#trie.eosTokenIds.length;
  }

  /**
   * Sets the bits of the tokens at nodes from … to - 1 that the machine reads from `state` on.
   *
   * @param unsettled takes the tokens that it reads only through the hole, if at all.
   * @param above depth of the node that `state` stands for.
   * @returns how many were set.
   */
  #walk(
    state: MachineState,
    from: number,
    to: number,
    bits: Uint8Array,
    unsettled: number[] | null,
    above = 0,
  ): number {
    const { byte, depth, after, firstToken, tokens } = this.#trie;
    const machine = this.#machine;
    const [path, escaped] = [this.#path, this.#escaped];
    const mostWork = machine.work + MAX_WORK;
    path[above] = state;
    escaped[above] = state.isEscaping;
    let count = 0;
    for (let node = from; node < to;) {
      const d = depth[node]!;
      const next = machine.step(path[d - 1]!, byte[node]!);
      if (next === null) {
        if (escaped[d - 1]! && unsettled !== null) {
          for (let i = firstToken[node]!; i < firstToken[after[node]!]!; i += 1) {
            unsettled.push(tokens[i]!);
          }
        }
        node = after[node]!;
        continue;
      }
      path[d] = next;
      escaped[d] = escaped[d - 1]! || next.isEscaping;
      for (let i = firstToken[node]!; i < firstToken[node + 1]!; i += 1) {
        const token = tokens[i]!;
        bits[token >> 3]! |= 1 << (token & 7);
        count += 1;
      }
      if (machine.work > mostWork) {
        throw new CaravanError('invalid_request', 'takes too much work at one token: simplify it');
      }
      node += 1;
    }
    return count;
  }
}
