/** The metadata of a GGUF file, by key: each reader says what it needs. */
import { CaravanError } from '../proto/errors.js';
import { quoted } from './quoted.js';

export type GgufNumbers =
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array
  | BigUint64Array
  | BigInt64Array;

export type GgufValue = number | boolean | string | GgufNumbers | readonly GgufValue[];

/** Readers return undefined where the key is not there, and throw CaravanError `invalid_checkpoint` naming it. */
export class GgufMetadata {
  readonly #fileName: string;
  readonly #values: ReadonlyMap<string, GgufValue>;

  constructor(fileName: string, values: ReadonlyMap<string, GgufValue>) {
    this.#fileName = fileName;
    this.#values = values;
  }

  has(key: string): boolean {
    return this.#values.has(key);
  }

  /** A whole number from 0 on. */
  natural(key: string): number | undefined {
    return this.#read(key, 'a whole number from 0 on', (value) =>
      typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 ? value : undefined,
    );
  }

  /** A finite number. */
  number(key: string): number | undefined {
    return this.#read(key, 'a finite number', (value) =>
      typeof value === 'number' && Number.isFinite(value) ? value : undefined,
    );
  }

  flag(key: string): boolean | undefined {
    return this.#read(key, 'true or false', (value) =>
      typeof value === 'boolean' ? value : undefined,
    );
  }

  text(key: string): string | undefined {
    return this.#read(key, 'a text', (value) => (typeof value === 'string' ? value : undefined));
  }

  texts(key: string): readonly string[] | undefined {
    return this.#read(key, 'a list of texts', (value) =>
      Array.isArray(value) && value.every((one) => typeof one === 'string') ? value : undefined,
    );
  }

  numbers(key: string): GgufNumbers | undefined {
    return this.#read(key, 'a list of numbers', (value) =>
      ArrayBuffer.isView(value) ? value : undefined,
    );
  }

  /** What is true of every layer: one number, or a list of equal ones. */
  perLayer(key: string): number | undefined {
    const value = this.#values.get(key);
    if (!ArrayBuffer.isView(value)) return this.natural(key);
    const numbers = [...new Set(Array.from(value, Number))];
    if (numbers.length !== 1) {
      throw new CaravanError(
        'unsupported_model',
        `${this.#fileName}: ${key} differs between layers; Caravan runs models of equal layers`,
      );
    }
    return numbers[0];
  }

  /** @throws CaravanError `invalid_checkpoint`. */
  need<T>(key: string, value: T | undefined): T {
    return value ?? this.damaged(key, 'is missing');
  }

  /** @throws CaravanError `invalid_checkpoint`, always. */
  damaged(key: string, message: string): never {
    throw new CaravanError('invalid_checkpoint', `${this.#fileName}: ${key}: ${message}`);
  }

  /** @throws CaravanError `unsupported_model`, always. */
  unsupported(key: string, value: unknown, supported: string): never {
    const shown = typeof value === 'string' ? quoted(value) : JSON.stringify(value).slice(0, 100);
    throw new CaravanError(
      'unsupported_model',
      `${this.#fileName}: ${key} is ${shown}; Caravan runs ${supported}`,
    );
  }

  #read<T>(key: string, rule: string, take: (value: GgufValue) => T | undefined): T | undefined {
    const value = this.#values.get(key);
    if (value === undefined) return undefined;
    return take(value) ?? this.damaged(key, `must be ${rule}`);
  }
}
