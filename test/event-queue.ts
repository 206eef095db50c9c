/** What will happen in simulated time, the next first: a binary heap; events of one moment in the order of their adding. */
interface Event {
  readonly atS: number;
  readonly order: number;
  readonly run: () => void;
}

export class EventQueue {
  readonly #events: Event[] = [];
  #count = 0;

  /** When the next event is; Infinity without any. */
  get nextS(): number {
    return this.#events[0]?.atS ?? Infinity;
  }

  add(atS: number, run: () => void): void {
    const events = this.#events;
    const event = { atS, order: (this.#count += 1), run };
    let i = events.length;
    events.push(event);
    while (i > 0) {
      const parent = (i - 1) >> 1;
      if (!isBefore(event, events[parent]!)) break;
      events[i] = events[parent]!;
      i = parent;
    }
    events[i] = event;
  }

  /** Takes the next event out; there must be one. */
  take(): Event {
    const events = this.#events;
    const first = events[0]!;
    const last = events.pop()!;
    if (events.length === 0) return first;
    let i = 0;
    for (;;) {
      let child = 2 * i + 1;
      if (child >= events.length) break;
      const right = events[child + 1];
      if (right !== undefined && isBefore(right, events[child]!)) child += 1;
      if (!isBefore(events[child]!, last)) break;
      events[i] = events[child]!;
      i = child;
    }
    events[i] = last;
    return first;
  }
}

const isBefore = (a: Event, b: Event): boolean =>
  a.atS === b.atS ? a.order < b.order : a.atS < b.atS;
