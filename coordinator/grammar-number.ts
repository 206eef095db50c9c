/**
 * Numbers as JSON spells them, in an interval and in steps: an automaton over decimal digits that compares with the bounds
 * digit by digit, so that what it lets through is within them exactly.
 *
 * Up to 15 digits stand before the point and as many significant ones in all where an interval is asked for: within that
 * a double keeps every decimal apart, so that what is below a bound as text is below it as a number.
 */
import { CaravanError } from '../proto/errors.js';
import type { NfaBuilder } from './grammar-nfa.js';

const MAX_DIGITS = 15;
const MAX_EXPONENT_DIGITS = 2;
const MAX_MULTIPLE = 1000;

export interface NumberRule {
  readonly isInteger: boolean;
  readonly low: Bound | null;
  readonly high: Bound | null;
  readonly multipleOf: readonly number[];
}

export interface Bound {
  readonly value: number;
  readonly isExclusive: boolean;
}

/** A finite number as sign, digits before the point (no leading zeros; none for zero) and digits after it. */
interface Decimal {
  readonly isNegative: boolean;
  readonly whole: string;
  readonly fraction: string;
}

const refuse = (message: string): never => {
  throw new CaravanError('invalid_request', message);
};

function decimalOf(value: number): Decimal {
  const match = /^(-?)(\d+)(?:\.(\d+))?(?:e([+-]\d+))?$/.exec(String(value));
  if (match === null) return refuse(`${value} is no bound for a number`);
  const exponent = Number(match[4] ?? 0);
  if (Math.abs(exponent) > 40) refuse(`${value} is too large or too small a bound`);
  let digits = match[2]! + (match[3] ?? '');
  let point = match[2]!.length + exponent;
  if (point < 0) {
    digits = '0'.repeat(-point) + digits;
    point = 0;
  }
  digits = digits.padEnd(point, '0');
  return {
    isNegative: match[1] === '-' && value !== 0,
    whole: digits.slice(0, point).replace(/^0+/, ''),
    fraction: digits.slice(point).replace(/0+$/, ''),
  };
}

/** Writes the numbers of a rule between two states. */
export function writeNumber(builder: NfaBuilder, from: number, to: number, rule: NumberRule): void {
  const { isInteger, low, high, multipleOf } = rule;
  if (low === null && high === null && multipleOf.length === 0) {
    writeAny(builder, from, to, isInteger);
    return;
  }
  const step = stepOf(multipleOf);
  const writer = new MagnitudeWriter(builder, to, isInteger ? 0 : null, step);
  const lower = low && decimalOf(low.value);
  const upper = high && decimalOf(high.value);
  // Not negative.
  if (!upper?.isNegative) {
    const isLowBelow = lower === null || lower.isNegative;
    writer.write(from, isLowBelow ? null : edgeOf(lower, low), upper && edgeOf(upper, high));
  }
  // Negative: the bounds change places. Zero has one spelling.
  const isBelowZero = lower === null || lower.isNegative;
  if (isBelowZero) {
    const minus = builder.state();
    builder.bytes(from, 0x2d, 0x2d, minus);
    const zero = { whole: '', fraction: '', isExclusive: true };
    const nearest = upper?.isNegative ? edgeOf(upper, high) : zero;
    writer.write(minus, nearest, lower && edgeOf(lower, low));
  }
}

interface Edge {
  readonly whole: string;
  readonly fraction: string;
  readonly isExclusive: boolean;
}

const edgeOf = ({ whole, fraction }: Decimal, bound: Bound | null): Edge => ({
  whole,
  fraction,
  isExclusive: bound?.isExclusive ?? false,
});

/** A step as `multiple` × 10^-`places`. */
interface Step {
  readonly multiple: number;
  readonly places: number;
}

function stepOf(multipleOf: readonly number[]): Step | null {
  if (multipleOf.length === 0) return null;
  const decimals = multipleOf.map(decimalOf);
  const places = Math.max(...decimals.map(({ fraction }) => fraction.length));
  const whole = decimals.map(({ whole, fraction }) => Number(whole + fraction.padEnd(places, '0')));
  const gcd = (a: number, b: number): number => (b === 0 ? a : gcd(b, a % b));
  const multiple = whole.reduce((a, b) => (a / gcd(a, b)) * b);
  if (!(multiple <= MAX_MULTIPLE) || places > MAX_DIGITS) {
    refuse(
      `multipleOf ${multipleOf.join(' and ')}: must have at most ${MAX_MULTIPLE} as its digits`,
    );
  }
  return { multiple, places };
}

function writeAny(builder: NfaBuilder, from: number, to: number, isInteger: boolean): void {
  const digits = (start: number, count: number, end: number): void => {
    let at = start;
    for (let i = 0; i < count; i += 1) {
      const next = builder.state();
      builder.bytes(at, 0x30, 0x39, next);
      builder.epsilon(next, end);
      at = next;
    }
  };
  const first = builder.state();
  builder.epsilon(from, first);
  builder.bytes(from, 0x2d, 0x2d, first);
  const whole = builder.state();
  builder.bytes(first, 0x30, 0x30, whole);
  const leading = builder.state();
  builder.bytes(first, 0x31, 0x39, leading);
  builder.epsilon(leading, whole);
  digits(leading, MAX_DIGITS - 1, whole);
  builder.epsilon(whole, to);
  if (isInteger) return;
  const point = builder.state();
  const fraction = builder.state();
  builder.bytes(whole, 0x2e, 0x2e, point);
  digits(point, MAX_DIGITS, fraction);
  builder.epsilon(fraction, to);
  const exponent = builder.state();
  const signed = builder.state();
  for (const at of [whole, fraction]) {
    builder.bytes(at, 0x45, 0x45, exponent);
    builder.bytes(at, 0x65, 0x65, exponent);
  }
  builder.epsilon(exponent, signed);
  builder.bytes(exponent, 0x2b, 0x2b, signed);
  builder.bytes(exponent, 0x2d, 0x2d, signed);
  digits(signed, MAX_EXPONENT_DIGITS, to);
}

/** Where a number under way stands: how many digits are there, and whether they are still those of a bound. */
interface Progress {
  /** Digits before the point, and after it; -1 where the point has not come. */
  readonly whole: number;
  readonly fraction: number;
  readonly isLow: boolean;
  readonly isHigh: boolean;
  /** Nothing but a point may follow a leading zero. */
  readonly isZero: boolean;
  readonly remainder: number;
}

/** What the numbers of one automaton have in common. */
interface Context {
  /** Digits before the point; different only where no bound has as many. */
  readonly least: number;
  readonly most: number;
  readonly low: Edge | null;
  readonly high: Edge | null;
  /** The bounds' digits without their points. */
  readonly lows: string;
  readonly highs: string;
  /** Most digits after the point, given those before it. */
  readonly places: (whole: number) => number;
}

class MagnitudeWriter {
  readonly #builder: NfaBuilder;
  readonly #to: number;
  readonly #maxFraction: number | null;
  readonly #step: Step | null;

  /** @param maxFraction digits after the point; null for as many as stay exact. */
  constructor(builder: NfaBuilder, to: number, maxFraction: number | null, step: Step | null) {
    this.#builder = builder;
    this.#to = to;
    this.#maxFraction =
      step === null ? maxFraction : Math.min(maxFraction ?? Infinity, step.places);
    this.#step = step;
  }

  /** Writes all magnitudes from `low` to `high`, those with as many digits as a bound apart from the others. */
  write(from: number, low: Edge | null, high: Edge | null): void {
    const lengthOf = (edge: Edge | null): number | null => edge && Math.max(1, edge.whole.length);
    const [lowest, highest] = [lengthOf(low), lengthOf(high)];
    if ((lowest ?? 0) > MAX_DIGITS) {
      refuse(`a bound of a number has more than ${MAX_DIGITS} digits before the point`);
    }
    const bounded = [lowest, highest].filter((length) => length !== null && length <= MAX_DIGITS);
    for (const length of new Set(bounded as number[])) {
      if (length < (lowest ?? 1) || length > (highest ?? MAX_DIGITS)) continue;
      const own = (edge: Edge | null): Edge | null => (lengthOf(edge) === length ? edge : null);
      this.#writeLengths(from, length, length, own(low), own(high));
    }
    const least = lowest === null ? 1 : lowest + 1;
    const most = highest === null ? MAX_DIGITS : Math.min(MAX_DIGITS, highest - 1);
    if (least <= most) this.#writeLengths(from, least, most, null, null);
  }

  #writeLengths(
    from: number,
    least: number,
    most: number,
    low: Edge | null,
    high: Edge | null,
  ): void {
    const given = Math.max(low?.fraction.length ?? 0, high?.fraction.length ?? 0);
    const isOpen = low?.isExclusive === true || high?.isExclusive === true;
    const spelled = (edge: Edge | null): string =>
      edge === null ? '' : edge.whole.padStart(least, '0') + edge.fraction;
    const context: Context = {
      ...{ least, most, low, high, lows: spelled(low), highs: spelled(high) },
      places: (whole) => {
        const exact = MAX_DIGITS - whole;
        return this.#maxFraction ?? (isOpen ? exact : Math.max(exact, given));
      },
    };
    const known = new Map<string, number>();
    const first = { whole: 0, fraction: -1, isZero: false, remainder: 0 };
    const queue: [Progress, number][] = [
      [{ ...first, isLow: low !== null, isHigh: high !== null }, from],
    ];
    const visit = (next: Progress): number => {
      const name = Object.values(next).join();
      let state = known.get(name);
      if (state === undefined) {
        state = this.#builder.state();
        known.set(name, state);
        queue.push([next, state]);
      }
      return state;
    };
    for (let item = queue.pop(); item !== undefined; item = queue.pop()) {
      const [progress, state] = item;
      const { whole, fraction, isZero } = progress;
      if (this.#mayEnd(progress, context)) this.#builder.epsilon(state, this.#to);
      if (fraction === -1 && whole >= least && context.places(whole) > 0) {
        this.#builder.bytes(state, 0x2e, 0x2e, visit({ ...progress, fraction: 0 }));
      }
      const isFull =
        fraction === -1 ? whole === most || isZero : fraction === context.places(whole);
      if (isFull) continue;
      const leastDigit = fraction === -1 && whole === 0 && least > 1 ? 1 : 0;
      for (let digit = leastDigit; digit <= 9; digit += 1) {
        const next = this.#after(progress, digit, context);
        if (next !== null) this.#builder.bytes(state, 0x30 + digit, 0x30 + digit, visit(next));
      }
    }
  }

  #after(progress: Progress, digit: number, { lows, highs }: Context): Progress | null {
    const { whole, fraction, isLow, isHigh, remainder } = progress;
    const digits = whole + Math.max(0, fraction);
    const low = Number(lows[digits] ?? 0);
    const high = Number(highs[digits] ?? 0);
    if ((isLow && digit < low) || (isHigh && digit > high)) return null;
    return {
      whole: fraction === -1 ? whole + 1 : whole,
      fraction: fraction === -1 ? -1 : fraction + 1,
      isLow: isLow && digit === low,
      isHigh: isHigh && digit === high,
      isZero: fraction === -1 && whole === 0 && digit === 0,
      remainder: this.#step === null ? 0 : (remainder * 10 + digit) % this.#step.multiple,
    };
  }

  /** Whether the digits so far, with zeros after them, are a number of the rule. */
  #mayEnd(progress: Progress, { least, low, high, lows, highs }: Context): boolean {
    const { whole, fraction, isLow, isHigh, remainder } = progress;
    if (whole < least || fraction === 0) return false;
    const digits = whole + Math.max(0, fraction);
    // Only zeros follow: the rest of a bound decides where all digits so far are the bound's.
    const restOf = (text: string): boolean => /[1-9]/.test(text.slice(digits));
    if (isLow && (restOf(lows) || low?.isExclusive === true)) return false;
    if (isHigh && high?.isExclusive === true && !restOf(highs)) return false;
    if (this.#step === null) return true;
    const missing = this.#step.places - Math.max(0, fraction);
    const { multiple } = this.#step;
    return (remainder * Number(10n ** BigInt(missing) % BigInt(multiple))) % multiple === 0;
  }
}
