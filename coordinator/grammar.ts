/**
 * The shape that an answer must have. A request carries what was asked; gateway and engine each compile it, the one to
 * refuse what cannot be followed, the other to mask tokens.
 */
import type { Tokenizer } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';
import { compileGbnf, writeExpression } from './grammar-gbnf.js';
import { compileCalls } from './grammar-calls.js';
import { compileJsonSchema } from './grammar-json.js';
import { Machine, type MachineState } from './grammar-machine.js';
import { NfaBuilder, type Nfa } from './grammar-nfa.js';
import { parseRegex } from './grammar-regex.js';
import { TokenMasks, type TokenMask } from './token-masks.js';
import { TokenTrie } from './token-trie.js';
import type { CallStyle } from './tool-calls.js';

/** As it travels in a request. */
export type GrammarSpec =
  | { readonly kind: 'schema'; readonly schema: unknown }
  | { readonly kind: 'regex'; readonly pattern: string }
  | { readonly kind: 'choice'; readonly choices: readonly string[] }
  | { readonly kind: 'gbnf'; readonly source: string }
  | CallsSpec;

/** Calls of tools, or a text beside them. */
export interface CallsSpec {
  readonly kind: 'calls';
  readonly style: CallStyle;
  /** Of one call. */
  readonly schema: unknown;
  /** At most so many. */
  readonly calls: number;
  /** Whether any text that does not begin like a call will do, too. */
  readonly orText: boolean;
}

/** @throws CaravanError `invalid_request` that says what cannot be followed, or which limit is passed. */
export function compileGrammar(spec: GrammarSpec): Machine {
  const machine = new Machine(nfaOf(spec));
  probe(machine);
  return machine;
}

function nfaOf(spec: GrammarSpec): Nfa {
  switch (spec.kind) {
    case 'schema':
      return compileJsonSchema(spec.schema);
    case 'calls':
      return compileCalls(spec);
    case 'gbnf':
      return compileGbnf(spec.source);
    case 'choice': {
      const builder = new NfaBuilder();
      const rule = builder.rule('choice');
      builder.oneOf(rule.start, spec.choices, rule.end);
      return builder.finish(rule);
    }
    case 'regex': {
      const builder = new NfaBuilder();
      const rule = builder.rule('regex');
      const expression = parseRegex(spec.pattern, 'whole');
      writeExpression(builder, new Map(), expression, rule.start, rule.end);
      return builder.finish(rule);
    }
  }
}

const PROBED_STEPS = 400;
const PROBED_WORK = 2_000_000;

/**
 * Follows the text that keeps most ways of reading it open: a grammar that is too ambiguous is refused now, and not in the
 * middle of an answer.
 */
function probe(machine: Machine): void {
  let state: MachineState | null = machine.start;
  for (let i = 0; i < PROBED_STEPS && state !== null && machine.work < PROBED_WORK; i += 1) {
    let widest: MachineState | null = null;
    for (let byte = 0; byte < 256; byte += 1) {
      const next = machine.step(state, byte);
      if (next !== null && next.places.length > (widest?.places.length ?? 0)) widest = next;
    }
    state = widest;
  }
}

/** A compiled grammar over one tokenizer. */
export class Grammar {
  readonly machine: Machine;
  readonly masks: TokenMasks;
  readonly trie: TokenTrie;

  constructor(machine: Machine, trie: TokenTrie) {
    this.machine = machine;
    this.trie = trie;
    this.masks = new TokenMasks(machine, trie);
  }

  /** Where an answer begins. @param dropsSpace the space before its first word is not part of it. */
  begin(dropsSpace: boolean): GrammarWalk {
    return new GrammarWalk(this, dropsSpace);
  }
}

const SPACE = 0x20;

/** One answer on its way through a grammar. */
export class GrammarWalk {
  readonly #grammar: Grammar;
  #state: MachineState;
  #isSpaceDue: boolean;

  constructor(grammar: Grammar, dropsSpace: boolean) {
    this.#grammar = grammar;
    this.#state = grammar.machine.start;
    this.#isSpaceDue = dropsSpace;
  }

  /** A walk of its own from here. */
  fork(): GrammarWalk {
    const walk = new GrammarWalk(this.#grammar, this.#isSpaceDue);
    walk.#state = this.#state;
    return walk;
  }

  /** Tokens that may come next; at least one, unless the answer is complete. @throws CaravanError beyond a limit. */
  mask(): TokenMask {
    const mask = this.#grammar.masks.of(this.#state, this.#isSpaceDue);
    if (mask.count === 0 && !this.#state.isComplete) {
      throw new CaravanError('invalid_request', 'no token of the model can write what must follow');
    }
    return mask;
  }

  /** Nothing but the end can follow. */
  get isComplete(): boolean {
    return this.#state.isComplete;
  }

  get isAccepting(): boolean {
    return this.#state.isAccepting;
  }

  /** Takes a token. @throws CaravanError `internal` for one that the mask forbids. */
  take(token: number): void {
    let bytes = this.#grammar.trie.bytesOf(token);
    if (bytes.length === 0) return;
    if (this.#isSpaceDue) {
      this.#isSpaceDue = false;
      if (bytes[0] === SPACE) bytes = bytes.subarray(1);
    }
    const next = this.#grammar.machine.run(this.#state, bytes);
    if (next === null) throw new CaravanError('internal', `the grammar does not allow ${token}`);
    this.#state = next;
  }
}

function keyOf(spec: GrammarSpec): string {
  try {
    return JSON.stringify(spec);
  } catch (cause) {
    // What is too deep for JSON.stringify is too deep for any schema.
    throw new CaravanError('invalid_request', 'is nested too deep', { cause });
  }
}

/** Grammars that were asked for lately, compiled. */
export class GrammarCache {
  readonly #tokenizer: Tokenizer;
  readonly #capacity: number;
  readonly #grammars = new Map<string, Grammar>();
  #trie: TokenTrie | null = null;

  constructor(tokenizer: Tokenizer, capacity = 32) {
    this.#tokenizer = tokenizer;
    this.#capacity = capacity;
  }

  /** @throws CaravanError `invalid_request`. */
  get(spec: GrammarSpec): Grammar {
    const key = keyOf(spec);
    const known = this.#grammars.get(key);
    if (known !== undefined) {
      this.#grammars.delete(key);
      this.#grammars.set(key, known);
      return known;
    }
    this.#trie ??= new TokenTrie(this.#tokenizer);
    const grammar = new Grammar(compileGrammar(spec), this.#trie);
    this.#grammars.set(key, grammar);
    for (const oldest of this.#grammars.keys()) {
      if (this.#grammars.size <= this.#capacity) break;
      this.#grammars.delete(oldest);
    }
    return grammar;
  }
}
