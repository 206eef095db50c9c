/**
 * Turns stored 16-bit floats into float32, and float32 into 16-bit floats. The runtime's kernel takes an eighth of the time of a loop in JavaScript, which
 * would be a quarter of what loading takes.
 */
import { elementFormats } from '../model/elements.js';
import type { Widening } from '../model/slice-reader.js';
import { GraphBuilder, int, type Graph } from './graph-builder.js';
import { elementType, type ElementType, type Ort, type Session } from './ort.js';

/** Fewer numbers are sooner done by the loop: a run has a beginning. */
const LEAST_COUNT = 1 << 14;

export class HalfWidener {
  readonly #ort: Ort;
  readonly #sessions = new Map<ElementType, Session>();

  constructor(ort: Ort) {
    this.#ort = ort;
  }

  /** As the format does it, with the same results. */
  readonly widen: Widening = (format, source, byteOffset, blockCount, target, index) => {
    const type = typeOf(format);
    if (type === null || blockCount < LEAST_COUNT) {
      format.widen(source, byteOffset, blockCount, target, index);
      return;
    }
    let session = this.#sessions.get(type);
    if (session === undefined) {
      session = this.#ort.createSession(castGraph(type, elementType.float32));
      this.#sessions.set(type, session);
    }
    const bytes = source.subarray(byteOffset, byteOffset + 2 * blockCount);
    const halves = this.#ort.tensor(bytes, [blockCount], type);
    const floats = this.#ort.tensor(target.subarray(index, index + blockCount), [blockCount]);
    try {
      session.run([halves], [floats]);
    } finally {
      halves.release();
      floats.release();
    }
  };

  release(): void {
    for (const session of this.#sessions.values()) session.release();
    this.#sessions.clear();
  }
}

function typeOf(format: Parameters<Widening>[0]): ElementType | null {
  if (format === elementFormats.F16) return elementType.float16;
  return format === elementFormats.BF16 ? elementType.bfloat16 : null;
}

/** Rounds float32 to the nearest 16-bit float. */
export class HalfNarrower {
  readonly #ort: Ort;
  #session: Session | null = null;

  constructor(ort: Ort) {
    this.#ort = ort;
  }

  /** @returns the bytes of as many 16-bit floats. */
  narrow(values: Float32Array): Uint8Array {
    const { float32, float16 } = elementType;
    this.#session ??= this.#ort.createSession(castGraph(float32, float16));
    const bytes = new Uint8Array(2 * values.length);
    const floats = this.#ort.tensor(values, [values.length]);
    const halves = this.#ort.tensor(bytes, [values.length], float16);
    try {
      this.#session.run([floats], [halves]);
    } finally {
      floats.release();
      halves.release();
    }
    return bytes;
  }

  release(): void {
    this.#session?.release();
    this.#session = null;
  }
}

function castGraph(from: ElementType, to: ElementType): Graph {
  const graph = new GraphBuilder();
  graph.input('source', from, ['count']);
  graph.node('Cast', ['source'], ['target'], [int('to', to)]);
  graph.output('target', to, ['count']);
  return graph.finish();
}
