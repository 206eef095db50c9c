/**
 * Which files of a repository make one layout that Caravan opens: safetensors, else Meta's download, else GGUF. Everything
 * else (other frameworks' weights, pictures, folders) stays where it is.
 */
import { TOKENIZER_FILES } from '../model/tokenizer.js';
import { CaravanError } from '../proto/errors.js';

export interface Layout {
  readonly kind: 'huggingface' | 'meta' | 'gguf';
  /** Files to fetch. */
  readonly names: readonly string[];
  /** Of those, the one that names the weight files, which come beside it; null where `names` is all. */
  readonly index: string | null;
}

const INDEX = 'model.safetensors.index.json';
const SINGLE = 'model.safetensors';

/**
 * @param source for messages. @param names all files of the repository.
 * @throws CaravanError `unsupported_model` when it holds no layout, or several models.
 */
export function chooseLayout(source: string, names: readonly string[]): Layout {
  const has = (name: string): boolean => names.includes(name);
  const present = (wanted: readonly string[]): string[] => wanted.filter(has);
  const refuse = (message: string): never => {
    throw new CaravanError('unsupported_model', `${source}: ${message}`);
  };
  if (has('config.json') && (has(INDEX) || has(SINGLE))) {
    const weights = has(INDEX) ? INDEX : SINGLE;
    return {
      kind: 'huggingface',
      names: [...present(TOKENIZER_FILES), weights],
      index: has(INDEX) ? INDEX : null,
    };
  }
  const pieces = names.filter((name) => /^consolidated\.\d\d\.pth$/.test(name)).sort();
  if (pieces.length > 0 && has('params.json')) {
    const beside = ['params.json', 'tokenizer.model', 'checklist.chk'];
    return { kind: 'meta', names: [...present(beside), ...pieces], index: null };
  }
  const gguf = names.filter((name) => /^[^/]+\.gguf$/.test(name)).sort();
  const models = new Set(gguf.map((name) => name.replace(/-\d{5}-of-\d{5}\.gguf$/, '.gguf')));
  if (models.size === 1) return { kind: 'gguf', names: gguf, index: null };
  if (models.size > 1) {
    return refuse(
      `holds ${models.size} GGUF models (${[...models].join(', ')}); fetch one by hand`,
    );
  }
  const isTorch = names.some((name) => /^pytorch_model.*\.bin$/.test(name));
  return refuse(
    isTorch
      ? "has only pytorch_model.bin; Caravan opens safetensors, Meta's download and GGUF"
      : "has neither safetensors with a config.json, nor Meta's consolidated.NN.pth, nor GGUF",
  );
}

/** The weight files that an index names. @throws CaravanError `invalid_checkpoint`. */
export function weightFilesOf(source: string, indexText: string): string[] {
  let weightMap: unknown;
  try {
    weightMap = (JSON.parse(indexText) as { weight_map?: unknown } | null)?.weight_map;
  } catch {
    weightMap = undefined;
  }
  const names = typeof weightMap === 'object' && weightMap !== null ? Object.values(weightMap) : [];
  const files = [...new Set(names)].filter((name) => typeof name === 'string');
  if (files.length === 0 || files.some((name) => !/^[\w.-]+$/.test(name))) {
    throw new CaravanError(
      'invalid_checkpoint',
      `${source}: ${INDEX}: weight_map is not a map of tensor to file`,
    );
  }
  return files.sort();
}
