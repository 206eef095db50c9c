/** What a setting is, and the kinds of values that settings have. */
import { z } from 'zod';

export interface SettingRule<T> {
  /** Placeholder of the flag's value in help texts; null for a switch, which is on or off. */
  readonly argument: string | null;
  readonly description: string;
  /** The rule in words, to end the sentence "--flag must be …". */
  readonly rule: string;
  readonly schema: z.ZodType<T>;
  /** Given once per value: the setting is a list. */
  readonly isRepeatable?: boolean;
  /** Belongs to one call, so that neither the environment nor the file may set it. */
  readonly isFlagOnly?: boolean;
}

export interface Setting<T, D extends T | undefined> extends SettingRule<T> {
  readonly default: D;
}

export const optional = <T>(rule: SettingRule<T>): Setting<T, undefined> => ({
  ...rule,
  default: undefined,
});
export const defaulted = <T>(value: T, rule: SettingRule<T>): Setting<T, T> => ({
  ...rule,
  default: value,
});

// Flags and variables are text, the file has numbers: only text that is a number becomes one.
export const fromText = (value: unknown): unknown =>
  typeof value === 'string' && /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(value)
    ? Number(value)
    : value;
export const number = (least: number, most: number): z.ZodType<number> =>
  z.preprocess(fromText, z.number().min(least).max(most));
export const whole = (least: number, most: number): z.ZodType<number> =>
  z.preprocess(fromText, z.number().int().min(least).max(most));

const switchWords: Readonly<Record<string, boolean>> = {
  true: true,
  '1': true,
  false: false,
  '0': false,
};
export const onOff = z.preprocess(
  (value) => (typeof value === 'string' ? (switchWords[value] ?? value) : value),
  z.boolean(),
);
export const onOffRule = 'true or false';

export const text = z.string().min(1);
export const address = /^(\[[0-9a-fA-F:]+\]|[^\s:,[\]]+):([0-9]{1,5})$/;
export const addresses = z.preprocess(
  (value) => (typeof value === 'string' ? value.split(',') : value),
  z.array(z.string().regex(address)).min(1).max(256),
);
export const redisUrl = z.string().regex(/^(rediss?(\+sentinel)?:\/\/\S+|unix:\/\/\S+)$/);

const byteUnits = ['', 'k', 'm', 'g', 't'];
/** `500MB`, `1.5 GB` or a number of bytes. */
export const byteCount = (least: number, most: number): z.ZodType<number> =>
  z.preprocess((value) => {
    const [, figure, unit] =
      typeof value === 'string' ? (/^(\d+\.?\d*|\.\d+) ?([kmgt]?)b?$/i.exec(value) ?? []) : [];
    if (figure === undefined) return value;
    return Math.floor(Number(figure) * 1000 ** byteUnits.indexOf(unit!.toLowerCase()));
  }, z.number().int().min(least).max(most));
