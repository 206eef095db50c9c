/** `caravan eval`: one teacher-forced pass over given tokens. */
import fs from 'node:fs';
import type { Command } from 'commander';
import { z } from 'zod';
import { CaravanError } from '../../proto/errors.js';
import { evaluate, type Evaluation } from '../evaluation.js';
import { weightCacheSettingNames, weightCacheTerms } from '../group-spec.js';
import { withLocalGroup } from '../local-group.js';
import { openModelTokenizer } from '../model-tokenizer.js';
import { encodePrompt } from '../prompt.js';
import { checked, declareSettings } from './options.js';

const tokenFile = z.array(z.number().int().nonnegative()).min(1);

/** Rows of one step when no chunk is asked for: what one pass means here, within bounded memory. */
const WHOLE_PASS_ROWS = 4096;

export function register(program: Command): void {
  const command = program
    .command('eval')
    .description(
      'Computes logits, argmax and perplexity of given tokens in one teacher-forced pass.',
    )
    .option('--tokens <file>', 'JSON file with an array of token ids')
    .option('--text <file>', 'text file; BOS is put before it, where the model knows one')
    .option(
      '--chunk <tokens>',
      'tokens of one prefill chunk (default: all at once)',
      checked(z.coerce.number().int().min(1), 'a whole number from 1'),
    )
    .option('--logits <positions>', 'positions whose logits are printed, P,P,…');
  const settings = declareSettings(command, [
    'model',
    'tp',
    'device',
    'weights',
    'exact',
    'kv',
    'transport',
    ...weightCacheSettingNames,
    'maxSeqLen',
    'json',
  ]);
  command.action(async () => {
    const s = settings();
    const { model, json } = s;
    const own = command.opts<{ tokens?: string; text?: string; chunk?: number; logits?: string }>();
    const tokens = readTokens(model, own);
    const positions = parsePositions(own.logits, tokens.length);
    const chunkTokens = own.chunk ?? Math.min(tokens.length, WHOLE_PASS_ROWS);
    const evaluation = await withLocalGroup(
      { ...s, keptWeights: weightCacheTerms(s), maxBatchSize: 1, maxStepRows: chunkTokens },
      ({ ranks, spec }) => evaluate(ranks, tokens, chunkTokens, positions, spec.maxSeqLen),
    );
    process.stdout.write(json ? `${JSON.stringify(toJson(evaluation))}\n` : toText(evaluation));
  });
}

function readTokens(model: string, own: { tokens?: string; text?: string }): readonly number[] {
  if ((own.tokens === undefined) === (own.text === undefined)) {
    throw new CaravanError('bad_usage', 'eval needs either --tokens FILE.json or --text FILE');
  }
  if (own.text !== undefined) {
    const tokenizer = openModelTokenizer(model);
    return encodePrompt(readFile('--text', own.text), tokenizer).ids;
  }
  const file = own.tokens!;
  const parsed = tokenFile.safeParse(parseJson(file, readFile('--tokens', file)));
  if (!parsed.success) {
    throw new CaravanError('bad_usage', `--tokens ${file}: must be a JSON array of token ids`);
  }
  return parsed.data;
}

function readFile(flag: string, file: string): string {
  try {
    return fs.readFileSync(file, 'utf8');
  } catch (cause) {
    throw new CaravanError('bad_usage', `${flag} ${file}: cannot be read`, { cause });
  }
}

function parseJson(file: string, text: string): unknown {
  try {
    return JSON.parse(text);
  } catch (cause) {
    throw new CaravanError('bad_usage', `${file}: is not valid JSON`, { cause });
  }
}

function parsePositions(text: string | undefined, tokenCount: number): number[] {
  if (text === undefined) return [];
  return text.split(',').map((part) => {
    const position = Number(part);
    if (
      part.trim() === '' ||
      !Number.isInteger(position) ||
      position < 0 ||
      position >= tokenCount
    ) {
      throw new CaravanError(
        'bad_usage',
        `--logits ${part}: must be a position from 0 to ${tokenCount - 1}`,
      );
    }
    return position;
  });
}

const toJson = ({ argmax, perplexity, logits }: Evaluation) => ({
  tokens: argmax.length,
  perplexity,
  argmax,
  logits: Object.fromEntries([...logits].map(([p, row]) => [p, Array.from(row)])),
});

function toText({ argmax, perplexity, logits }: Evaluation): string {
  const lines = [`tokens      ${argmax.length}`, `perplexity  ${perplexity?.toFixed(4) ?? '-'}`];
  for (const [position, row] of logits) {
    const best = argmax[position]!;
    lines.push(`position ${position}: argmax ${best}, logit ${row[best]!.toFixed(4)}`);
  }
  return `${lines.join('\n')}\n`;
}
