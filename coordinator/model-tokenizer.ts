/** The tokenizer of a checkpoint on disk. */
import fs from 'node:fs';
import { openCheckpoint, readFolderTokenizer, resolveModelPath } from '../model/checkpoint.js';
import { openTokenizer, type Tokenizer } from '../model/tokenizer.js';

/**
 * Needs only the tokenizer's files of a folder, not its weights.
 *
 * @param model as `--model` takes it. @throws CaravanError `invalid_checkpoint`.
 */
export function openModelTokenizer(model: string | undefined): Tokenizer {
  const path = resolveModelPath(model);
  const isFolder = fs.statSync(path).isDirectory();
  return openTokenizer(
    isFolder ? readFolderTokenizer(path) : openCheckpoint(path).readTokenizerFiles(),
  );
}
