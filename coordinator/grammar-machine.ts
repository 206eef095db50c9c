/**
 * Runs a grammar over bytes: the set of all places where a parser could be, each with the stack of rules to return to, as
 * one state. States are made when they are first met and kept, so that most steps are one look into a table.
 *
 *   Place = reader (a state of the grammar that reads bytes) + Frame ──> Frame ──> … ──> bottom
 *
 * Two bottoms: `ground`, where the text may end, and `hole`, under which the rest of the stack is left open (see
 * `TokenMasks`). K. Thompson, "Regular expression search algorithm", 1968; lazily determinised as in RE2.
 */
import { CaravanError } from '../proto/errors.js';
import type { Nfa } from './grammar-nfa.js';

/** Places of one state: a grammar that is more ambiguous than this costs too much at every token. */
const MAX_PLACES = 2_048;
/** Known states; then all are forgotten and met anew. */
const MAX_KNOWN_STATES = 20_000;

/** One rule to return to. Frames are shared: equal stacks are one object. */
export class Frame {
  readonly id: number;
  readonly returnTo: number;
  readonly parent: Frame | null;
  readonly depth: number;
  readonly #callers = new Map<number, Frame>();

  constructor(id: number, returnTo: number, parent: Frame | null) {
    this.id = id;
    this.returnTo = returnTo;
    this.parent = parent;
    this.depth = parent === null ? 0 : parent.depth + 1;
  }

  push(returnTo: number, newId: () => number): Frame {
    let frame = this.#callers.get(returnTo);
    if (frame === undefined) {
      frame = new Frame(newId(), returnTo, this);
      this.#callers.set(returnTo, frame);
    }
    return frame;
  }
}

interface Place {
  readonly reader: number;
  readonly frame: Frame;
}

export class MachineState {
  readonly places: readonly Place[];
  /** The text may end here. */
  readonly isAccepting: boolean;
  /** A path has returned through the hole: what comes next depends on the stack under it. */
  readonly isEscaping: boolean;
  /** By class of bytes; undefined is not known yet, null is nothing. */
  readonly next: (MachineState | null | undefined)[] = [];

  constructor(places: readonly Place[], isAccepting: boolean, isEscaping: boolean) {
    this.places = places;
    this.isAccepting = isAccepting;
    this.isEscaping = isEscaping;
  }

  /** Nothing can follow. */
  get isComplete(): boolean {
    return this.places.length === 0;
  }
}

export class Machine {
  readonly #nfa: Nfa;
  readonly #known = new Map<string, MachineState>();
  readonly #ground = new Frame(0, -1, null);
  readonly #hole = new Frame(1, -1, null);
  #frameCount = 2;
  readonly start: MachineState;
  /** Places that were looked at, ever: what the machine's time is proportional to. */
  work = 0;

  /** @throws CaravanError `invalid_request` when the grammar is too ambiguous. */
  constructor(nfa: Nfa) {
    this.#nfa = nfa;
    this.start = this.#settle([{ state: nfa.start.start, frame: this.#ground }]);
  }

  /** After one more byte; null when no text of the grammar goes on like this. */
  step(state: MachineState, byte: number): MachineState | null {
    const byteClass = this.#nfa.classOf[byte]!;
    const known = state.next[byteClass];
    if (known !== undefined) return known;
    const next = this.#compute(state, byte);
    state.next[byteClass] = next;
    return next;
  }

  /** After all of these bytes. */
  run(state: MachineState | null, bytes: Uint8Array): MachineState | null {
    let at = state;
    for (let i = 0; i < bytes.length && at !== null; i += 1) at = this.step(at, bytes[i]!);
    return at;
  }

  /**
   * The state with all that its stacks have in common at the bottom put under the hole, or null where they have nothing in
   * common. States that differ only there have one local state.
   */
  localOf(state: MachineState): MachineState | null {
    if (state.isAccepting || state.places.length === 0) return null;
    const shared = commonFrame(state.places.map(({ frame }) => frame));
    if (shared === null || shared.parent === null) return null;
    const moved = new Map<Frame, Frame>([[shared, this.#hole]]);
    const move = (frame: Frame): Frame => {
      let to = moved.get(frame);
      if (to === undefined) {
        to = move(frame.parent!).push(frame.returnTo, this.#newId);
        moved.set(frame, to);
      }
      return to;
    };
    return this.#intern(
      state.places.map(({ reader, frame }) => ({ reader, frame: move(frame) })),
      false,
      false,
    );
  }

  readonly #newId = (): number => (this.#frameCount += 1);

  #compute(state: MachineState, byte: number): MachineState | null {
    const reached: { state: number; frame: Frame }[] = [];
    for (const { reader, frame } of state.places) {
      for (const { low, high, to } of this.#nfa.edges(reader)) {
        if (byte >= low && byte <= high) reached.push({ state: to, frame });
      }
    }
    this.work += state.places.length;
    return reached.length === 0 ? null : this.#settle(reached);
  }

  /** Follows everything that reads no byte: calls, returns, ends. */
  #settle(reached: readonly { state: number; frame: Frame }[]): MachineState {
    const places = new Map<string, Place>();
    const seen = new Set<string>();
    let isAccepting = false;
    let isEscaping = false;
    const stack = [...reached];
    for (let at = stack.pop(); at !== undefined; at = stack.pop()) {
      const { state, frame } = at;
      const name = `${state}:${frame.id}`;
      if (seen.has(name)) continue;
      seen.add(name);
      const { readers, calls, ends } = this.#nfa.closure(state);
      for (const reader of readers) places.set(`${reader}:${frame.id}`, { reader, frame });
      for (const { rule, to } of calls) {
        const after = this.#nfa.closure(to);
        // A call that ends its rule needs no frame: right recursion stays flat.
        const isLast = after.ends && after.readers.length === 0 && after.calls.length === 0;
        const callee = isLast ? frame : frame.push(to, this.#newId);
        stack.push({ state: rule.start, frame: callee });
      }
      if (ends) {
        if (frame === this.#ground) isAccepting = true;
        else if (frame === this.#hole) isEscaping = true;
        else stack.push({ state: frame.returnTo, frame: frame.parent! });
      }
      if (seen.size > 4 * MAX_PLACES || places.size > MAX_PLACES) {
        throw new CaravanError(
          'invalid_request',
          `is too ambiguous: more than ${MAX_PLACES} ways to read one text`,
        );
      }
    }
    this.work += seen.size;
    return this.#intern([...places.values()], isAccepting, isEscaping);
  }

  #intern(places: Place[], isAccepting: boolean, isEscaping: boolean): MachineState {
    places.sort((a, b) => a.reader - b.reader || a.frame.id - b.frame.id);
    const names = places.map(({ reader, frame }) => `${reader}:${frame.id}`);
    const name = `${isAccepting ? 'a' : ''}${isEscaping ? 'e' : ''}|${names.join()}`;
    let state = this.#known.get(name);
    if (state === undefined) {
      if (this.#known.size >= MAX_KNOWN_STATES) this.#known.clear();
      state = new MachineState(places, isAccepting, isEscaping);
      this.#known.set(name, state);
    }
    return state;
  }
}

/** The deepest frame under (or equal to) all of these; null where they stand on different bottoms. */
function commonFrame(frames: readonly Frame[]): Frame | null {
  let common: Frame | null = frames[0]!;
  for (let frame of frames) {
    while (common !== null && frame !== common) {
      if (frame.depth > common.depth) frame = frame.parent!;
      else common = common.parent;
    }
  }
  return common;
}
