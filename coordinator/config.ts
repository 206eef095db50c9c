/**
 * The settings of a process: one frozen object, checked whole at start.
 *
 * A value comes from a flag, else from the environment (`--max-seq-len` is CARAVAN_MAX_SEQ_LEN), else from
 * caravan.config.json (`maxSeqLen`), else from the default. A bad one stops the process and says where it
 * came from.
 */
import { readFileSync } from 'node:fs';
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { EMBEDDED_MODEL } from './package-root.js';

interface SettingRule<T> {
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
  /** Why a legal value cannot be used in this release, or null. */
  readonly refuse?: (value: T) => string | null;
}

interface Setting<T, D extends T | undefined> extends SettingRule<T> {
  readonly default: D;
}

const optional = <T>(rule: SettingRule<T>): Setting<T, undefined> => ({
  ...rule,
  default: undefined,
});
const defaulted = <T>(value: T, rule: SettingRule<T>): Setting<T, T> => ({
  ...rule,
  default: value,
});

// Flags and variables are text, the file has numbers: only text that is a number becomes one.
const fromText = (value: unknown): unknown =>
  typeof value === 'string' && /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i.test(value)
    ? Number(value)
    : value;
const number = (least: number, most: number): z.ZodType<number> =>
  z.preprocess(fromText, z.number().min(least).max(most));
const whole = (least: number, most: number): z.ZodType<number> =>
  z.preprocess(fromText, z.number().int().min(least).max(most));

const switchWords: Readonly<Record<string, boolean>> = {
  true: true,
  '1': true,
  false: false,
  '0': false,
};
const onOff = z.preprocess(
  (value) => (typeof value === 'string' ? (switchWords[value] ?? value) : value),
  z.boolean(),
);
const onOffRule = 'true or false';

const text = z.string().min(1);
const address = /^(\[[0-9a-fA-F:]+\]|[^\s:,[\]]+):([0-9]{1,5})$/;
const addresses = z.preprocess(
  (value) => (typeof value === 'string' ? value.split(',') : value),
  z.array(z.string().regex(address)).min(1).max(256),
);
const redisUrl = z.string().regex(/^(rediss?:\/\/\S+|unix:\/\/\S+)$/);

/** Every setting that more than one command or process shares. */
export const settingTable = {
  model: defaulted(EMBEDDED_MODEL, {
    argument: '<model>',
    description: 'folder of the checkpoint, hf:ORG/NAME, or caravan-tiny',
    rule: 'a folder or hf:ORG/NAME',
    schema: text,
  }),
  servedModelName: optional({
    argument: '<name>',
    description: "name that requests use (default: the folder's name)",
    rule: 'a name of letters, digits and . _ - /',
    schema: z.string().regex(/^[\w.\-/]{1,128}$/),
  }),
  tp: defaulted(1, {
    argument: '<n>',
    description: 'ranks to cut the model into',
    rule: 'a whole number from 1 to 256',
    schema: whole(1, 256),
  }),
  device: defaulted('cpu', {
    argument: '<device>',
    description: 'device of a rank: cpu (webgpu and cuda are not built yet)',
    rule: 'one of cpu, webgpu, cuda',
    schema: z.enum(['cpu', 'webgpu', 'cuda']),
    refuse: (value) => (value === 'cpu' ? null : 'is not built yet; use cpu'),
  }),
  weights: defaulted('auto', {
    argument: '<mode>',
    description: 'how weights are held; auto takes the fastest that fits into memory',
    rule: 'one of auto, fp32, fp16, int8, int4, int4+int8',
    schema: z.enum(['auto', 'fp32', 'fp16', 'int8', 'int4', 'int4+int8']),
    refuse: (value) => (value === 'fp16' ? 'is for GPUs, which are not built yet' : null),
  }),
  exact: defaulted(false, {
    argument: null,
    description: 'same request, same tokens, bit for bit, whatever else runs',
    rule: onOffRule,
    schema: onOff,
  }),
  transport: defaulted('auto', {
    argument: '<transport>',
    description: 'how ranks exchange partials: shm between those of one host, grpc, or auto',
    rule: 'one of auto, grpc, shm',
    schema: z.enum(['auto', 'grpc', 'shm']),
  }),
  maxSeqLen: optional({
    argument: '<n>',
    description: "positions of a slot, prompt and answer together (default: the model's context)",
    rule: 'a whole number from 2 to 1048576',
    schema: whole(2, 1_048_576),
  }),
  maxBatchSize: defaulted(16, {
    argument: '<n>',
    description: 'slots: sequences that run at once',
    rule: 'a whole number from 1 to 1024',
    schema: whole(1, 1024),
  }),
  host: defaulted('127.0.0.1', {
    argument: '<host>',
    description: 'address that the gateway listens on',
    rule: 'a host name or an IP address',
    schema: z.string().regex(/^[\w.:-]+$/),
  }),
  port: defaulted(8080, {
    argument: '<port>',
    description: 'port that the gateway listens on; 0 takes a free one',
    rule: 'a whole number from 0 to 65535',
    schema: whole(0, 65_535),
  }),
  redis: optional({
    argument: '<url>',
    description: 'Redis to use, redis://HOST:PORT',
    rule: 'a redis://, rediss:// or unix:// URL',
    schema: redisUrl,
  }),
  ranks: optional({
    argument: '<addresses>',
    description: 'addresses of the ranks in rank order, HOST:PORT,HOST:PORT,…',
    rule: 'HOST:PORT,HOST:PORT,…',
    schema: addresses,
  }),
  stateDir: optional({
    argument: '<folder>',
    description: "where the private Redis keeps its jobs (default: the user's data folder)",
    rule: 'a folder',
    schema: text,
  }),
  logLevel: defaulted('info', {
    argument: '<level>',
    description: 'least level of log lines on stderr: debug, info, warn, error or silent',
    rule: 'one of debug, info, warn, error, silent',
    schema: z.enum(['debug', 'info', 'warn', 'error', 'silent']),
  }),
  json: defaulted(false, {
    argument: null,
    description: 'print JSON on stdout',
    rule: onOffRule,
    schema: onOff,
    isFlagOnly: true,
  }),
  prompt: optional({
    argument: '<text>',
    description: 'text to continue',
    rule: 'a text',
    schema: z.string(),
    isFlagOnly: true,
  }),
  chat: optional({
    argument: '<file>',
    description: 'JSON file of messages, [{"role", "content"}, …], to answer',
    rule: 'a file',
    schema: text,
    isFlagOnly: true,
  }),
  maxTokens: optional({
    argument: '<n>',
    description: 'most tokens to generate (default: what the context leaves)',
    rule: 'a whole number from 1 to 1048576',
    schema: whole(1, 1_048_576),
  }),
  temperature: optional({
    argument: '<t>',
    description: '0 takes the most likely token, higher is more varied',
    rule: 'a number from 0 to 2',
    schema: number(0, 2),
  }),
  topP: optional({
    argument: '<p>',
    description: 'draw from the most likely tokens whose probabilities reach this sum',
    rule: 'a number above 0 and up to 1',
    schema: z.preprocess(fromText, z.number().gt(0).max(1)),
  }),
  topK: optional({
    argument: '<k>',
    description: 'draw from the k most likely tokens; 0 keeps all',
    rule: 'a whole number from 0 to 1048576',
    schema: whole(0, 1_048_576),
  }),
  seed: optional({
    argument: '<n>',
    description: 'the same seed draws the same coins (default: drawn, and kept with the job)',
    rule: 'a whole number from 0 to 9007199254740991',
    schema: whole(0, Number.MAX_SAFE_INTEGER),
  }),
  stop: optional({
    argument: '<text>',
    description: 'text that ends the answer; may be given up to 16 times',
    rule: 'up to 16 texts, none empty',
    schema: z.array(text).max(16),
    isRepeatable: true,
    isFlagOnly: true,
  }),
  ignoreEos: defaulted(false, {
    argument: null,
    description: "do not stop at the model's end-of-sequence token",
    rule: onOffRule,
    schema: onOff,
    isFlagOnly: true,
  }),
  priority: optional({
    argument: '<n>',
    description: '1 is the most urgent, 1000 the least (default: 100)',
    rule: 'a whole number from 1 to 1000',
    schema: whole(1, 1000),
  }),
  deadline: optional({
    argument: '<seconds>',
    description: 'seconds from now after which the job expires',
    rule: 'a number of seconds above 0 and up to 31536000',
    schema: z.preprocess(fromText, z.number().gt(0).max(31_536_000)),
    isFlagOnly: true,
  }),
} as const;

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
export const settingOf = (name: SettingName): Setting<unknown, unknown> =>
  settingTable[name] as unknown as Setting<unknown, unknown>;

function check(name: SettingName, source: string, value: unknown): unknown {
  const { schema, rule, refuse } = settingOf(name);
  const parsed = schema.safeParse(value);
  const shown = typeof value === 'string' ? value : JSON.stringify(value);
  if (!parsed.success) {
    throw new CaravanError('bad_usage', `${source} must be ${rule}, got ${shown}`);
  }
  const refusal = refuse?.(parsed.data) ?? null;
  if (refusal !== null) throw new CaravanError('bad_usage', `${source} ${shown} ${refusal}`);
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
