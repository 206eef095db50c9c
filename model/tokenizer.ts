/**
 * The tokenizer of a checkpoint. `openTokenizer` picks the reader by the files that are there.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import type { PromptPart } from './marked-text.js';
import { parseSentencePieceModel, SentencePieceTokenizer } from './sentencepiece.js';
import { JsonTokenizer } from './tokenizer-json.js';

export interface Tokenizer {
  readonly vocabSize: number;
  readonly bosTokenId: number;
  /** Ids that end an answer. */
  readonly eosTokenIds: readonly number[];
  /** What stands before a text that is to be continued: BOS, or nothing where the model was trained without. */
  readonly prefixTokenIds: readonly number[];
  /** Whether the first word of a text gets a space before it that is not the text's own. */
  readonly addsFirstSpace: boolean;
  /** Ids by spelling of the tokens that only the model's own template may write: <s>, <|im_end|> … */
  readonly controlTokens: ReadonlyMap<string, number>;
  /** Ids of `text`, without BOS or EOS. Control tokens' spellings in the text are plain text. */
  encode(text: string): number[];
  /** Ids of what a template wrote: texts, and ids of control tokens between them. */
  encodeParts(parts: readonly PromptPart[]): number[];
  /** The raw bytes of a token as it stands in the middle of a text; control tokens are empty. */
  tokenBytes(id: number): Uint8Array;
  /** How a person would see the piece, for `caravan tokenize`. */
  pieceOf(id: number): string;
  /** Text of `ids`; control tokens are left out; ill-formed UTF-8 becomes U+FFFD. */
  decode(ids: readonly number[]): string;
}

/** Files of a checkpoint that say how it is tokenized, asked and sampled; whichever are there. */
export const TOKENIZER_FILES: readonly string[] = [
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'chat_template.jinja',
  'chat_template.json',
  'generation_config.json',
  'config.json',
];

const tokenId = z.number().int().nonnegative();
const tokenIds = z.union([tokenId, z.array(tokenId)]).nullish();
const bosFile = z.object({
  add_bos_token: z.boolean().nullish(),
  tokenizer_class: z.string().nullish(),
});

/**
 * Opens tokenizer.model, or tokenizer.json where there is none, or where it adds tokens to those of tokenizer.model,
 * as checkpoints tuned for chats do. EOS ids come from generation_config.json, else config.json, else from the
 * tokenizer itself. BOS stands before texts when tokenizer_config.json's add_bos_token says so; where it does not say,
 * as tokenizer.json's post-processor does it, and for Llama's own tokenizer classes.
 *
 * @param files contents by name, of those in TOKENIZER_FILES that exist.
 * @throws CaravanError `invalid_checkpoint` naming the file and what is wrong with it.
 */
export function openTokenizer(files: ReadonlyMap<string, Uint8Array>): Tokenizer {
  const eosTokenIds = idsOf(files, 'eos_token_id');
  const config = readTokenizerConfig(files);
  const parsedBos = bosFile.safeParse(config);
  if (!parsedBos.success) {
    const issue = parsedBos.error.issues[0];
    throw new CaravanError(
      'invalid_checkpoint',
      `tokenizer_config.json: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? ''}`,
    );
  }
  const { add_bos_token: addsBos, tokenizer_class: tokenizerClass } = parsedBos.data;
  const jsonBytes = files.get('tokenizer.json');
  const json = jsonBytes === undefined ? undefined : readJson(jsonBytes, 'tokenizer.json');
  const model = files.get('tokenizer.model');
  if (model !== undefined) {
    const parsed = parseSentencePieceModel(model, 'tokenizer.model');
    if (json === undefined || !addsTokens(json, parsed.pieces.length)) {
      return new SentencePieceTokenizer(
        parsed,
        eosTokenIds ?? [parsed.eosTokenId],
        addsBos ?? true,
      );
    }
  }
  if (json !== undefined) {
    const isLlamaClass = /^(Code)?LlamaTokenizer(Fast)?$/.test(tokenizerClass ?? '');
    return new JsonTokenizer(json, config, {
      bosTokenId: idsOf(files, 'bos_token_id')?.[0],
      eosTokenIds,
      addsBos: addsBos ?? (isLlamaClass ? true : undefined),
    });
  }
  throw new CaravanError(
    'invalid_checkpoint',
    'the checkpoint has neither tokenizer.model nor tokenizer.json',
  );
}

/** tokenizer_config.json, or an empty object. @throws CaravanError `invalid_checkpoint`. */
export function readTokenizerConfig(
  files: ReadonlyMap<string, Uint8Array>,
): Readonly<Record<string, unknown>> {
  const bytes = files.get('tokenizer_config.json');
  const json = bytes === undefined ? {} : readJson(bytes, 'tokenizer_config.json');
  if (typeof json === 'object' && json !== null && !Array.isArray(json)) {
    return json as Record<string, unknown>;
  }
  throw new CaravanError('invalid_checkpoint', 'tokenizer_config.json: is not a JSON object');
}

/** Whether a tokenizer.json has tokens beyond the first `count`. */
function addsTokens(json: unknown, count: number): boolean {
  const { added_tokens: added } = (json ?? {}) as { added_tokens?: unknown };
  return (
    Array.isArray(added) &&
    added.some((token) => ((token as { id?: unknown } | null)?.id as number) >= count)
  );
}

function idsOf(
  files: ReadonlyMap<string, Uint8Array>,
  key: 'bos_token_id' | 'eos_token_id',
): number[] | undefined {
  for (const name of ['generation_config.json', 'config.json']) {
    const bytes = files.get(name);
    if (bytes === undefined) continue;
    const json = readJson(bytes, name) as Readonly<Record<string, unknown>> | null;
    const { success, data } = tokenIds.safeParse(json?.[key]);
    if (!success) {
      const rule = 'must be the id of a token, or a list of them';
      throw new CaravanError('invalid_checkpoint', `${name}: ${key}: ${rule}`);
    }
    const ids = [data ?? []].flat();
    if (ids.length > 0) return ids;
  }
  return undefined;
}

/** @throws CaravanError `invalid_checkpoint`. */
export function readJson(bytes: Uint8Array, name: string): unknown {
  try {
    return JSON.parse(Buffer.from(bytes).toString('utf8'));
  } catch (cause) {
    throw new CaravanError('invalid_checkpoint', `${name}: is not valid JSON`, { cause });
  }
}
