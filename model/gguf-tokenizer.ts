/**
 * The tokenizer in a GGUF file's metadata, as the files that `openTokenizer` and `openChatTemplate` read. Keys are those
 * of ggml's docs/gguf.md; what a name of `tokenizer.ggml.pre` splits at is as in llama.cpp's llama-vocab.cpp.
 */
import { BinaryWriter, WireType } from '@bufbuild/protobuf/wire';
import type { GgufMetadata } from './gguf-metadata.js';
import { quoted } from './quoted.js';

/** Kinds of tokens have SentencePiece's numbers in GGUF, too. */
const kind = { normal: 1, unknown: 2, control: 3, userDefined: 4, byte: 6 } as const;

const GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const llama3 = (digits: string): string =>
  "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|" +
  `${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;

interface Splitting {
  /** Applied one after the other. */
  readonly patterns: readonly string[];
  /** A word that is a token is not merged from its parts. */
  readonly ignoresMerges?: true;
  readonly addsBos?: true;
}

const splittings: ReadonlyMap<string, Splitting> = new Map<string, Splitting>([
  ['default', { patterns: ['[\\p{P}\\$\\+<=>\\^~\\|]+', GPT2, '\\p{N}+', '[0-9][0-9][0-9]'] }],
  ['gpt-2', { patterns: [GPT2] }],
  ['smollm', { patterns: ['\\p{N}', GPT2] }],
  ['llama-bpe', { patterns: [llama3('\\p{N}{1,3}')], ignoresMerges: true, addsBos: true }],
  ['qwen2', { patterns: [llama3('\\p{N}')] }],
]);
const otherNames: Readonly<Record<string, string>> = {
  gpt2: 'gpt-2',
  llama3: 'llama-bpe',
  'llama-v3': 'llama-bpe',
};

/** Empty where the file holds no tokenizer. @throws CaravanError naming the key. */
export function ggufTokenizerFiles(metadata: GgufMetadata): Map<string, Uint8Array> {
  const model = metadata.text('tokenizer.ggml.model');
  if (model === undefined) return new Map();
  const vocabulary = readVocabulary(metadata);
  switch (model) {
    case 'llama':
      return new Map([
        ['tokenizer.model', sentencePieceModel(metadata, vocabulary)],
        ...commonFiles(metadata, vocabulary, true),
      ]);
    case 'gpt2': {
      const named = metadata.text('tokenizer.ggml.pre') ?? 'default';
      const splitting = splittings.get(otherNames[named] ?? named);
      if (splitting === undefined) {
        const known = [...splittings.keys()].map((name) => `"${name}"`).join(', ');
        return metadata.unsupported('tokenizer.ggml.pre', named, known);
      }
      return new Map([
        ['tokenizer.json', bytesOf(byteLevelBpe(metadata, vocabulary, splitting))],
        ...commonFiles(metadata, vocabulary, splitting.addsBos ?? false),
      ]);
    }
    default:
      return metadata.unsupported('tokenizer.ggml.model', model, '"llama" and "gpt2"');
  }
}

interface Vocabulary {
  readonly pieces: readonly string[];
  readonly kinds: readonly number[];
}

function readVocabulary(metadata: GgufMetadata): Vocabulary {
  const key = 'tokenizer.ggml.tokens';
  const pieces = metadata.need(key, metadata.texts(key));
  const typeKey = 'tokenizer.ggml.token_type';
  const kinds = metadata.numbers(typeKey);
  if (kinds !== undefined && kinds.length !== pieces.length) {
    metadata.damaged(typeKey, `has ${kinds.length} values for ${pieces.length} tokens`);
  }
  if (kinds === undefined) return { pieces, kinds: pieces.map(() => kind.normal) };
  const numbers = Array.from(kinds, Number);
  const alien = numbers.findIndex((n) => !Number.isInteger(n) || n < 0 || n > kind.byte);
  if (alien !== -1) {
    metadata.damaged(typeKey, `token ${alien} is of kind ${numbers[alien]!}; kinds are 0 to 6`);
  }
  return { pieces, kinds: numbers };
}

/** The id of `tokenizer.ggml.NAME_token_id`, which must be a token. */
function tokenId(metadata: GgufMetadata, name: string, { pieces }: Vocabulary): number | undefined {
  const key = `tokenizer.ggml.${name}_token_id`;
  const id = metadata.natural(key);
  if (id !== undefined && id >= pieces.length) {
    metadata.damaged(key, `is ${id}; there are ${pieces.length} tokens`);
  }
  return id;
}

/** Field numbers of sentencepiece_model.proto, as in model/sentencepiece.ts. */
function sentencePieceModel(metadata: GgufMetadata, vocabulary: Vocabulary): Uint8Array {
  const { pieces, kinds } = vocabulary;
  const key = 'tokenizer.ggml.scores';
  const scores = metadata.need(key, metadata.numbers(key));
  if (scores.length !== pieces.length) {
    metadata.damaged(key, `has ${scores.length} values for ${pieces.length} tokens`);
  }
  // A score that is no number leaves open which pieces are merged first.
  const alien = Array.from(scores, Number).findIndex((n) => !Number.isFinite(Math.fround(n)));
  if (alien !== -1)
    metadata.damaged(key, `token ${alien} has ${scores[alien]!}; scores are finite`);
  const writer = new BinaryWriter();
  pieces.forEach((piece, id) => {
    writer.tag(1, WireType.LengthDelimited).fork();
    writer.tag(1, WireType.LengthDelimited).string(piece);
    writer.tag(2, WireType.Bit32).float(Number(scores[id]));
    writer.tag(3, WireType.Varint).int32(kinds[id]!);
    writer.join();
  });
  const BPE = 2;
  writer.tag(2, WireType.LengthDelimited).fork();
  writer.tag(3, WireType.Varint).int32(BPE);
  writer.tag(40, WireType.Varint).int32(tokenId(metadata, 'unknown', vocabulary) ?? 0);
  writer.tag(41, WireType.Varint).int32(tokenId(metadata, 'bos', vocabulary) ?? 1);
  writer.tag(42, WireType.Varint).int32(tokenId(metadata, 'eos', vocabulary) ?? 2);
  writer.join();
  const addsSpace = metadata.flag('tokenizer.ggml.add_space_prefix') ?? true;
  const removesSpaces = metadata.flag('tokenizer.ggml.remove_extra_whitespaces') ?? false;
  writer.tag(3, WireType.LengthDelimited).fork();
  writer.tag(3, WireType.Varint).bool(addsSpace);
  writer.tag(4, WireType.Varint).bool(removesSpaces);
  writer.join();
  return writer.finish();
}

function byteLevelBpe(metadata: GgufMetadata, vocabulary: Vocabulary, splitting: Splitting) {
  const { pieces, kinds } = vocabulary;
  const key = 'tokenizer.ggml.merges';
  const merges = metadata.need(key, metadata.texts(key));
  const bad = merges.find((merge) => !/^[^ ]+ [^ ]+$/.test(merge));
  if (bad !== undefined) {
    metadata.damaged(key, `${quoted(bad)} is not two pieces and a space`);
  }
  const added = pieces.flatMap((content, id) => {
    const isControl = kinds[id] === kind.control || kinds[id] === kind.unknown;
    if ((!isControl && kinds[id] !== kind.userDefined) || content === '') return [];
    const plain = { single_word: false, lstrip: false, rstrip: false, normalized: false };
    return [{ id, content, special: isControl, ...plain }];
  });
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true };
  return {
    version: '1.0',
    added_tokens: added,
    normalizer: null,
    pre_tokenizer: {
      type: 'Sequence',
      pretokenizers: [
        ...splitting.patterns.map((Regex) => ({
          type: 'Split',
          pattern: { Regex },
          behavior: 'Isolated',
          invert: false,
        })),
        { ...byteLevel, use_regex: false },
      ],
    },
    post_processor: null,
    decoder: { ...byteLevel, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: splitting.ignoresMerges ?? false,
      vocab: Object.fromEntries(pieces.map((piece, id) => [piece, id])),
      merges,
    },
  };
}

/** Control tokens that end a turn in files that name only the end of a text. */
const TURN_ENDS = ['<|eot_id|>', '<|im_end|>'];

function commonFiles(
  metadata: GgufMetadata,
  vocabulary: Vocabulary,
  addsBosByDefault: boolean,
): [string, Uint8Array][] {
  const { pieces, kinds } = vocabulary;
  const id = (name: string): number | undefined => tokenId(metadata, name, vocabulary);
  const [bos, eos, unknown] = [id('bos'), id('eos'), id('unknown')];
  const turnEnds = TURN_ENDS.map((piece) => pieces.indexOf(piece)).filter(
    (end) => kinds[end] === kind.control,
  );
  const ends = [eos, id('eot') ?? turnEnds[0], id('eom')].filter((end) => end !== undefined);
  const spelled = (name: string, of: number | undefined): object =>
    of === undefined ? {} : { [name]: pieces[of] };
  const template = readChatTemplate(metadata);
  const config = {
    add_bos_token: metadata.flag('tokenizer.ggml.add_bos_token') ?? addsBosByDefault,
    ...spelled('bos_token', bos),
    ...spelled('eos_token', eos),
    ...spelled('unk_token', unknown),
    ...(template === undefined ? {} : { chat_template: template }),
  };
  const generation = {
    ...(bos === undefined ? {} : { bos_token_id: bos }),
    ...(ends.length === 0 ? {} : { eos_token_id: [...new Set(ends)] }),
  };
  return [
    ['tokenizer_config.json', bytesOf(config)],
    ['generation_config.json', bytesOf(generation)],
  ];
}

/** One template, or several by name, as tokenizer_config.json has them. */
function readChatTemplate(metadata: GgufMetadata) {
  const key = 'tokenizer.chat_template';
  const whole = metadata.text(key);
  const namesKey = 'tokenizer.chat_templates';
  const names = metadata.texts(namesKey) ?? [];
  const bad = names.find((name) => !/^[\w.-]{1,100}$/.test(name));
  if (bad !== undefined) metadata.damaged(namesKey, `${quoted(bad)} is no name`);
  const named = names.map((name) => ({
    name,
    template: metadata.need(`${key}.${name}`, metadata.text(`${key}.${name}`)),
  }));
  if (named.length === 0) return whole;
  return whole === undefined ? named : [{ name: 'default', template: whole }, ...named];
}

const bytesOf = (json: unknown): Uint8Array => Buffer.from(JSON.stringify(json));
