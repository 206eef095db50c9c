/**
 * A grammar as rules over bytes. Each rule is a nondeterministic automaton from its start to its one end; an edge takes a
 * range of bytes, nothing, or a whole other rule (a call), which is what makes recursion possible.
 */
import { CaravanError } from '../proto/errors.js';

/** States of all rules together. What a state costs is about 100 bytes and a microsecond. */
export const MAX_STATES = 120_000;

export interface Rule {
  readonly name: string;
  readonly start: number;
  readonly end: number;
}

interface ByteEdge {
  readonly low: number;
  readonly high: number;
  readonly to: number;
}

interface Call {
  readonly rule: Rule;
  readonly to: number;
}

interface State {
  bytes: ByteEdge[];
  epsilons: number[];
  calls: Call[];
}

/** Where a state leads without reading a byte, within its rule. */
export interface Closure {
  /** States that read bytes. */
  readonly readers: readonly number[];
  readonly calls: readonly Call[];
  /** Whether the rule may end here. */
  readonly ends: boolean;
}

const refuse = (message: string): never => {
  throw new CaravanError('invalid_request', message);
};

/** Rules under construction. */
export class NfaBuilder {
  readonly #states: State[] = [];
  readonly #rules: Rule[] = [];

  get stateCount(): number {
    return this.#states.length;
  }

  /** @throws CaravanError `invalid_request` beyond MAX_STATES. */
  state(): number {
    if (this.#states.length >= MAX_STATES) {
      refuse(`needs more than ${MAX_STATES} states of an automaton: repeat less, or shorter`);
    }
    return this.#states.push({ bytes: [], epsilons: [], calls: [] }) - 1;
  }

  rule(name: string): Rule {
    const rule = { name, start: this.state(), end: this.state() };
    this.#rules.push(rule);
    return rule;
  }

  /** An edge for every byte of low … high. */
  bytes(from: number, low: number, high: number, to: number): void {
    this.#states[from]!.bytes.push({ low, high, to });
  }

  epsilon(from: number, to: number): void {
    this.#states[from]!.epsilons.push(to);
  }

  call(from: number, rule: Rule, to: number): void {
    this.#states[from]!.calls.push({ rule, to });
  }

  /** The bytes of an ASCII or UTF-8 text, one after the other. @returns where they end. */
  text(from: number, text: string): number {
    let at = from;
    for (const byte of Buffer.from(text)) {
      const next = this.state();
      this.bytes(at, byte, byte, next);
      at = next;
    }
    return at;
  }

  /** One of several texts, sharing what they begin with. */
  oneOf(from: number, texts: Iterable<string>, to: number): void {
    const nodes = new Map<number, Map<number, number>>();
    for (const text of new Set(texts)) {
      let at = from;
      for (const byte of Buffer.from(text)) {
        let children = nodes.get(at);
        if (children === undefined) nodes.set(at, (children = new Map<number, number>()));
        let next = children.get(byte);
        if (next === undefined) {
          next = this.state();
          children.set(byte, next);
          this.bytes(at, byte, byte, next);
        }
        at = next;
      }
      this.epsilon(at, to);
    }
  }

  /**
   * The finished grammar: what can lead nowhere is cut off, so that every path can be completed.
   *
   * @throws CaravanError `invalid_request` when no text satisfies it, or when a rule calls itself before it reads a byte.
   */
  finish(start: Rule): Nfa {
    const productive = this.#productiveStates();
    if (!productive.has(start.start)) refuse('no text can satisfy it');
    for (const [id, state] of this.#states.entries()) {
      const isLive = productive.has(id);
      state.bytes = isLive ? state.bytes.filter(({ to }) => productive.has(to)) : [];
      state.epsilons = isLive ? state.epsilons.filter((to) => productive.has(to)) : [];
      state.calls = isLive
        ? state.calls.filter(({ rule, to }) => productive.has(rule.start) && productive.has(to))
        : [];
    }
    this.#refuseLeftRecursion();
    return new Nfa(this.#states, start, new Set(this.#rules.map(({ end }) => end)));
  }

  /** States from which their rule's end can be reached. */
  #productiveStates(): Set<number> {
    const into = new Map<number, number[]>();
    const add = (from: number, to: number): void => {
      const sources = into.get(to);
      if (sources === undefined) into.set(to, [from]);
      else sources.push(from);
    };
    const waiting = new Map<number, { from: number; to: number }[]>();
    for (const [from, { bytes, epsilons, calls }] of this.#states.entries()) {
      for (const { to } of bytes) add(from, to);
      for (const to of epsilons) add(from, to);
      for (const { rule, to } of calls) {
        const known = waiting.get(rule.start);
        if (known === undefined) waiting.set(rule.start, [{ from, to }]);
        else known.push({ from, to });
      }
    }
    const productive = new Set<number>();
    const queue = this.#rules.map(({ end }) => end);
    const visit = (id: number): void => {
      if (!productive.has(id)) {
        productive.add(id);
        queue.push(id);
      }
    };
    for (const end of [...queue]) productive.add(end);
    for (let id = queue.pop(); id !== undefined; id = queue.pop()) {
      for (const from of into.get(id) ?? []) visit(from);
      // A rule that can end makes its calls passable.
      for (const { from, to } of waiting.get(id) ?? []) {
        if (productive.has(to)) visit(from);
        else add(from, to);
      }
    }
    return productive;
  }

  #refuseLeftRecursion(): void {
    const nullable = new Set<Rule>();
    const owner = new Map(this.#rules.map((rule) => [rule.start, rule] as const));
    /** Rules that may be called before a byte is read, and whether the end is reached so. */
    const leftOf = (rule: Rule): { calls: Set<Rule>; ends: boolean } => {
      const calls = new Set<Rule>();
      const seen = new Set([rule.start]);
      const stack = [rule.start];
      for (let id = stack.pop(); id !== undefined; id = stack.pop()) {
        const follow = (to: number): void => {
          if (seen.has(to)) return;
          seen.add(to);
          stack.push(to);
        };
        const state = this.#states[id]!;
        state.epsilons.forEach(follow);
        for (const call of state.calls) {
          calls.add(owner.get(call.rule.start)!);
          if (nullable.has(call.rule)) follow(call.to);
        }
      }
      return { calls, ends: seen.has(rule.end) };
    };
    for (let hasGrown = true; hasGrown;) {
      hasGrown = false;
      for (const rule of this.#rules) {
        if (nullable.has(rule) || !leftOf(rule).ends) continue;
        nullable.add(rule);
        hasGrown = true;
      }
    }
    const lefts = new Map(this.#rules.map((rule) => [rule, [...leftOf(rule).calls]] as const));
    const done = new Set<Rule>();
    for (const first of this.#rules) {
      // Depth first, with a stack of its own: rules can be many.
      const path: { rule: Rule; next: number }[] = [{ rule: first, next: 0 }];
      const onPath = new Set([first]);
      for (let top = path.at(-1); top !== undefined; top = path.at(-1)) {
        const callee = done.has(top.rule) ? undefined : lefts.get(top.rule)![top.next];
        if (callee === undefined) {
          done.add(top.rule);
          onPath.delete(top.rule);
          path.pop();
          continue;
        }
        top.next += 1;
        if (onPath.has(callee)) {
          refuse(`the rule ${callee.name} begins with itself, before anything is read`);
        }
        if (done.has(callee)) continue;
        onPath.add(callee);
        path.push({ rule: callee, next: 0 });
      }
    }
  }
}

/** A finished grammar. */
export class Nfa {
  readonly #states: readonly State[];
  readonly #ends: ReadonlySet<number>;
  readonly #closures = new Map<number, Closure>();
  readonly start: Rule;
  /** (256) bytes of one class are alike everywhere in the grammar. */
  readonly classOf: Uint8Array;
  readonly classCount: number;

  constructor(states: readonly State[], start: Rule, ends: ReadonlySet<number>) {
    this.#states = states;
    this.#ends = ends;
    this.start = start;
    const borders = new Uint8Array(257);
    for (const { bytes } of states) {
      for (const { low, high } of bytes) {
        borders[low] = 1;
        borders[high + 1] = 1;
      }
    }
    this.classOf = new Uint8Array(256);
    let current = 0;
    for (let byte = 1; byte < 256; byte += 1) {
      if (borders[byte] === 1) current += 1;
      this.classOf[byte] = current;
    }
    this.classCount = current + 1;
  }

  get stateCount(): number {
    return this.#states.length;
  }

  edges(state: number): readonly ByteEdge[] {
    return this.#states[state]!.bytes;
  }

  closure(from: number): Closure {
    const known = this.#closures.get(from);
    if (known !== undefined) return known;
    const readers: number[] = [];
    const calls: Call[] = [];
    let ends = false;
    const seen = new Set([from]);
    const stack = [from];
    for (let id = stack.pop(); id !== undefined; id = stack.pop()) {
      const state = this.#states[id]!;
      if (state.bytes.length > 0) readers.push(id);
      calls.push(...state.calls);
      ends ||= this.#ends.has(id);
      for (const to of state.epsilons) {
        if (seen.has(to)) continue;
        seen.add(to);
        stack.push(to);
      }
    }
    const closure = { readers, calls, ends };
    this.#closures.set(from, closure);
    return closure;
  }
}
