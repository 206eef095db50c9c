/** `caravan tokenize`: text to ids and pieces, and back. */
import fs from 'node:fs';
import type { Command } from 'commander';
import { z } from 'zod';
import type { Tokenizer } from '../../model/tokenizer.js';
import { CaravanError } from '../../proto/errors.js';
import { openModelTokenizer } from '../model-tokenizer.js';
import { declareSettings } from './options.js';

const texts = z.array(z.string());

interface OwnOptions {
  readonly decode?: true;
  readonly file?: string;
  readonly bos?: true;
}

export function register(program: Command): void {
  const command = program
    .command('tokenize')
    .description('Turns texts into token ids and pieces, or ids back into text.')
    .argument('[text...]', 'texts; with --decode, ids')
    .option('--decode', 'the arguments are ids: print their text')
    .option('--file <file>', 'JSON file with an array of texts: prints an array of arrays of ids')
    .option('--bos', 'put BOS before every text');
  const settings = declareSettings(command, ['model', 'json']);
  command.action((args: string[]) => {
    const { model, json } = settings();
    const own = command.opts<OwnOptions>();
    const tokenizer = openModelTokenizer(model);
    process.stdout.write(`${outputOf(tokenizer, args, own, json)}\n`);
  });
}

function outputOf(
  tokenizer: Tokenizer,
  args: readonly string[],
  { decode, file, bos }: OwnOptions,
  json: boolean,
): string {
  const encode = (text: string): number[] => [
    ...(bos === true ? [tokenizer.bosTokenId] : []),
    ...tokenizer.encode(text),
  ];
  if (decode === true) {
    const ids = args.flatMap((arg) => arg.split(/[\s,]+/)).map((word) => parseId(word, tokenizer));
    const text = tokenizer.decode(ids);
    return json ? JSON.stringify({ text }) : text;
  }
  if (file !== undefined) return JSON.stringify(readTexts(file).map(encode));
  if (args.length === 0) {
    throw new CaravanError('bad_usage', 'tokenize needs TEXT…, --decode ID… or --file FILE.json');
  }
  const tokenized = args.map((text) => {
    const ids = encode(text);
    return { ids, pieces: ids.map((id) => tokenizer.pieceOf(id)) };
  });
  if (json) return JSON.stringify(tokenized.length === 1 ? tokenized[0] : tokenized);
  return tokenized
    .map(({ ids, pieces }) =>
      ids.map((id, i) => `${String(id).padStart(6)}  ${pieces[i] ?? ''}`).join('\n'),
    )
    .join('\n\n');
}

function parseId(word: string, tokenizer: Tokenizer): number {
  const id = Number(word);
  if (word !== '' && Number.isInteger(id) && id >= 0 && id < tokenizer.vocabSize) return id;
  throw new CaravanError(
    'bad_usage',
    `--decode ${word}: must be an id from 0 to ${tokenizer.vocabSize - 1}`,
  );
}

function readTexts(file: string): string[] {
  let json: unknown;
  try {
    json = JSON.parse(fs.readFileSync(file, 'utf8'));
  } catch (cause) {
    const reason = cause instanceof SyntaxError ? 'is not valid JSON' : 'cannot be read';
    throw new CaravanError('bad_usage', `--file ${file}: ${reason}`, { cause });
  }
  const parsed = texts.safeParse(json);
  if (!parsed.success) {
    throw new CaravanError('bad_usage', `--file ${file}: must be a JSON array of texts`);
  }
  return parsed.data;
}
