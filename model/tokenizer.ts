/**
 * The tokenizer of a checkpoint. `openTokenizer` picks the reader by the files that are there.
 */
import { z } from 'zod';
import { CaravanError } from '../proto/errors.js';
import { parseSentencePieceModel, SentencePieceTokenizer } from './sentencepiece.js';
import { JsonTokenizer } from './tokenizer-json.js';

export interface Tokenizer {
  readonly vocabSize: number;
  readonly bosTokenId: number;
  /** Ids that end an answer. */
  readonly eosTokenIds: readonly number[];
  /** Ids of `text`, without BOS or EOS. Special tokens' spellings in the text are plain text. */
  encode(text: string): number[];
  /** The raw bytes of a token as it stands in the middle of a text; control tokens are empty. */
  tokenBytes(id: number): Uint8Array;
  /** How a person would see the piece, for `caravan tokenize`. */
  pieceOf(id: number): string;
  /** Text of `ids`; control tokens are left out; ill-formed UTF-8 becomes U+FFFD. */
  decode(ids: readonly number[]): string;
}

/** Files of a checkpoint that say how it is tokenized; whichever are there. */
export const TOKENIZER_FILES: readonly string[] = [
  'tokenizer.model',
  'tokenizer.json',
  'tokenizer_config.json',
  'generation_config.json',
  'config.json',
];

const tokenIds = z.union([z.number().int(), z.array(z.number().int())]).nullish();
const idFile = z.object({ bos_token_id: tokenIds, eos_token_id: tokenIds });

/**
 * Opens tokenizer.model, or tokenizer.json where there is none. EOS ids come from
 * generation_config.json, else config.json, else from the tokenizer itself.
 *
 * @param files contents by name, of those in TOKENIZER_FILES that exist.
 * @throws CaravanError `invalid_checkpoint` naming the file and what is wrong with it.
 */
export function openTokenizer(files: ReadonlyMap<string, Uint8Array>): Tokenizer {
  const eosTokenIds = idsOf(files, 'eos_token_id');
  const model = files.get('tokenizer.model');
  if (model !== undefined) {
    const parsed = parseSentencePieceModel(model, 'tokenizer.model');
    return new SentencePieceTokenizer(parsed, eosTokenIds ?? [parsed.eosTokenId]);
  }
  const json = files.get('tokenizer.json');
  if (json !== undefined) {
    return new JsonTokenizer(
      readJson(json, 'tokenizer.json'),
      files.has('tokenizer_config.json')
        ? readJson(files.get('tokenizer_config.json')!, 'tokenizer_config.json')
        : {},
      { bosTokenId: idsOf(files, 'bos_token_id')?.[0], eosTokenIds },
    );
  }
  throw new CaravanError(
    'invalid_checkpoint',
    'the checkpoint has neither tokenizer.model nor tokenizer.json',
  );
}

function idsOf(
  files: ReadonlyMap<string, Uint8Array>,
  key: 'bos_token_id' | 'eos_token_id',
): number[] | undefined {
  for (const name of ['generation_config.json', 'config.json']) {
    const bytes = files.get(name);
    if (bytes === undefined) continue;
    const parsed = idFile.safeParse(readJson(bytes, name));
    const ids = parsed.data?.[key];
    if (ids != null) return Array.isArray(ids) ? ids : [ids];
  }
  return undefined;
}

function readJson(bytes: Uint8Array, name: string): unknown {
  try {
    return JSON.parse(Buffer.from(bytes).toString('utf8'));
  } catch (cause) {
    throw new CaravanError('invalid_checkpoint', `${name}: is not valid JSON`, { cause });
  }
}
