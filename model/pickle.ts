/**
 * A machine for pickles that builds plain values and nothing else: no code is run. A global can be named only where
 * the caller knows it, and called only where the caller says what that means; whatever else a pickle asks for is
 * refused by name. Opcodes: those of Python's pickletools.py that torch.save writes, in protocols 2 to 5.
 */
import { CaravanError } from '../proto/errors.js';
import { quoted } from './quoted.js';

const MAX_STACK = 1_000_000;
const MAX_MARKS = 1_000;
const MAX_MEMO = 200_000;
const MAX_TEXT_BYTES = 4_096;

export type PickleKey = string | number;

/** What stands on the stack. `made` is whatever the caller's functions return. */
export type PickleValue<T> =
  | null
  | boolean
  | number
  | string
  | { readonly kind: 'tuple' | 'list'; readonly items: PickleValue<T>[] }
  | { readonly kind: 'dictionary'; readonly entries: Map<PickleKey, PickleValue<T>> }
  | { readonly kind: 'global'; readonly name: string }
  | { readonly kind: 'made'; readonly made: T };

export interface PickleRules<T> {
  /** File and entry, for messages. */
  readonly name: string;
  /** Of globals that may be named, as `module.name`: how they are called, or null where they may not be. */
  readonly globals: ReadonlyMap<
    string,
    ((args: readonly PickleValue<T>[]) => PickleValue<T>) | null
  >;
  /** What a persistent id stands for. */
  readonly resolve: (id: PickleValue<T>) => PickleValue<T>;
}

/** @throws CaravanError `invalid_checkpoint` in one line. */
export function readPickle<T>(bytes: Buffer, rules: PickleRules<T>): PickleValue<T> {
  return new PickleMachine(bytes, rules).run();
}

const MARK = Symbol('mark');

class PickleMachine<T> {
  readonly #bytes: Buffer;
  readonly #rules: PickleRules<T>;
  readonly #stack: (PickleValue<T> | typeof MARK)[] = [];
  readonly #memo = new Map<number, PickleValue<T>>();
  #markCount = 0;
  #position = 0;

  constructor(bytes: Buffer, rules: PickleRules<T>) {
    this.#bytes = bytes;
    this.#rules = rules;
  }

  run(): PickleValue<T> {
    for (;;) {
      const at = this.#position;
      const opcode = this.#take(1)[0]!;
      // STOP
      if (opcode === 0x2e) {
        const value = this.#pop();
        if (this.#stack.length > 0) this.#fail('ends with values left over');
        return value;
      }
      this.#step(opcode, at);
      if (this.#stack.length > MAX_STACK) this.#fail(`more than ${MAX_STACK} values on the stack`);
    }
  }

  #step(opcode: number, at: number): void {
    switch (String.fromCharCode(opcode)) {
      case '\x80': {
        const protocol = this.#take(1)[0]!;
        if (protocol > 5) this.#fail(`has protocol ${protocol}; 2 to 5 are read`);
        return;
      }
      case '\x95': // FRAME: a hint about buffering.
        this.#take(8);
        return;
      case '(':
        if ((this.#markCount += 1) > MAX_MARKS) this.#fail(`nests deeper than ${MAX_MARKS}`);
        this.#stack.push(MARK);
        return;
      case '0':
        this.#pop();
        return;
      case 'N':
        this.#push(null);
        return;
      case '\x88':
        this.#push(true);
        return;
      case '\x89':
        this.#push(false);
        return;
      case 'J':
        this.#push(this.#take(4).readInt32LE());
        return;
      case 'K':
        this.#push(this.#take(1)[0]!);
        return;
      case 'M':
        this.#push(this.#take(2).readUInt16LE());
        return;
      case '\x8a':
        this.#push(this.#long(this.#take(this.#take(1)[0]!)));
        return;
      case 'G':
        this.#push(this.#take(8).readDoubleBE());
        return;
      case 'X':
        this.#push(this.#text(this.#take(4).readUInt32LE()));
        return;
      case '\x8c':
        this.#push(this.#text(this.#take(1)[0]!));
        return;
      case '\x8d':
        this.#push(this.#text(Number(this.#take(8).readBigUInt64LE())));
        return;
      case 'T':
        this.#push(this.#text(this.#take(4).readUInt32LE()));
        return;
      case 'U':
        this.#push(this.#text(this.#take(1)[0]!));
        return;
      case '}':
        this.#push({ kind: 'dictionary', entries: new Map() });
        return;
      case ']':
        this.#push({ kind: 'list', items: [] });
        return;
      case ')':
        this.#push({ kind: 'tuple', items: [] });
        return;
      case '\x85':
        this.#push({ kind: 'tuple', items: this.#popMany(1) });
        return;
      case '\x86':
        this.#push({ kind: 'tuple', items: this.#popMany(2) });
        return;
      case '\x87':
        this.#push({ kind: 'tuple', items: this.#popMany(3) });
        return;
      case 't':
        this.#push({ kind: 'tuple', items: this.#popToMark() });
        return;
      case 'a':
        this.#append(this.#popMany(1));
        return;
      case 'e':
        this.#append(this.#popToMark());
        return;
      case 's':
        this.#setItems(this.#popMany(2));
        return;
      case 'u':
        this.#setItems(this.#popToMark());
        return;
      case 'q':
        this.#memorize(this.#take(1)[0]!);
        return;
      case 'r':
        this.#memorize(this.#take(4).readUInt32LE());
        return;
      case '\x94':
        this.#memorize(this.#memo.size);
        return;
      case 'h':
        this.#recall(this.#take(1)[0]!);
        return;
      case 'j':
        this.#recall(this.#take(4).readUInt32LE());
        return;
      case 'c':
        this.#global(this.#line(), this.#line());
        return;
      case '\x93': {
        const [module, name] = this.#popMany(2);
        if (typeof module !== 'string' || typeof name !== 'string') {
          return this.#fail('names a global by something else than texts');
        }
        this.#global(module, name);
        return;
      }
      case 'Q':
        this.#push(this.#rules.resolve(this.#pop()));
        return;
      case 'R':
        this.#call();
        return;
      case 'b':
        this.#ignoreAttributes();
        return;
      default:
        return this.#fail(
          `asks for opcode 0x${opcode.toString(16).padStart(2, '0')} at byte ${at}, which is not allowed`,
        );
    }
  }

  #call(): void {
    const [callee, args] = this.#popMany(2);
    if (!isKind(callee, 'global')) return this.#fail('calls something that is no global');
    if (!isKind(args, 'tuple')) return this.#fail(`calls ${callee.name} without a tuple`);
    const run = this.#rules.globals.get(callee.name);
    if (run == null) return this.#fail(`calls ${quoted(callee.name)}, which is not allowed`);
    this.#push(run(args.items));
  }

  /** BUILD: a dictionary's attributes, such as a state dictionary's _metadata, say nothing of its tensors. */
  #ignoreAttributes(): void {
    this.#pop();
    if (!isKind(this.#peek(), 'dictionary')) {
      this.#fail('sets attributes of something that is no dictionary, which is not allowed');
    }
  }

  #global(module: string, name: string): void {
    const full = `${module}.${name}`;
    if (!this.#rules.globals.has(full)) {
      this.#fail(`asks for the global ${quoted(full)}, which is not allowed`);
    }
    this.#push({ kind: 'global', name: full });
  }

  #append(values: PickleValue<T>[]): void {
    const list = this.#peek();
    if (!isKind(list, 'list')) return this.#fail('appends to something that is no list');
    for (const value of values) list.items.push(value);
    if (list.items.length > MAX_STACK) this.#fail(`a list of more than ${MAX_STACK} values`);
  }

  #setItems(values: PickleValue<T>[]): void {
    const target = this.#peek();
    if (!isKind(target, 'dictionary')) return this.#fail('sets items of what is no dictionary');
    if (values.length % 2 !== 0) this.#fail('a dictionary has a key without a value');
    for (let i = 0; i < values.length; i += 2) {
      const key = values[i]!;
      if (typeof key !== 'string' && typeof key !== 'number') {
        return this.#fail('a dictionary has a key that is neither text nor number');
      }
      target.entries.set(key, values[i + 1]!);
    }
  }

  #memorize(index: number): void {
    this.#memo.set(index, this.#peek());
    if (this.#memo.size > MAX_MEMO) this.#fail(`remembers more than ${MAX_MEMO} values`);
  }

  #recall(index: number): void {
    const value = this.#memo.get(index);
    if (value === undefined) return this.#fail(`recalls value ${index}, which it never remembered`);
    this.#push(value);
  }

  #push(value: PickleValue<T>): void {
    this.#stack.push(value);
  }

  #peek(): PickleValue<T> {
    const value = this.#stack.at(-1);
    if (value === undefined || value === MARK)
      return this.#fail('takes a value from an empty stack');
    return value;
  }

  #pop(): PickleValue<T> {
    const value = this.#peek();
    this.#stack.pop();
    return value;
  }

  /** In the order in which they were pushed. */
  #popMany(count: number): PickleValue<T>[] {
    return Array.from({ length: count }, () => this.#pop()).reverse();
  }

  #popToMark(): PickleValue<T>[] {
    const at = this.#stack.lastIndexOf(MARK);
    if (at === -1) this.#fail('closes what it never opened');
    this.#markCount -= 1;
    const values = this.#stack.splice(at);
    return values.slice(1) as PickleValue<T>[];
  }

  /** Two's complement, little-endian. */
  #long(bytes: Buffer): number {
    if (bytes.length > 8) this.#fail(`a number of ${bytes.length} bytes`);
    let value = 0n;
    for (let i = bytes.length - 1; i >= 0; i -= 1) value = (value << 8n) | BigInt(bytes[i]!);
    const signed = BigInt.asIntN(8 * bytes.length, value);
    const isSafe = BigInt.asIntN(54, signed) === signed;
    if (!isSafe) this.#fail(`the number ${signed} is too large`);
    return Number(signed);
  }

  #text(byteCount: number): string {
    if (byteCount > MAX_TEXT_BYTES) {
      this.#fail(`a text of ${byteCount} bytes; at most ${MAX_TEXT_BYTES} are read`);
    }
    return this.#take(byteCount).toString('utf8');
  }

  #line(): string {
    const end = this.#bytes.indexOf(0x0a, this.#position);
    if (end === -1 || end - this.#position > MAX_TEXT_BYTES) this.#fail('a name has no end');
    const text = this.#bytes.toString('utf8', this.#position, end);
    this.#position = end + 1;
    return text;
  }

  #take(byteCount: number): Buffer {
    const end = this.#position + byteCount;
    if (end > this.#bytes.length) this.#fail(`ends at byte ${this.#bytes.length}: truncated?`);
    const bytes = this.#bytes.subarray(this.#position, end);
    this.#position = end;
    return bytes;
  }

  #fail(message: string): never {
    throw new CaravanError('invalid_checkpoint', `${this.#rules.name}: the pickle ${message}`);
  }
}

/** Whether a value is of a kind. */
export function isKind<T, K extends 'tuple' | 'list' | 'dictionary' | 'global' | 'made'>(
  value: PickleValue<T> | undefined,
  kind: K,
): value is Extract<PickleValue<T>, { readonly kind: unknown }> & { readonly kind: K } {
  return typeof value === 'object' && value !== null && value.kind === kind;
}
