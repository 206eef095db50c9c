/**
 * Jinja templates of checkpoints, through Hugging Face's own library. A template is code that came with a download: it
 * can only compute with what it is given, and its time, steps and sizes are bounded.
 */
import * as library from '@huggingface/jinja';

/** What we use of the library, whose own declarations do not resolve under Node's module rules. */
interface Scope {
  set(name: string, value: unknown): unknown;
}
interface LibraryInterpreter {
  run(program: object): { readonly value: unknown };
  evaluate(statement: object | undefined, scope: Scope): { readonly value: unknown };
}
const { Environment, Interpreter, parse, tokenize } = library as unknown as {
  Environment: new () => Scope;
  Interpreter: new (scope: Scope) => LibraryInterpreter;
  parse: (tokens: object) => object;
  tokenize: (
    source: string,
    options: { readonly lstrip_blocks: boolean; readonly trim_blocks: boolean },
  ) => object;
};

/** Real templates have up to 30 KB, and render a long dialog in a few thousand steps. */
const MAX_SOURCE_CHARACTERS = 1 << 18;
const MAX_STEPS = 2_000_000;
const MAX_MS = 1_000;
/** Characters of any text, and elements of any list, while it renders. */
const MAX_TEXT = 1 << 24;
const MAX_ELEMENTS = 1 << 17;

/** What a template says with `raise_exception`: the request breaks a rule of the model. */
export class TemplateRefusal extends Error {}

export class JinjaTemplate {
  readonly source: string;
  readonly #program: object;

  /** @throws Error of the library that says what cannot be parsed; RangeError when it is too long. */
  constructor(source: string) {
    if (source.length > MAX_SOURCE_CHARACTERS) {
      throw new RangeError(`has ${source.length} characters; at most ${MAX_SOURCE_CHARACTERS}`);
    }
    this.source = source;
    // As transformers renders chat templates.
    this.#program = parse(tokenize(source, { lstrip_blocks: true, trim_blocks: true }));
  }

  /** The texts that stand in the template between quotes. */
  literals(): Set<string> {
    const found = new Set<string>();
    const visit = (node: unknown): void => {
      if (node instanceof Map) {
        for (const [key, value] of node as Map<unknown, unknown>) {
          visit(key);
          visit(value);
        }
      } else if (typeof node === 'object' && node !== null) {
        const { type, value } = node as { type?: unknown; value?: unknown };
        if (type === 'StringLiteral' && typeof value === 'string') found.add(value);
        Object.values(node).forEach(visit);
      }
    };
    visit(this.#program);
    return found;
  }

  /**
   * @throws TemplateRefusal with the template's sentence; RangeError beyond a bound; Error of the library for
   *   what it cannot compute.
   */
  render(variables: Readonly<Record<string, unknown>>): string {
    const environment = new Environment();
    const globals = { true: true, false: false, none: null, True: true, False: false, None: null };
    for (const [name, value] of Object.entries({ ...globals, ...functions, ...variables })) {
      environment.set(name, value);
    }
    const { value } = new BoundedInterpreter(environment).run(this.#program);
    return String(value);
  }
}

const functions = {
  raise_exception: (message: unknown): never => {
    throw new TemplateRefusal(typeof message === 'string' ? message : 'refused');
  },
  range: (first: number, end?: number, step = 1): number[] => {
    const [start, stop] = end === undefined ? [0, first] : [first, end];
    if (step === 0) throw new RangeError('range() with a step of 0');
    const count = Math.max(0, Math.ceil((stop - start) / step));
    if (count > MAX_ELEMENTS) throw new RangeError(`range() of ${count} elements`);
    return Array.from({ length: count }, (_, i) => start + i * step);
  },
  strftime_now: (format: string): string => strftime(new Date(), format),
};

/** Everything a template computes passes through `evaluate`. */
class BoundedInterpreter extends Interpreter {
  #steps = 0;
  readonly #endMs = performance.now() + MAX_MS;

  override evaluate(
    statement: object | undefined,
    scope: Scope,
  ): ReturnType<LibraryInterpreter['evaluate']> {
    this.#steps += 1;
    if (this.#steps > MAX_STEPS) throw new RangeError(`takes more than ${MAX_STEPS} steps`);
    if (performance.now() > this.#endMs) throw new RangeError(`takes more than ${MAX_MS} ms`);
    const result = super.evaluate(statement, scope);
    const { value } = result;
    if (typeof value === 'string' && value.length > MAX_TEXT) {
      throw new RangeError(`makes a text of more than ${MAX_TEXT} characters`);
    }
    if (Array.isArray(value) && value.length > MAX_ELEMENTS) {
      throw new RangeError(`makes a list of more than ${MAX_ELEMENTS} elements`);
    }
    return result;
  }
}

/** Python's strftime in the C locale, of the directives that templates use. */
function strftime(date: Date, format: string): string {
  const two = (value: number): string => String(value).padStart(2, '0');
  const named = (options: Intl.DateTimeFormatOptions): string =>
    new Intl.DateTimeFormat('en-US', options).format(date);
  const directives: Readonly<Record<string, () => string>> = {
    Y: () => String(date.getFullYear()),
    m: () => two(date.getMonth() + 1),
    d: () => two(date.getDate()),
    b: () => named({ month: 'short' }),
    B: () => named({ month: 'long' }),
    a: () => named({ weekday: 'short' }),
    A: () => named({ weekday: 'long' }),
    H: () => two(date.getHours()),
    M: () => two(date.getMinutes()),
    S: () => two(date.getSeconds()),
    '%': () => '%',
  };
  return format.replace(/%(.)/g, (whole, letter: string) => directives[letter]?.() ?? whole);
}
