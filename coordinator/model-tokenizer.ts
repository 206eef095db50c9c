/** The tokenizer of a checkpoint on disk. */
import fs from 'node:fs';
import path from 'node:path';
import { resolveModelPath } from '../model/checkpoint.js';
import { openTokenizer, TOKENIZER_FILES, type Tokenizer } from '../model/tokenizer.js';

/** The checkpoint's tokenizer files, by name; those that are there. */
export function readTokenizerFiles(modelPath: string): Map<string, Uint8Array> {
  const files = new Map<string, Uint8Array>();
  for (const name of TOKENIZER_FILES) {
    const file = path.join(modelPath, name);
    if (fs.existsSync(file)) files.set(name, fs.readFileSync(file));
  }
  return files;
}

/** @param model as `--model` takes it. @throws CaravanError `invalid_checkpoint`. */
export const openModelTokenizer = (model: string | undefined): Tokenizer =>
  openTokenizer(readTokenizerFiles(resolveModelPath(model)));
