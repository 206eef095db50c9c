/**
 * The settings of a process: one frozen object, checked whole at start.
 *
 * A value comes from a flag, else from the environment (`--max-seq-len` is CARAVAN_MAX_SEQ_LEN), else from
 * caravan.config.json (`maxSeqLen`), else from the default. A bad one stops the process and says where it
 * came from.
 */
import { readFileSync } from 'node:fs';
import { CaravanError } from '../proto/errors.js';
import type { Setting } from './setting.js';
import { settingTable } from './setting-table.js';

export type SettingName = keyof typeof settingTable;

/** Every setting's type; a setting without a default may be undefined. */
export type Config = {
  readonly [K in SettingName]: (typeof settingTable)[K] extends Setting<infer T, infer D>
    ? T | D
    : never;
};

/** `maxSeqLen` → `--max-seq-len`. */
export const flagOf = (name: string): string =>
  `--${name.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;

/** `maxSeqLen` → `CARAVAN_MAX_SEQ_LEN`. */
export const variableOf = (name: string): string =>
  `CARAVAN_${flagOf(name).slice(2).replaceAll('-', '_').toUpperCase()}`;

/** Settings as a file gives them, unchecked but for their names. */
export interface ConfigFile {
  readonly path: string;
  readonly values: Readonly<Record<string, unknown>>;
}

/**
 * Reads caravan.config.json of the working folder, or the file that CARAVAN_CONFIG names.
 *
 * @returns null where there is none.
 * @throws CaravanError `bad_usage` when it is not a JSON object, or has a key that is no setting.
 */
export function readConfigFile(env: NodeJS.ProcessEnv): ConfigFile | null {
  const named = env['CARAVAN_CONFIG'];
  const path = named ?? 'caravan.config.json';
  let json: string;
  try {
    json = readFileSync(path, 'utf8');
  } catch (cause) {
    if (named === undefined) return null;
    throw new CaravanError('bad_usage', `CARAVAN_CONFIG: ${path} cannot be read`, { cause });
  }
  let values: unknown;
  try {
    values = JSON.parse(json);
  } catch (cause) {
    throw new CaravanError('bad_usage', `${path}: is not valid JSON`, { cause });
  }
  if (typeof values !== 'object' || values === null || Array.isArray(values)) {
    throw new CaravanError('bad_usage', `${path}: must be a JSON object`);
  }
  for (const key of Object.keys(values)) {
    if (!Object.hasOwn(settingTable, key)) {
      throw new CaravanError('bad_usage', `${path}: ${key} is not a setting`);
    }
    if (settingOf(key as SettingName).isFlagOnly === true) {
      throw new CaravanError('bad_usage', `${path}: ${key} can only be given as a flag`);
    }
  }
  return { path, values: values as Record<string, unknown> };
}

/** The table's entry without its own type: what all of them have in common. */
export const settingOf = (name: SettingName): Setting<unknown, unknown> => settingTable[name];

function check(name: SettingName, source: string, value: unknown): unknown {
  const { schema, rule } = settingOf(name);
  const parsed = schema.safeParse(value);
  const shown = typeof value === 'string' ? value : JSON.stringify(value);
  if (!parsed.success) {
    throw new CaravanError('bad_usage', `${source} must be ${rule}, got ${shown}`);
  }
  return parsed.data;
}

export interface ConfigSources {
  /** Flags by setting name, as typed; a flag that was not given is absent. */
  readonly flags: Readonly<Record<string, unknown>>;
  readonly env: NodeJS.ProcessEnv;
  readonly file: ConfigFile | null;
}

/**
 * Checks the named settings of all sources, and their relations.
 *
 * @param defaults Take the place of the table's defaults.
 * @throws CaravanError `bad_usage` naming the flag, the variable, or the file and its key.
 */
export function resolveConfig<K extends SettingName>(
  names: readonly K[],
  sources: ConfigSources,
  defaults: Partial<Config> = {},
): Readonly<Pick<Config, K>> {
  const config: Record<string, unknown> = {};
  const sourceOf: Record<string, string> = {};
  for (const name of names) {
    const { isFlagOnly, default: tableDefault } = settingOf(name);
    const flag = sources.flags[name];
    const variable = isFlagOnly === true ? undefined : sources.env[variableOf(name)];
    const keyed = isFlagOnly === true ? undefined : sources.file?.values[name];
    if (flag !== undefined) {
      sourceOf[name] = flagOf(name);
      config[name] = check(name, flagOf(name), flag);
    } else if (variable !== undefined && variable !== '') {
      sourceOf[name] = variableOf(name);
      config[name] = check(name, variableOf(name), variable);
    } else if (keyed !== undefined) {
      sourceOf[name] = `${sources.file?.path ?? ''}: ${name}`;
      config[name] = check(name, sourceOf[name], keyed);
    } else {
      config[name] = defaults[name] ?? tableDefault;
    }
  }
  checkRelations(sourceOf, config);
  return Object.freeze(config) as Readonly<Pick<Config, K>>;
}

/** Pairs that contradict each other when both are given. */
const exclusive: readonly (readonly [SettingName, SettingName, string])[] = [
  ['prompt', 'chat', 'give a text to continue or messages to answer'],
  ['redis', 'stateDir', 'only a private Redis has a state folder'],
];

function checkRelations(
  sourceOf: Readonly<Record<string, string>>,
  config: Readonly<Record<string, unknown>>,
): void {
  for (const [first, second, reason] of exclusive) {
    const [one, other] = [sourceOf[first], sourceOf[second]];
    if (one !== undefined && other !== undefined) {
      throw new CaravanError('bad_usage', `${one} and ${other} exclude each other: ${reason}`);
    }
  }
  const { ranks, tp } = config;
  if (Array.isArray(ranks) && sourceOf['tp'] !== undefined && ranks.length !== tp) {
    throw new CaravanError(
      'bad_usage',
      `${sourceOf['tp']} is ${String(tp)}, but ${sourceOf['ranks'] ?? '--ranks'} names ${ranks.length}`,
    );
  }
}
