/**
 * The flags that commands share. A command names the settings it takes, once:
 *
 *     const settings = declareSettings(command, ['model', 'tp', 'json'], { defaults: { tp: 2 } });
 *     command.action(async () => {
 *       const { model, tp, json } = settings();
 *
 * and its own flags with `.option(flags, description, checked(schema, rule))`.
 */
import { type Command, InvalidArgumentError, Option } from 'commander';
import type { z } from 'zod';
import {
  type Config,
  flagOf,
  readConfigFile,
  resolveConfig,
  type SettingName,
  settingOf,
} from '../config.js';
import { CaravanError } from '../../proto/errors.js';

/** The named settings; those that are required are never undefined. */
export type Settings<K extends SettingName, R extends SettingName> = Readonly<{
  [P in K]: P extends R ? NonNullable<Config[P]> : Config[P];
}>;

interface Declaration<R> {
  /** Settings that must come from somewhere. */
  readonly required?: readonly R[];
  /** Take the place of the table's defaults for this command. */
  readonly defaults?: Partial<Config>;
}

function optionOf(name: SettingName, defaults: Partial<Config>): Option {
  const { argument, description, isRepeatable, default: tableDefault } = settingOf(name);
  const value = defaults[name] ?? tableDefault;
  // A default given to commander could not be told from a flag, which must win over the environment.
  const shown =
    argument === null || value === undefined
      ? ''
      : ` (default: ${JSON.stringify(value).replaceAll('"', '')})`;
  const flags = argument === null ? flagOf(name) : `${flagOf(name)} ${argument}`;
  const option = new Option(flags, `${description}${shown}`);
  if (isRepeatable === true) {
    option.argParser((one: string, before: readonly string[] | undefined) => [
      ...(before ?? []),
      one,
    ]);
  }
  return option;
}

/**
 * Adds the flags of the named settings to a command.
 *
 * @returns Reads and checks them, when called within the command's action.
 * @throws CaravanError `bad_usage` (the returned function) naming the flag, variable or file key.
 */
export function declareSettings<K extends SettingName, R extends K = never>(
  command: Command,
  names: readonly K[],
  { required = [], defaults = {} }: Declaration<R> = {},
): () => Settings<K, R> {
  for (const name of names) command.addOption(optionOf(name, defaults));
  return () => {
    const config = resolveConfig(
      names,
      {
        flags: command.opts<Record<string, unknown>>(),
        env: process.env,
        file: readConfigFile(process.env),
      },
      defaults,
    );
    for (const name of required) {
      if (config[name] === undefined) {
        throw new CaravanError('bad_usage', `${flagOf(name)} is required`);
      }
    }
    return config as Settings<K, R>;
  };
}

/**
 * A parser for a command's own flag.
 *
 * @param rule The rule in words: "a whole number from 1".
 * @throws InvalidArgumentError (the returned function), which the command line prints in one line.
 */
export function checked<T>(schema: z.ZodType<T>, rule: string): (value: string) => T {
  return (value) => {
    const parsed = schema.safeParse(value);
    if (!parsed.success) throw new InvalidArgumentError(`It must be ${rule}.`);
    return parsed.data;
  };
}
